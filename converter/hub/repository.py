"""The interface that both hubs implement: a repository at one commit, its files, and HTTP requests for them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

from converter.errors import HubError
from converter.storage.local_file import LocalFile, sha256_of


class RepositoryFile(NamedTuple):
    """A file's size in bytes and SHA-256 as the hub lists them; None and empty if it does not."""

    size: int | None
    sha256: str = ""


class HttpResponse(NamedTuple):
    """A response of either HTTP library. Header names ignore case; `body` yields bytes without decompressing them."""

    url: str
    status: int
    headers: Mapping[str, str]
    body: Iterator[bytes]


class HubResponseError(Exception):
    """An error status from a hub.

    Args:
        status: The HTTP status code.
        message: The hub's explanation.
        code: The hub's own error code.
        retry_after: Seconds to wait, from the Retry-After header.
    """

    def __init__(self, status: int, message: str = "", code: str = "", retry_after: float | None = None) -> None:
        is_standard = status in HTTPStatus.__members__.values()
        self.message = message or (HTTPStatus(status).phrase if is_standard else "")
        super().__init__(f"HTTP {status}: {self.message}")
        self.status, self.code, self.retry_after = status, code, retry_after

    @classmethod
    def from_headers(cls, status: int, headers: Mapping[str, str]) -> HubResponseError:
        after = headers.get("Retry-After", "")
        message, code = headers.get("X-Error-Message", ""), headers.get("X-Error-Code", "")
        return cls(status, message, code, float(after) if after.isdecimal() else None)


class HubConnectionError(Exception):
    """A connection failed, timed out or broke; a retry may help."""


class Repository(Protocol):
    """A repository at one commit.

    Attributes:
        name: The address of the repository: hf://org/name@revision.
        commit: The commit of the revision; empty if the hub does not give it.
        files: All files by path.
        notes: Messages for the user, such as that the cache was used.
        cached_snapshot: A folder in the hub's cache with all requested files; None if the hub listed the files.
    """

    name: str
    commit: str
    files: dict[str, RepositoryFile]
    notes: list[str]
    cached_snapshot: Path | None

    def cached_file(self, path: str) -> Path | None:
        """Return the file in the hub's own cache, if it is complete."""

    def download(self, path: str) -> Path:
        """Download the whole file into the hub's own cache and check its SHA-256."""

    def url(self, path: str) -> str:
        """Return the address of a file on the hub."""

    def get(self, url: str, headers: dict[str, str]) -> AbstractContextManager[HttpResponse]:
        """Send a GET request, with the user's token only if `url` is on the hub itself; do not follow redirects.

        Raises:
            HubConnectionError: The connection fails, also while the body is read.
        """

    def close(self) -> None:
        """Close idle connections; later requests open new ones."""

    def to_hub_error(self, error: HubResponseError, path: str) -> HubError:
        """Convert an error status into an error with a message for the user; `path` is empty for the repository."""


def parse_file_list(rows: Iterable[tuple[object, object, object]]) -> dict[str, RepositoryFile]:
    """Validate a hub's listing, given as rows of path, size and SHA-256, and return the files by path.

    Paths that leave their folder are skipped; invalid sizes and digests are replaced by None and empty strings.
    """
    files = {}
    for path, size, sha256 in rows:
        if isinstance(path, str) and path.isprintable() and not {"", ".", ".."} & set(re.split(r"[/\\]", path)):
            valid = isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256)
            digest = sha256 if isinstance(sha256, str) and valid else ""
            files[path] = RepositoryFile(size if isinstance(size, int) and size >= 0 else None, digest)
    return files


def is_intact(path: Path, expected: RepositoryFile) -> bool:
    """Return whether a local file has the size and the SHA-256 that the hub lists."""
    with closing(LocalFile(path)) as file:
        return file.size == expected.size and expected.sha256 in ("", sha256_of(file))


def same_origin(one: str, other: str) -> bool:
    """Return whether two URLs have the same scheme, host and port."""
    return urlsplit(one)[:2] == urlsplit(other)[:2]

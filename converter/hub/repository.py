"""The interface of both hubs: a repository at one commit, its files, and HTTP requests for them."""

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


class Entry(NamedTuple):
    """A file of a repository: size in bytes and SHA-256, where the hub gives them."""

    size: int | None
    sha256: str = ""


class HttpResponse(NamedTuple):
    """A response of either HTTP library: `headers` ignore case, `body` yields bytes as received, not decompressed."""

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
        retry_after: Seconds to wait, from the header.
    """

    def __init__(self, status: int, message: str = "", code: str = "", retry_after: float | None = None) -> None:
        known = status in HTTPStatus.__members__.values()
        self.message = message or (HTTPStatus(status).phrase if known else "")
        super().__init__(f"HTTP {status}: {self.message}")
        self.status, self.code, self.retry_after = status, code, retry_after

    @classmethod
    def from_headers(cls, status: int, headers: Mapping[str, str]) -> HubResponseError:
        after = headers.get("Retry-After", "")
        message, code = headers.get("X-Error-Message", ""), headers.get("X-Error-Code", "")
        return cls(status, message, code, float(after) if after.isdecimal() else None)


class HubConnectionError(Exception):
    """A connection that could not be made, timed out or broke; a retry may help."""


class Repository(Protocol):
    """A repository at one commit.

    Attributes:
        name: The address without a file: hf://org/name@revision.
        commit: The commit of the revision; empty if the hub does not give it.
        files: All files by path.
        notes: Messages for the user about where the files were found.
        folder: A folder in the hub's cache that has all requested files, if the hub was not asked.
    """

    name: str
    commit: str
    files: dict[str, Entry]
    notes: list[str]
    folder: Path | None

    def cached(self, path: str) -> Path | None:
        """Return the file in the hub's own cache, if it is complete."""

    def download(self, path: str) -> Path:
        """Download the whole file into the hub's own cache and check its SHA-256."""

    def url(self, path: str) -> str:
        """Return the address of a file on the hub."""

    def get(self, url: str, headers: dict[str, str]) -> AbstractContextManager[HttpResponse]:
        """Send a GET request, with the user's token if `url` is on the hub itself; redirects are not followed.

        Raises HubConnectionError, also while the body is read.
        """

    def close(self) -> None:
        """Close idle connections; later requests open new ones."""

    def refused(self, error: HubResponseError, path: str) -> HubError:
        """Return the message for an error status, with the next step."""


def listed(rows: Iterable[tuple[object, object, object]]) -> dict[str, Entry]:
    """Return the files of a hub's listing, given as path, size and SHA-256.

    The listing is not trusted: paths that leave their folder are left out, impossible sizes and digests are dropped.
    """
    files = {}
    for path, size, sha256 in rows:
        if isinstance(path, str) and path.isprintable() and not {"", ".", ".."} & set(re.split(r"[/\\]", path)):
            valid = isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256)
            digest = sha256 if isinstance(sha256, str) and valid else ""
            files[path] = Entry(size if isinstance(size, int) and size >= 0 else None, digest)
    return files


def is_intact(path: Path, entry: Entry) -> bool:
    """Whether a local file has the size and the SHA-256 that the hub gives."""
    with closing(LocalFile(path)) as file:
        return file.size == entry.size and entry.sha256 in ("", sha256_of(file))


def same_origin(one: str, other: str) -> bool:
    """Whether two URLs have the same scheme, host and port."""
    return urlsplit(one)[:2] == urlsplit(other)[:2]

"""A repository on a hub at one commit, its files, and HTTP requests for them: what both hubs have in common."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple
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


class Repository(ABC):
    """A repository at one commit. A class for a hub has the methods that are abstract here.

    Attributes:
        name: The address of the repository: hf://org/name@revision.
        commit: The commit of the revision; empty if the hub does not give it.
        files: All files by path.
        notes: Messages for the user, such as that the cache was used.
        cached_snapshot: A folder in the hub's cache with all requested files; None if the hub listed the files.
    """

    # The errors of the hub's library for a response with an error status, and for a request without a response. All
    # other exceptions are bugs.
    response_errors: tuple[type[Exception], ...] = ()
    network_errors: tuple[type[Exception], ...] = ()
    # What else to try if the hub cannot be reached.
    other_hub = ""

    def __init__(self, name: str, endpoint: str, is_complete: Callable[[Path], bool]) -> None:
        """Prepare a repository without requests.

        Args:
            name: Its address.
            endpoint: The URL of the hub.
            is_complete: Returns whether a folder in the hub's cache has all requested files.
        """
        self.name, self._endpoint, self._is_complete = name, endpoint, is_complete
        self.commit = ""
        self.files: dict[str, RepositoryFile] = {}
        self.notes: list[str] = []
        self.cached_snapshot: Path | None = None

    def list_files(self) -> None:
        """Request the commit and the files; if the hub cannot be reached, use its cache, as transformers does."""
        try:
            self._list_files()
        except HubResponseError as error:
            raise self.to_hub_error(error, "") from None
        except HubConnectionError as error:
            problem = f"{self._endpoint} cannot be reached"
            if not self._use_cached_snapshot():
                hint = "check the network, the proxy and the hub's endpoint setting, then run again"
                raise HubError(f"{problem}: {error}", hint + self.other_hub) from None
            version = f"commit {self.commit}" if self.commit else str(self.cached_snapshot)
            self.notes.append(f"{problem}: taken from the cache, {version}")

    def _use_cached_snapshot(self) -> bool:
        """Use the cache's snapshot of the revision; return whether it has the requested files."""
        folder = self._find_snapshot()
        if folder is not None and self._is_complete(folder):
            self.cached_snapshot = folder
        return self.cached_snapshot is not None

    def download(self, path: str) -> Path:
        """Download the whole file into the hub's own cache and check its SHA-256."""
        where = f"{self.name}/{path}"
        try:
            with self.translated_errors():
                file = self._download(path)
        except HubResponseError as error:
            raise self.to_hub_error(error, path) from None
        except (HubConnectionError, OSError) as error:  # OSError: the cache's disk
            raise HubError(f"{where}: could not be downloaded: {_first_line(error)}", "try again") from None
        sha256 = self.files[path].sha256
        if sha256 and not is_intact(file, self.files[path]):
            # Otherwise other programs would use the damaged file from the cache.
            for damaged in (file.resolve(), file):
                with suppress(OSError):
                    damaged.unlink()
            raise HubError(
                f"{where}: the download does not match the hub's SHA-256, {sha256}, and was removed", "try again"
            )
        return file

    @contextmanager
    def translated_errors(self) -> Iterator[None]:
        """Raise the errors of the hub's library as HubResponseError or HubConnectionError."""
        try:
            yield
        except self.response_errors as error:
            raise self._response_error(error) from None
        except json.JSONDecodeError:
            raise HubConnectionError("the answer is not JSON (a captive portal or a proxy?)") from None
        except self.network_errors as error:
            raise HubConnectionError(_first_line(error)) from None

    @abstractmethod
    def close(self) -> None:
        """Close idle connections; later requests open new ones."""

    @abstractmethod
    def _list_files(self) -> None:
        """Set `files` and `commit`.

        Raises:
            HubResponseError: The hub refuses.
            HubConnectionError: The hub cannot be reached.
        """

    @abstractmethod
    def _find_snapshot(self) -> Path | None:
        """Return the revision's folder in the hub's cache, which may lack files, and set `commit` if it is known."""

    @abstractmethod
    def cached_file(self, path: str) -> Path | None:
        """Return the file in the hub's own cache, if it is complete."""

    @abstractmethod
    def _download(self, path: str) -> Path:
        """Download the whole file with the hub's library."""

    @abstractmethod
    def url(self, path: str) -> str:
        """Return the address of a file on the hub."""

    @abstractmethod
    def get(self, url: str, headers: dict[str, str]) -> AbstractContextManager[HttpResponse]:
        """Send a GET request, with the user's token only if `url` is on the hub itself; do not follow redirects.

        Raises:
            HubConnectionError: The connection fails, also while the body is read.
        """

    @abstractmethod
    def _response_error(self, error: Any) -> Exception:
        """Convert one of `response_errors`."""

    @abstractmethod
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
    """Return whether a local file has the size and the SHA-256 that the hub lists; False if it lists neither."""
    if expected == RepositoryFile(None):
        return False
    with closing(LocalFile(path)) as file:
        return expected.size in (None, file.size) and expected.sha256 in ("", sha256_of(file))


def same_origin(one: str, other: str) -> bool:
    """Return whether two URLs have the same scheme, host and port."""
    return urlsplit(one)[:2] == urlsplit(other)[:2]


def _first_line(error: Exception) -> str:
    return (getattr(error, "message", "") or str(error)).partition("\n")[0]

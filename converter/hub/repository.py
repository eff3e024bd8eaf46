"""A repository on a hub at one commit, its files, and HTTP requests for them: what both hubs have in common."""

from __future__ import annotations

import json
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import requests
import urllib3

from converter.errors import HubError
from converter.storage.local_file import LocalFile, sha256_of

RETRYABLE_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
# Seconds to wait before an attempt: each wait is twice the one before.
_FIRST_WAIT, _MAX_WAIT = 0.5, 30.0
# Attempts of an API request. A request that gets no response is not repeated after this many seconds.
_MAX_API_ATTEMPTS, _MAX_API_SECONDS = 3, 5.0
_READ_SIZE = 256 << 10  # bytes

_T = TypeVar("_T")


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
    """An error status from a hub, with the hub's message and its own code; `retry_after` is in seconds."""

    def __init__(self, status: int, message: str = "", code: str = "", retry_after: float | None = None) -> None:
        is_standard = status in HTTPStatus.__members__.values()
        self.message = message or (HTTPStatus(status).phrase if is_standard else "")
        super().__init__(f"HTTP {status}: {self.message}")
        self.status, self.code, self.retry_after = status, code, retry_after

    @classmethod
    def from_headers(cls, status: int, headers: Mapping[str, str]) -> HubResponseError:
        """Read message, code and wait from the headers of a response."""
        after = headers.get("Retry-After", "")
        message, code = headers.get("X-Error-Message", ""), headers.get("X-Error-Code", "")
        return cls(status, message, code, float(after) if after.isdecimal() else None)


class HubConnectionError(Exception):
    """A connection failed, timed out or broke; a retry may help."""


class Repository(ABC):
    """A repository at one commit. A class for a hub has the methods that are abstract here.

    Args:
        name: Its address: hf://org/name@revision.
        endpoint: The URL of the hub.
        is_complete: Returns whether a folder in the hub's cache has all requested files.

    Attributes:
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
        where, sha256 = f"{self.name}/{path}", self.files[path].sha256
        try:
            with self._translated_errors():
                file = self._download(path)
        except HubResponseError as error:
            raise self.to_hub_error(error, path) from None
        except (HubConnectionError, OSError) as error:  # OSError: the cache's disk
            raise HubError(f"{where}: could not be downloaded: {_first_line(error)}", "try again") from None
        if sha256 and not is_intact(file, self.files[path]):
            # Otherwise other programs would use the damaged file from the cache.
            for damaged in (file.resolve(), file):
                with suppress(OSError):
                    damaged.unlink()
            message = f"{where}: the download does not match the hub's SHA-256, {sha256}, and was removed"
            raise HubError(message, "try again")
        return file

    def _request(self, call: Callable[[], _T]) -> _T:
        """Call the hub's library, again after transient failures; the last error is raised."""
        begin = time.monotonic()
        for attempt in range(1, _MAX_API_ATTEMPTS):
            try:
                with self._translated_errors():
                    return call()
            except HubResponseError as error:
                if error.status not in RETRYABLE_STATUS:
                    raise
                time.sleep(retry_wait(attempt, error.retry_after))
            except HubConnectionError:
                if time.monotonic() - begin > _MAX_API_SECONDS:
                    raise
                time.sleep(retry_wait(attempt, None))
        with self._translated_errors():
            return call()

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
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
        """Set `files` and `commit`; HubResponseError or HubConnectionError if the hub does not give them."""

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


@contextmanager
def get_with_requests(
    session: requests.Session, url: str, headers: dict[str, str], **options: Any
) -> Iterator[HttpResponse]:
    """Send a GET request with the requests library, without following redirects.

    Args:
        session: The session, whose proxies and certificates are used.
        url: The URL to request.
        headers: Headers of this request.
        options: Other arguments of `requests.Session.get`: timeout, cookies.

    Raises:
        HubConnectionError: The connection fails, also while the body is read.
    """
    options |= {"headers": headers, "stream": True, "allow_redirects": False}
    try:
        # `auth` keeps credentials of ~/.netrc from replacing the token.
        with session.get(url, auth=lambda request: request, **options) as response:
            body = response.raw.stream(_READ_SIZE, decode_content=False)
            yield HttpResponse(url, response.status_code, response.headers, body)
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise HubConnectionError(str(error)) from None


def retry_wait(attempt: int, retry_after: float | None) -> float:
    """Return the seconds to wait: `retry_after` if the hub gave it, else twice as long after each attempt."""
    return min(_FIRST_WAIT * 2 ** (attempt - 1) if retry_after is None else retry_after, _MAX_WAIT)


def parse_file_list(rows: Iterable[tuple[object, object, object]]) -> dict[str, RepositoryFile]:
    """Validate a hub's listing, given as rows of path, size and SHA-256, and return the files by path.

    Paths that leave their folder are skipped; invalid sizes and digests are replaced by None and empty strings.
    """
    files = {}
    for path, size, sha256 in rows:
        if isinstance(path, str) and path.isprintable() and not {"", ".", ".."} & set(re.split(r"[/\\]", path)):
            digest = sha256 if isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256) else ""
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

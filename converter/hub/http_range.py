"""Bytes of remote files by range, whatever the connection does: retried, resumed, and checked to be the ones meant."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import requests
import urllib3

from converter.errors import ContainerError, HubError, UnreachableError
from converter.hub.repository import HubResponseError, Repository, ignore_netrc

# Attempts without a byte of progress, the first one included; waits double from the first one's.
_TRIES, _FIRST_WAIT, _LONGEST_WAIT = 6, 0.5, 30.0
# A question is asked again so often, unless getting no answer took longer than this.
_ASKING_TRIES, _ASKING_SECONDS = 3, 5.0
_BUFFER = 1 << 20

# What passes by itself: a busy hub, a gateway restarting.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
# What a signed address answers when its time is over: the hub gives a new one.
_EXPIRED = frozenset({400, 401, 403, 404, 410})

# A server that closes early, a stalled connection, a name that does not resolve.
_BROKEN = (requests.RequestException, urllib3.exceptions.HTTPError, OSError)
# Redirects that lead nowhere, now or later.
_ASTRAY = (requests.TooManyRedirects, requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema)

T = TypeVar("T")


def with_retries(ask: Callable[[], T]) -> T:
    """The answer to a question that may meet a busy hub; raises the last Answer or UnreachableError."""
    begin = time.monotonic()
    for tried in range(1, _ASKING_TRIES + 1):
        try:
            return ask()
        except HubResponseError as answer:
            if answer.status not in _PASSING or tried == _ASKING_TRIES:
                raise
            time.sleep(_wait(tried, answer.retry_after))
        except UnreachableError:
            # Where nothing comes back, each attempt takes a timeout's length.
            if tried == _ASKING_TRIES or time.monotonic() - begin > _ASKING_SECONDS:
                raise
            time.sleep(_wait(tried, None))
    raise AssertionError


def _wait(tried: int, retry_after: float | None) -> float:
    """Seconds to wait: what the hub asks for, or twice as long each time."""
    asked = _FIRST_WAIT * 2 ** (tried - 1) if retry_after is None else retry_after
    return min(asked, _LONGEST_WAIT)


class Transfer:
    """Ranges of one file of a repository, from several threads."""

    def __init__(self, repository: Repository, path: str, size: int) -> None:
        self._repository, self._path, self._size = repository, path, size
        self._name = f"{repository.name}/{path}"
        # Where the hub's redirect led: asking the hub again for each range would double the requests.
        self._location = ""
        self._etag = ""
        # No token goes to the CDN.
        self._session = requests.Session()
        ignore_netrc(self._session)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._open_now: list[requests.Response] = []

    def stop(self) -> None:
        """Have fetches under way end with an error, those too that wait for bytes."""
        self._stopped.set()
        with self._lock:
            for response in self._open_now:
                # urllib3 before 2.3 cannot: the wait then ends with its timeout.
                with suppress(*_BROKEN, RuntimeError, ValueError):
                    getattr(response.raw, "shutdown", lambda: None)()

    def close(self) -> None:
        """Let go of the connections."""
        self._session.close()

    def fetch(self, start: int, end: int) -> Iterator[tuple[memoryview, int]]:
        """Bytes `start` to `end` (exclusive) as they come, in order, each piece with its place in the file.

        A piece is valid until the next one. HubError where they do not come. (A generator: errors of who takes the
        pieces are not met here, and not mistaken for those of the connection.)
        """
        at, tried = start, 0
        while at < end:
            before, wait = at, None
            try:
                for segment in self._pieces(at, end):
                    yield segment, at
                    at += len(segment)
                why = "the connection ended early"
            except HubResponseError as answer:
                if answer.status == 416:
                    raise self._changed() from None
                if answer.status not in _PASSING:
                    raise self._repository.refused(answer, self._path) from None
                why, wait = str(answer), answer.retry_after
            except _ASTRAY as error:
                raise HubError(f"{self._name}: {error}", "see whether the hub's endpoint is set right") from None
            except (UnreachableError, *_BROKEN) as error:
                why = str(error).partition("\n")[0] or type(error).__name__
            tried = 1 if at > before else tried + 1
            if at < end:
                self._pause(tried, wait, why)

    def _pause(self, tried: int, wait: float | None, why: str) -> None:
        if tried >= _TRIES:
            raise HubError(f"{self._name}: could not be fetched in {tried} attempts: {why}", "try again later")
        self._stopped.wait(_wait(tried, wait))

    def _pieces(self, at: int, end: int) -> Iterator[memoryview]:
        """The bytes of one answer, which may end before `end`; each piece is valid until the next."""
        buffer = memoryview(bytearray(min(_BUFFER, end - at)))
        self._check_stopped()
        with self._open(at, end) as response, self._stoppable(response):
            self._check(response, at, end)
            while at < end and (count := response.raw.readinto(buffer[: end - at])):
                yield buffer[:count]
                at += count
                self._check_stopped()

    @contextmanager
    def _stoppable(self, response: requests.Response) -> Iterator[None]:
        with self._lock:
            self._open_now.append(response)
        try:
            yield
        finally:
            with self._lock:
                self._open_now.remove(response)

    def _check_stopped(self) -> None:
        if self._stopped.is_set():
            raise HubError(f"{self._name}: the transfer was stopped")

    def _open(self, at: int, end: int) -> requests.Response:
        # Compressed on the way, a range would be of other bytes.
        headers = {"Range": f"bytes={at}-{end - 1}", "Accept-Encoding": "identity"}
        location = self._location
        if location:
            response = self._session.get(location, headers=headers, stream=True, timeout=self._repository.timeout)
            if response.status_code not in _EXPIRED:
                return _good(response)
            response.close()
        response = _good(self._repository.open(self._path, headers))
        # To the hub's own host a token must go along: there, the library asks each time.
        if response.history and _host(response) != _host(response.history[0]):
            self._location = response.url
        return response

    def _check(self, response: requests.Response, at: int, end: int) -> None:
        """That the answer is the range asked for, of the file that the hub lists, as it was when the first one came."""
        headers = response.headers
        if headers.get("Content-Type", "").startswith("text/html"):
            raise HubError(
                f"{self._name}: {_host(response)} answers with a web page",
                "see whether the network wants you to log in",
            )
        if headers.get("Content-Encoding", "identity") != "identity":
            raise HubError(
                f"{self._name}: {_host(response)} compresses what it was asked for as it is",
                "add --download to fetch it whole",
            )
        size = self._size_told(response, at, end)
        etag, linked = headers.get("ETag", ""), headers.get("X-Linked-ETag", "").strip('"')
        with self._lock:
            self._etag = self._etag or etag
            same = etag in ("", self._etag)
        # A digest, where both tell one: ModelScope lists a branch, which may move before the first bytes are asked for.
        digest = self._repository.files[self._path].sha256
        if size != self._size or not same or (digest and len(linked) == len(digest) and linked != digest):
            raise self._changed()

    def _size_told(self, response: requests.Response, at: int, end: int) -> int:
        """The file's size as an answer tells it, which must be of the bytes asked for or fewer."""
        if response.status_code == 206:
            given = response.headers.get("Content-Range", "")
            found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", given)
            if found is None or int(found[1]) != at or int(found[2]) >= end:
                raise HubError(f"{self._name}: bytes {at} to {end - 1} were asked for, and the answer is {given!r}")
            return int(found[3])
        if response.status_code == 200 and (at, end) == (0, self._size):
            length = response.headers.get("Content-Length", "")
            return int(length) if length.isdecimal() else self._size
        raise HubError(
            f"{self._name}: {_host(response)} does not serve parts of files: it ignores Range",
            "add --download to fetch it whole",
        )

    def _changed(self) -> ContainerError:
        return ContainerError(f"{self._name}: changed while it was being read", "run again, or pin it with --revision")


def _good(response: requests.Response) -> requests.Response:
    if response.status_code >= 400:
        response.close()
        raise HubResponseError.of(response)
    return response


def _host(response: requests.Response) -> str:
    return response.url.split("/")[2]

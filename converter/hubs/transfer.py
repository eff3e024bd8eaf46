"""Bytes of remote files by range, whatever the connection does: retried, resumed, and checked to be the ones meant."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import requests
import urllib3

from converter.errors import ContainerError, HubError, UnreachableError
from converter.hubs.repository import TIMEOUT, Answer, Repository

# Attempts without a byte of progress, the first one included; waits double from the first one's.
_TRIES, _FIRST_WAIT, _LONGEST_WAIT = 6, 0.5, 30.0
_ASKING_TRIES = 3
_BUFFER = 1 << 20

# What passes by itself: a busy hub, a gateway restarting.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
# What a signed address answers when its time is over: the hub gives a new one.
_EXPIRED = frozenset({400, 401, 403, 404, 410})

# A server that closes early, a stalled connection, a name that does not resolve.
_BROKEN = (requests.RequestException, urllib3.exceptions.HTTPError, OSError)

# Takes the bytes that have come, and where in the file they belong.
Sink = Callable[[memoryview, int], None]

T = TypeVar("T")


def patiently(ask: Callable[[], T]) -> T:
    """The answer to a question that may meet a busy hub; raises the last Answer or UnreachableError."""
    for tried in range(1, _ASKING_TRIES + 1):
        try:
            return ask()
        except Answer as answer:
            if answer.status not in _PASSING or tried == _ASKING_TRIES:
                raise
            time.sleep(_wait(tried, answer.retry_after))
        except UnreachableError:
            if tried == _ASKING_TRIES:
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
        self._session = requests.Session()
        # No token goes to the CDN; an authentication of one's own keeps requests from looking for one in ~/.netrc.
        self._session.auth = lambda request: request
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._open_now: list[requests.Response] = []

    def stop(self) -> None:
        """Have fetches under way end with an error, those too that wait for bytes."""
        self._stopped.set()
        with self._lock:
            for response in self._open_now:
                # urllib3 before 2.3 cannot: the wait then ends with its timeout.
                getattr(response.raw, "shutdown", lambda: None)()

    def fetch(self, start: int, end: int, sink: Sink) -> None:
        """Bytes `start` to `end` (exclusive) into `sink`, as they come and in order; HubError where they do not."""
        at, tried = start, 0
        while at < end:
            before, wait = at, None
            try:
                for piece in self._pieces(at, end):
                    sink(piece, at)
                    at += len(piece)
                why = "the connection ended early"
            except Answer as answer:
                if answer.status in _EXPIRED and self._forget_location():
                    continue
                if answer.status == 416:
                    raise self._changed() from None
                if answer.status not in _PASSING:
                    raise self._repository.refused(answer, self._path) from None
                why, wait = str(answer), answer.retry_after
            except (UnreachableError, *_BROKEN) as error:
                why = str(error)
            tried = 1 if at > before else tried + 1
            if at < end:
                self._pause(tried, wait, why)

    def _pause(self, tried: int, wait: float | None, why: str) -> None:
        if tried >= _TRIES:
            raise HubError(f"{self._name}: could not be fetched in {tried} attempts: {why}\ntry again later")
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
            response = self._session.get(location, headers=headers, stream=True, timeout=TIMEOUT)
        else:
            response = self._repository.open(self._path, headers)
        if response.status_code >= 400:
            response.close()
            raise Answer.of(response)
        with self._lock:
            # To the hub's own host a token must go along: there, the library asks each time.
            if not location and response.history and _host(response) != _host(response.history[0]):
                self._location = response.url
        return response

    def _forget_location(self) -> bool:
        """Whether there was one: the hub is then to be asked for another."""
        with self._lock:
            known, self._location = bool(self._location), ""
        return known

    def _check(self, response: requests.Response, at: int, end: int) -> None:
        """That the answer is the range asked for, of the file as it was when the first one came."""
        if response.status_code != 206:
            if response.status_code == 200 and (at, end) == (0, self._size):
                return
            raise HubError(
                f"{self._name}: {_host(response)} does not serve parts of files: it ignores Range\n"
                "add --download to fetch it whole"
            )
        given = response.headers.get("Content-Range", "")
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", given)
        if found is None or int(found[1]) != at or int(found[2]) >= end:
            raise HubError(f"{self._name}: bytes {at} to {end - 1} were asked for, and the answer is {given!r}")
        etag = response.headers.get("ETag", "")
        with self._lock:
            self._etag = self._etag or etag
            same = etag in ("", self._etag)
        if int(found[3]) != self._size or not same:
            raise self._changed()

    def _changed(self) -> ContainerError:
        return ContainerError(f"{self._name}: changed while it was being read\nrun again, or pin it with --revision")


def _host(response: requests.Response) -> str:
    return response.url.split("/")[2]

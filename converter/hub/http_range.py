"""Byte ranges of a file on a hub: redirected, retried, resumed, and checked to be of the same file."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar
from urllib.parse import urljoin, urlsplit

from converter.errors import ContainerError, HubError
from converter.hub.repository import HttpResponse, HubConnectionError, HubResponseError, Repository, same_origin

# Attempts without a byte of progress; waits double from the first one.
_ATTEMPTS, _FIRST_WAIT, _LONGEST_WAIT = 6, 0.5, 30.0
# Attempts of an API request. None follows if one without a response took longer than this many seconds.
_API_ATTEMPTS, _API_SECONDS = 3, 5.0
_MAX_REDIRECTS = 8

_REDIRECT_STATUS = frozenset({301, 302, 303, 307, 308})
_RETRYABLE_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
# What a CDN returns for a signed address that has expired.
_EXPIRED_STATUS = frozenset({400, 401, 403, 404, 410})

T = TypeVar("T")


def with_retries(request: Callable[[], T]) -> T:
    """Call `request`, retrying transient failures; raises the last HubResponseError or HubConnectionError."""
    begin = time.monotonic()
    for attempt in range(1, _API_ATTEMPTS):
        try:
            return request()
        except HubResponseError as error:
            if error.status not in _RETRYABLE_STATUS:
                raise
            time.sleep(_wait(attempt, error.retry_after))
        except HubConnectionError:
            if time.monotonic() - begin > _API_SECONDS:
                raise
            time.sleep(_wait(attempt, None))
    return request()


def _wait(attempt: int, retry_after: float | None) -> float:
    """Return the seconds to wait: as long as the hub requests, or twice as long each time."""
    return min(_FIRST_WAIT * 2 ** (attempt - 1) if retry_after is None else retry_after, _LONGEST_WAIT)


class RangeReader:
    """Reads byte ranges of one file of a repository; several threads may use it.

    Args:
        repository: Where the file is.
        path: Its path in the repository.
        size: Its size in bytes, by the hub's listing.
    """

    def __init__(self, repository: Repository, path: str, size: int) -> None:
        self._repository, self._path, self._size = repository, path, size
        self._name = f"{repository.name}/{path}"
        self._url = repository.url(path)
        # Where the hub redirected to: asking the hub again for each range would double the requests.
        self._cdn_url = ""
        self._etag = ""
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Let reads in other threads end with an error."""
        self._stopped.set()

    def read(self, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes `start` to `end` (exclusive) in order, in pieces as they are received.

        Raises:
            HubError: The hub refuses, or fails repeatedly.
            ContainerError: The file has been replaced.
        """
        at, attempt = start, 0
        while at < end:
            before, retry_after = at, None
            try:
                for piece in self._pieces(at, end):
                    yield piece
                    at += len(piece)
                why = "the connection ended early"
            except HubConnectionError as error:
                why = str(error).partition("\n")[0] or "the connection failed"
            except HubResponseError as error:
                if error.status == 416:
                    raise self._replaced() from None
                if error.status not in _RETRYABLE_STATUS:
                    raise self._repository.refused(error, self._path) from None
                why, retry_after = str(error), error.retry_after
            attempt = 1 if at > before else attempt + 1
            if at < end:
                self._pause(attempt, retry_after, why)

    def _pause(self, attempt: int, retry_after: float | None, why: str) -> None:
        if attempt >= _ATTEMPTS:
            raise HubError(f"{self._name}: could not be fetched in {attempt} attempts: {why}", "try again later")
        self._stopped.wait(_wait(attempt, retry_after))

    def _pieces(self, start: int, end: int) -> Iterator[bytes]:
        """Yield the body of one response, which may end early."""
        self._check_stopped()
        with self._response(start, end) as response:
            self._check(response, start, end)
            # Read to its end, not only to `end`: the connection can then be used again.
            for piece in response.body:
                self._check_stopped()
                if start >= end:
                    return
                yield piece[: end - start]
                start += len(piece)

    def _check_stopped(self) -> None:
        if self._stopped.is_set():
            raise HubError(f"{self._name}: the transfer was stopped")

    @contextmanager
    def _response(self, start: int, end: int) -> Iterator[HttpResponse]:
        """Request a range from the CDN or, if its address is unknown or has expired, from the hub."""
        # A range of compressed bytes would be another one.
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        cdn_url = self._cdn_url
        url = cdn_url or self._url
        for _ in range(_MAX_REDIRECTS):
            with self._repository.get(url, headers) as response:
                if response.status in _REDIRECT_STATUS:
                    url = self._redirected(response)
                elif response.status in _EXPIRED_STATUS and url == cdn_url:
                    url = self._url
                elif response.status >= 400:
                    raise HubResponseError.from_headers(response.status, response.headers)
                else:
                    # The hub itself is asked each time: it needs the token.
                    self._cdn_url = "" if same_origin(url, self._url) else url
                    yield response
                    return
        raise HubError(f"{self._name}: more than {_MAX_REDIRECTS} redirects", "check the hub's endpoint setting")

    def _redirected(self, response: HttpResponse) -> str:
        location = response.headers.get("Location", "")
        url = urljoin(response.url, location)
        if not location or urlsplit(url).scheme not in ("http", "https"):
            raise HubError(f"{self._name}: redirected to {location!r}", "check the hub's endpoint setting")
        return url

    def _check(self, response: HttpResponse, start: int, end: int) -> None:
        """Raise an error unless the response has the requested range, of the file as it was listed and read before."""
        headers, host = response.headers, urlsplit(response.url).netloc
        if headers.get("Content-Type", "").startswith("text/html"):
            raise HubError(f"{self._name}: {host} answers with a web page", "check whether the network needs a login")
        if headers.get("Content-Encoding", "identity") != "identity":
            raise HubError(f"{self._name}: {host} compresses files", "add --download to fetch whole files")
        size = self._total_size(response, start, end)
        etag, linked = headers.get("ETag", ""), headers.get("X-Linked-ETag", "").strip('"')
        with self._lock:
            self._etag = self._etag or etag
            same = etag in ("", self._etag)
        # ModelScope lists a branch, which may move between the listing and the first range: compare the digests.
        digest = self._repository.files[self._path].sha256
        if size != self._size or not same or (digest and len(linked) == len(digest) and linked != digest):
            raise self._replaced()

    def _total_size(self, response: HttpResponse, start: int, end: int) -> int:
        """Return the size of the file by a response, after checking that its range is within `start` to `end`."""
        if response.status == 206:
            value = response.headers.get("Content-Range", "")
            match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", value)
            if match is None or int(match[1]) != start or int(match[2]) >= end:
                raise HubError(f"{self._name}: requested bytes {start} to {end - 1}, received {value!r}")
            return int(match[3])
        if response.status == 200 and (start, end) == (0, self._size):
            length = response.headers.get("Content-Length", "")
            return int(length) if length.isdecimal() else self._size
        host = urlsplit(response.url).netloc
        raise HubError(
            f"{self._name}: {host} does not serve byte ranges: it ignores Range", "add --download to fetch whole files"
        )

    def _replaced(self) -> ContainerError:
        return ContainerError(f"{self._name}: changed while it was being read", "run again, or pin it with --revision")

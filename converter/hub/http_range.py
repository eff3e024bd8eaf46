"""Reads byte ranges of a file on a hub by HTTP, with redirects, retries and checks that the file has not changed."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urljoin, urlsplit

from converter.errors import ContainerError, HubError
from converter.hub.repository import (
    RETRYABLE_STATUS,
    HttpResponse,
    HubConnectionError,
    HubResponseError,
    Repository,
    retry_wait,
    same_origin,
)

# Attempts in a row that receive no bytes.
_MAX_ATTEMPTS = 6
_MAX_REDIRECTS = 8
_ENDPOINT_HINT = "check the hub's endpoint setting"
_REDIRECT_STATUS = frozenset({301, 302, 303, 307, 308})
# Returned by a CDN for a signed URL that has expired.
_EXPIRED_STATUS = frozenset({400, 401, 403, 404, 410})


class RangeReader:
    """Reads byte ranges of one file of a repository; several threads may use it.

    `size` is the file's size in bytes; HubError if neither the hub's list nor its responses have it.
    """

    def __init__(self, repository: Repository, path: str) -> None:
        self._repository, self._path = repository, path
        self._name = f"{repository.name}/{path}"
        self._url = repository.url(path)
        # The URL that the hub redirected to. It is reused, as a redirect for each range would double the requests.
        self._cdn_url = ""
        self._etag = ""
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        listed_size = repository.files[path].size
        # -1 until a response gives it: some mirrors list no sizes.
        self.size = -1 if listed_size is None else listed_size
        if listed_size is None:
            b"".join(self.read(0, 1))

    def stop(self) -> None:
        """Make reads in other threads raise a HubError."""
        self._stopped.set()

    def read(self, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes from `start` to `end` (exclusive) as they are received.

        Raises:
            HubError: The hub refuses, or fails repeatedly.
            ContainerError: The file has been replaced.
        """
        try:
            yield from self._read(start, end)
        finally:
            # A request may have begun just before `stop`, and opened a connection after the others were closed.
            if self._stopped.is_set():
                self._repository.close()

    def _read(self, start: int, end: int) -> Iterator[bytes]:
        offset, attempt = start, 0
        while offset < end:
            attempt_start, retry_after = offset, None
            try:
                for data in self._request(offset, end, whole=start == 0 and (end == self.size or self.size < 0)):
                    yield data
                    offset += len(data)
                reason = "the connection ended early"
            except HubConnectionError as error:
                reason = str(error).partition("\n")[0] or "the connection failed"
            except HubResponseError as error:
                if error.status == 416 and self.size < 0:
                    self.size = 0
                    return
                if error.status == 416:
                    raise self._replaced_error() from None
                if error.status not in RETRYABLE_STATUS:
                    raise self._repository.to_hub_error(error, self._path) from None
                reason, retry_after = str(error), error.retry_after
            attempt = 1 if offset > attempt_start else attempt + 1
            if offset >= end:
                return
            if attempt >= _MAX_ATTEMPTS:
                raise HubError(f"{self._name}: could not be fetched in {attempt} attempts: {reason}", "try again later")
            self._stopped.wait(retry_wait(attempt, retry_after))

    def _request(self, start: int, end: int, whole: bool) -> Iterator[bytes]:
        """Yield the body of one response, which may end early. If `whole`, the response may be the whole file."""
        self._check_stopped()
        with self._response(start, end) as response:
            self._check_response(response, start, end, whole)
            position = start if response.status == 206 else 0
            # Read until the body ends, not only until `end`, so that the connection can be reused.
            for data in response.body:
                self._check_stopped()
                if position >= end:
                    return
                needed = data[max(start - position, 0) : end - position]
                position += len(data)
                if needed:
                    yield needed

    def _check_stopped(self) -> None:
        if self._stopped.is_set():
            raise HubError(f"{self._name}: the transfer was stopped")

    @contextmanager
    def _response(self, start: int, end: int) -> Iterator[HttpResponse]:
        """Request a range from the CDN, or from the hub if the CDN's URL is unknown or has expired."""
        # Offsets in a compressed body would be different ones.
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        cdn_url = self._cdn_url
        url = cdn_url or self._url
        for _ in range(_MAX_REDIRECTS):
            with self._repository.get(url, headers) as response:
                if response.status in _REDIRECT_STATUS:
                    location = response.headers.get("Location", "")
                    url = urljoin(response.url, location)
                    if not location or urlsplit(url).scheme not in ("http", "https"):
                        raise HubError(f"{self._name}: redirected to {location!r}", _ENDPOINT_HINT)
                elif response.status in _EXPIRED_STATUS and url == cdn_url:
                    url = self._url
                elif response.status >= 400:
                    raise HubResponseError.from_headers(response.status, response.headers)
                else:
                    # Only a URL on another host is the CDN's.
                    self._cdn_url = "" if same_origin(url, self._url) else url
                    yield response
                    return
        raise HubError(f"{self._name}: more than {_MAX_REDIRECTS} redirects", _ENDPOINT_HINT)

    def _check_response(self, response: HttpResponse, start: int, end: int, whole: bool) -> None:
        """Raise an error unless the response is the requested range, or the whole, of an unchanged file."""
        headers, host = response.headers, urlsplit(response.url).netloc
        if headers.get("Content-Type", "").startswith("text/html"):
            raise HubError(f"{self._name}: {host} answers with a web page", "check whether the network needs a login")
        if headers.get("Content-Encoding", "identity") != "identity":
            raise HubError(f"{self._name}: {host} compresses files", "add --download to fetch whole files")
        size = self._total_size(response, start, end, whole)
        etag, response_sha256 = headers.get("ETag", ""), headers.get("X-Linked-ETag", "").strip('"')
        with self._lock:
            self.size = size if self.size < 0 else self.size
            self._etag = self._etag or etag
            etag_matches = etag in ("", self._etag)
        # ModelScope lists a branch, which may get a new commit between the listing and the first range.
        sha256 = self._repository.files[self._path].sha256
        sha256_differs = sha256 and len(response_sha256) == len(sha256) and response_sha256 != sha256
        if size != self.size or not etag_matches or sha256_differs:
            raise self._replaced_error()

    def _total_size(self, response: HttpResponse, start: int, end: int, whole: bool) -> int:
        """Return the size of the whole file that a response gives; HubError if its range is not the requested one."""
        if response.status == 206:
            value = response.headers.get("Content-Range", "")
            match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", value)
            if match is None or int(match[1]) != start or int(match[2]) >= end:
                raise HubError(f"{self._name}: requested bytes {start} to {end - 1}, received {value!r}")
            return int(match[3])
        length = response.headers.get("Content-Length", "")
        if response.status == 200 and whole and (length.isdecimal() or self.size >= 0):
            return int(length) if length.isdecimal() else self.size
        host = urlsplit(response.url).netloc
        raise HubError(f"{self._name}: {host} does not serve byte ranges", "add --download to fetch whole files")

    def _replaced_error(self) -> ContainerError:
        return ContainerError(f"{self._name}: changed while it was being read", "run again, or pin it with --revision")

"""What the two hubs have in common: a repository at one commit, its files, and ways to their bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

import requests

from converter.errors import HubError


class Entry(NamedTuple):
    """A file of a repository: its size in bytes and its SHA-256, where the hub gives them."""

    size: int | None
    sha256: str = ""


def listed(rows: Iterable[tuple[object, object, object]]) -> dict[str, Entry]:
    """The files of a hub's listing, of which nothing is trusted: path, size and SHA-256 of each.

    Those that would leave the folder they are put into are left out: nobody means them.
    """
    files = {}
    for path, size, sha256 in rows:
        if isinstance(path, str) and path.isprintable() and not {"", ".", ".."} & set(re.split(r"[/\\]", path)):
            known = isinstance(size, int) and size >= 0
            digest = isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256)
            files[path] = Entry(size if known else None, sha256 if digest else "")  # type: ignore[arg-type]
    return files


class HubResponseError(Exception):
    """A hub's answer that is not the bytes asked for; `told` is what it says of the reason, `code` a hub's own code."""

    def __init__(self, status: int, told: str = "", code: str = "", retry_after: float | None = None) -> None:
        super().__init__(f"HTTP {status}: {told}")
        self.status, self.told, self.code, self.retry_after = status, told, code, retry_after

    @classmethod
    def of(cls, response: requests.Response) -> HubResponseError:
        """The answer in a response, whose body it does not read."""
        headers = response.headers
        after = headers.get("Retry-After", "")
        told = headers.get("X-Error-Message") or response.reason or ""
        seconds = float(after) if after.isdigit() else None
        return cls(response.status_code, told, headers.get("X-Error-Code", ""), seconds)


class Repository(Protocol):
    """A repository at one commit.

    `name` is the address without a file, hf://org/name@revision, and `commit` what the revision stood for, as far as
    the hub tells. `files` has all files by their paths, `notes` what the user should know of where they were found.
    Where the hub was not asked, `folder` is where its cache has what is wanted: it is then taken from there. `timeout`
    is seconds to wait for a connection, and for the next bytes of an answer, as the user has set them.
    """

    name: str
    commit: str
    files: dict[str, Entry]
    notes: list[str]
    folder: Path | None
    timeout: tuple[float, float]

    def cached(self, path: str) -> Path | None:
        """The file in the hub's own cache, if it is there whole."""

    def download(self, path: str) -> Path:
        """The whole file, fetched into the hub's own cache and checked against its SHA-256."""

    def open(self, path: str, headers: dict[str, str]) -> requests.Response:
        """A streamed answer from the hub, redirects followed; raises Answer or what requests raises."""

    def refused(self, answer: HubResponseError, path: str) -> HubError:
        """What an answer means, in words, with the next step."""


def ignore_netrc(session: requests.Session) -> None:
    """Have a session send the token it is given, to the host it is meant for, and nothing else.

    Left alone, requests puts what ~/.netrc has for a host in the token's place, and sends it to the host that a
    redirect leads to: a CDN refuses signed addresses that come with credentials.
    """

    def rebuild_auth(request: requests.PreparedRequest, response: requests.Response) -> None:
        if session.should_strip_auth(response.request.url, request.url):  # type: ignore[no-untyped-call]
            request.headers.pop("Authorization", None)

    # An authentication of its own keeps it from looking for another.
    session.auth = lambda request: request
    session.rebuild_auth = rebuild_auth  # type: ignore[method-assign]

"""What the two hubs have in common: a repository at one commit, its files, and ways to their bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple, Protocol

import requests

from converter.errors import HubError

# Seconds to wait for a connection, and for the next bytes of an answer.
TIMEOUT = (10, 60)


class Entry(NamedTuple):
    """A file of a repository: its size in bytes, and its SHA-256 where the hub gives one."""

    size: int
    sha256: str = ""


class Answer(Exception):  # noqa: N818 (an answer from a hub, not an error of ours)
    """A hub's answer that is not the bytes asked for; `told` is what it says of the reason, `code` a hub's own code."""

    def __init__(self, status: int, told: str = "", code: str = "", retry_after: float | None = None) -> None:
        super().__init__(f"HTTP {status}: {told}")
        self.status, self.told, self.code, self.retry_after = status, told, code, retry_after

    @classmethod
    def of(cls, response: requests.Response) -> Answer:
        """The answer in a response, whose body it does not read."""
        headers = response.headers
        after = headers.get("Retry-After", "")
        told = headers.get("X-Error-Message") or response.reason or ""
        seconds = float(after) if after.isdigit() else None
        return cls(response.status_code, told, headers.get("X-Error-Code", ""), seconds)


class Repository(Protocol):
    """A repository at one commit."""

    @property
    def name(self) -> str:
        """The address without a file: hf://org/name@revision."""

    @property
    def commit(self) -> str:
        """The commit that the revision stood for, as far as the hub tells."""

    @property
    def files(self) -> dict[str, Entry]:
        """All files by their paths."""

    def folder(self) -> Path | None:
        """Where the hub's cache has this revision, if the hub was not asked; files are then taken from there."""

    def cached(self, path: str) -> Path | None:
        """The file in the hub's own cache, if it is there whole."""

    def download(self, path: str) -> Path:
        """The whole file, fetched into the hub's own cache and checked against its SHA-256."""

    def open(self, path: str, headers: dict[str, str]) -> requests.Response:
        """A streamed answer from the hub, redirects followed; raises Answer or what requests raises."""

    def refused(self, answer: Answer, path: str) -> HubError:
        """What an answer means, in words, with the next step."""


def check_sha256(path: Path, entry: Entry, name: str) -> None:
    """HubError unless a downloaded file has the digest that its hub gives."""
    if not entry.sha256:
        return
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    if digest.hexdigest() != entry.sha256:
        raise HubError(
            f"{name}: the download in {path} does not have the SHA-256 that the hub gives\n"
            f"expected {entry.sha256}, found {digest.hexdigest()}\nremove it, then run again"
        )

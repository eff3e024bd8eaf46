"""ModelScope, through modelscope_hub: the light client that comes with modelscope, which itself would import torch."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

# Its bars cannot be turned off by a call, and fill the logs of whatever is not a terminal.
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")

from modelscope_hub import HubApi
from modelscope_hub import errors as library
from modelscope_hub.config import get_default_config
from modelscope_hub.constants import API_CONNECT_TIMEOUT, DOWNLOAD_TIMEOUT

from converter.errors import HubError, UnreachableError
from converter.hub.http_range import with_retries
from converter.hub.repository import Entry, HubResponseError, ignore_netrc, listed
from converter.storage.local_file import LocalFile, sha256_of

_KIND, _DEFAULT = "model", "master"

# It tells on stderr of its own retries; ours are told by the bar, and failures by one message.
logging.getLogger("modelscope_hub").setLevel(logging.ERROR)


class ModelScope:
    """A repository on ModelScope; see Repository."""

    def __init__(self, repository: str, revision: str | None, is_complete: Callable[[Path], bool]) -> None:
        """Raises UnreachableError where neither the hub nor its cache has it, and HubError for what the hub refuses."""
        self._id, self._asked, self._revision = repository, revision, revision or _DEFAULT
        self.name = f"ms://{repository}" + (f"@{revision}" if revision else "")
        self.timeout = (float(API_CONNECT_TIMEOUT), float(DOWNLOAD_TIMEOUT))
        self.files: dict[str, Entry] = {}
        self.notes: list[str] = []
        self.commit = ""
        self.folder: Path | None = None
        self._is_complete = is_complete
        self._api = HubApi()
        # The session that download_stream uses; another release may call it otherwise.
        ignore_netrc(getattr(self._api.legacy, "_read_session", requests.Session()))
        self._list()

    def _list(self) -> None:
        """Ask for the files; where the hub cannot be reached, go by its cache."""
        try:
            entries = with_retries(self._listing)
        except HubResponseError as answer:
            raise self.refused(answer, "") from None
        except UnreachableError as unreachable:
            self.folder = self._snapshot()
            if self.folder is None:
                raise
            # The cache does not record commits.
            self.notes.append(f"{unreachable.what}: taken from the cache, {self.folder}")
            return
        files = [entry for entry in entries if entry.get("Type") != "tree"]
        if not files:
            self._explain_emptiness()
        self.files = listed((entry.get("Path"), entry.get("Size"), entry.get("Sha256")) for entry in files)
        # No commit of the whole is given: its files' newest is it, unless a later one only removed some.
        newest = max(files, key=lambda entry: entry["CommittedDate"])
        self.commit = str(newest.get("Revision") or "")

    def _snapshot(self) -> Path | None:
        try:
            folder = Path(self._api.download_repo(self._id, _KIND, revision=self._asked, local_files_only=True))
        except library.CacheNotFound:
            return None
        return folder if self._is_complete(folder) else None

    def _listing(self) -> list[dict[str, Any]]:
        with _answers():
            found = self._api.legacy.list_repo_files(self._id, _KIND, self._revision)
            return [{**entry, "CommittedDate": int(entry.get("CommittedDate") or 0)} for entry in found]

    def _explain_emptiness(self) -> None:
        """An unknown revision is listed as one without files."""
        with _answers():
            known = [entry["Revision"] for entry in self._api.list_repo_revisions(self._id, _KIND)]
        if self._revision not in known:
            raise HubError(f"{self.name}: there is no revision {self._revision!r}", f"it has {', '.join(known)}")
        raise HubError(f"{self.name}: holds no files")

    def cached(self, path: str) -> Path | None:
        try:
            found = Path(self._api.download_file(self._id, _KIND, path, revision=self._revision, local_files_only=True))
        except library.CacheNotFound:
            return None
        # The folder is called by the branch, not by its commit: what lies there may be older than what is meant.
        size, sha256 = self.files[path]
        current = found.stat().st_size == size and (not sha256 or sha256_of(LocalFile(found)) == sha256)
        return found if current else None

    def download(self, path: str) -> Path:
        size, sha256 = self.files[path]
        try:
            return Path(
                self._api.download_file(
                    self._id, _KIND, path, revision=self._revision, expected_sha256=sha256 or None, file_size=size
                )
            )
        except library.APIError as error:
            raise self.refused(_answer(error), path) from None
        except (library.HubError, OSError) as error:
            raise HubError(f"{self.name}/{path}: could not be downloaded: {_why(error)}", "try again") from None

    def open(self, path: str, headers: dict[str, str]) -> requests.Response:
        with _answers():
            return self._api.legacy.download_stream(self._id, _KIND, path, self._revision, headers=headers)

    def refused(self, answer: HubResponseError, path: str) -> HubError:
        where = f"{self.name}/{path}" if path else self.name
        log_in = "log in with `modelscope login`, or set MODELSCOPE_API_TOKEN"
        if answer.status == 404:
            what = "file" if path else "repository"
            return HubError(
                f"{where}: there is no such {what} at ModelScope, or it is private",
                f"see whether the name is right; for a private one, {log_in}",
            )
        if answer.status in (401, 403):
            return HubError(
                f"{where}: ModelScope refuses access: {answer.told}",
                f"ask for access at {get_default_config().endpoint}/models/{self._id}, then {log_in}",
            )
        return HubError(f"{where}: ModelScope answers {answer}", "try again later")


@contextmanager
def _answers() -> Iterator[None]:
    """Its library's errors as ours: an answer of the hub, or that there was none."""
    try:
        yield
    except library.APIError as error:
        raise _answer(error) from None
    except json.JSONDecodeError:
        why = "the answer is not JSON (a captive portal or a proxy?)"
        raise UnreachableError("ModelScope cannot be reached", why) from None
    except (library.NetworkError, requests.ConnectionError, requests.Timeout) as error:
        raise UnreachableError("ModelScope cannot be reached", _why(error)) from None


def _why(error: Exception) -> str:
    return (getattr(error, "message", "") or str(error)).partition("\n")[0]


def _answer(error: library.APIError) -> HubResponseError:
    after = getattr(error, "retry_after", None)
    return HubResponseError(error.status_code or 0, error.message, retry_after=float(after) if after else None)

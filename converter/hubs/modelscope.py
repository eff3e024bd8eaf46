"""ModelScope, through modelscope_hub: the light client that comes with modelscope, which itself would import torch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import requests
from modelscope_hub import HubApi
from modelscope_hub import errors as library
from modelscope_hub.config import get_default_config

from converter.errors import HubError, UnreachableError
from converter.hubs.repository import Answer, Entry
from converter.hubs.transfer import patiently

_KIND, _DEFAULT = "model", "master"

# It tells on stderr of its own retries; ours are told by the bar, and failures by one message.
logging.getLogger("modelscope_hub").setLevel(logging.ERROR)


class ModelScope:
    """A repository on ModelScope; see Repository."""

    def __init__(self, repository: str, revision: str | None) -> None:
        """Raises UnreachableError, and HubError for what the hub refuses or does not have."""
        self._id, self._revision = repository, revision or _DEFAULT
        self.name = f"ms://{repository}" + (f"@{revision}" if revision else "")
        self._api = HubApi()
        try:
            entries = patiently(self._listing)
        except Answer as answer:
            raise self.refused(answer, "") from None
        files = [entry for entry in entries if entry.get("Type") != "tree"]
        if not files:
            self._explain_emptiness()
        self.files = {entry["Path"]: Entry(entry["Size"], entry.get("Sha256") or "") for entry in files}
        # No commit of the whole is given: its files' newest is it, unless a later one only removed some.
        newest = max(files, key=lambda entry: entry.get("CommittedDate") or 0)
        self.commit = str(newest.get("Revision") or "")

    def folder(self) -> Path | None:
        return None

    def _listing(self) -> list[dict[str, Any]]:
        with _answers():
            found: list[dict[str, Any]] = self._api.legacy.list_repo_files(self._id, _KIND, self._revision)
            return found

    def _explain_emptiness(self) -> None:
        """An unknown revision is listed as one without files."""
        with _answers():
            known = [entry["Revision"] for entry in self._api.list_repo_revisions(self._id, _KIND)]
        if self._revision not in known:
            raise HubError(f"{self.name}: there is no revision {self._revision!r}\nit has {', '.join(known)}")
        raise HubError(f"{self.name}: holds no files")

    def cached(self, path: str) -> Path | None:
        try:
            found = Path(self._api.download_file(self._id, _KIND, path, revision=self._revision, local_files_only=True))
        except library.CacheNotFound:
            return None
        # A branch's folder is not told by its commit: an older file of another size is not the one that is meant.
        return found if found.stat().st_size == self.files[path].size else None

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
            raise HubError(f"{self.name}/{path}: could not be downloaded: {error}\ntry again") from None

    def open(self, path: str, headers: dict[str, str]) -> requests.Response:
        with _answers():
            return self._api.legacy.download_stream(self._id, _KIND, path, self._revision, headers=headers)

    def refused(self, answer: Answer, path: str) -> HubError:
        where = f"{self.name}/{path}" if path else self.name
        log_in = "log in with `modelscope login`, or set MODELSCOPE_API_TOKEN"
        if answer.status == 404:
            what = "file" if path else "repository"
            return HubError(f"{where}: ModelScope has no such {what}, or it is private: {log_in}")
        if answer.status in (401, 403):
            return HubError(
                f"{where}: ModelScope refuses access: {answer.told}\n"
                f"ask for access at {get_default_config().endpoint}/models/{self._id}, then {log_in}"
            )
        return HubError(f"{where}: ModelScope answers {answer}\ntry again later")


class _answers:  # noqa: N801 (used as a context manager)
    """Its library's errors as ours: an answer of the hub, or that there was none."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, library.APIError):
            raise _answer(error) from None
        if isinstance(error, (library.NetworkError, requests.ConnectionError, requests.Timeout)):
            raise UnreachableError("ModelScope cannot be reached", str(error)) from None


def _answer(error: library.APIError) -> Answer:
    after = getattr(error, "retry_after", None)
    return Answer(error.status_code or 0, error.message, retry_after=float(after) if after else None)

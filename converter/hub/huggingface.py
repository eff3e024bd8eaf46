"""Hugging Face, through huggingface_hub."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import requests
from huggingface_hub import constants, utils
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.file_download import repo_folder_name

from converter import __version__
from converter.errors import HubError, UnreachableError
from converter.hub.http_range import with_retries
from converter.hub.repository import Entry, HubResponseError, ignore_netrc, listed
from converter.storage.local_file import LocalFile, sha256_of

_COMMIT = re.compile(r"[0-9a-f]{40}")
# Base errors of the HTTP libraries that huggingface_hub is built on: requests before 1.0, then httpx, then httpx2.
_NETWORK_ERRORS: tuple[type[Exception], ...] = tuple(
    getattr(sys.modules[module], name)
    for module, names in (
        ("requests", ["RequestException"]),
        ("httpx", ["RequestError", "InvalidURL"]),
        ("httpx2", ["RequestError", "InvalidURL"]),
    )
    if module in sys.modules
    for name in names
)
_DOWNLOAD_ERRORS: tuple[type[Exception], ...] = (OSError, *_NETWORK_ERRORS)

# It tells on stderr of its own retries; ours are told by the bar, and failures by one message.
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


class HuggingFace:
    """A repository on Hugging Face or, by HF_ENDPOINT, on a mirror of it; see Repository."""

    def __init__(self, repository: str, revision: str | None, is_complete: Callable[[Path], bool]) -> None:
        """Raises UnreachableError where neither the hub nor its cache has it, and HubError for what the hub refuses."""
        self.timeout = (float(constants.HF_HUB_ETAG_TIMEOUT), float(constants.HF_HUB_DOWNLOAD_TIMEOUT))
        self._session = requests.Session()
        ignore_netrc(self._session)
        self._is_complete = is_complete
        self._id, self._asked = repository, revision or constants.DEFAULT_REVISION
        self.name = f"hf://{repository}" + (f"@{revision}" if revision else "")
        self.files: dict[str, Entry] = {}
        self.notes: list[str] = []
        self.commit = self._commit_in_cache()
        self.folder: Path | None = None
        # A commit's files never change: what the cache has of it need not be asked for.
        if constants.HF_HUB_OFFLINE or (_COMMIT.fullmatch(self._asked) and self.commit):
            self.folder = self._snapshot()
        if constants.HF_HUB_OFFLINE and self.folder is None:
            raise HubError(
                f"{self.name}: is not in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set",
                "unset it, or download the repository first",
            )
        if self.folder is None:
            self._list()

    def _list(self) -> None:
        """Ask for commit and files; where the hub cannot be reached, go by the cache as transformers does."""
        api = huggingface_hub.HfApi()
        try:
            info = with_retries(lambda: self._asking(api))
        except HubResponseError as answer:
            raise self.refused(answer, "") from None
        except UnreachableError as unreachable:
            self.folder = self._snapshot()
            if self.folder is None:
                raise
            self.notes.append(f"{unreachable.what}: taken from the cache, commit {self.folder.name}")
            return
        # It becomes a part of paths in the cache: nothing else will do.
        self.commit = info.sha if info.sha and _COMMIT.fullmatch(info.sha) else ""
        self.files = listed(
            (file.rfilename, file.size, file.lfs.sha256 if file.lfs else "") for file in info.siblings or []
        )

    def _asking(self, api: huggingface_hub.HfApi) -> huggingface_hub.ModelInfo:
        try:
            return api.model_info(self._id, revision=self._asked, files_metadata=True, timeout=self.timeout[0])
        except HFValidationError as error:
            raise HubError(f"{self.name}: {error}") from None
        except HfHubHTTPError as error:
            raise HubResponseError.of(_response(error)) from None
        except json.JSONDecodeError:
            raise self._unreachable("the answer is not JSON (a captive portal or a proxy?)") from None
        except _NETWORK_ERRORS as error:
            raise self._unreachable(str(error)) from None

    def _unreachable(self, why: str) -> UnreachableError:
        hint = f"or try ModelScope, where names of repositories differ: --hub modelscope, or ms://{self._id}"
        return UnreachableError(f"{constants.ENDPOINT} cannot be reached", why, hint)

    def _repository_folder(self) -> Path:
        return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self._id, repo_type="model")

    def _commit_in_cache(self) -> str:
        """The commit that the cache last knew the revision to be."""
        if (self._repository_folder() / "snapshots" / self._asked).is_dir():
            return self._asked
        reference = self._repository_folder() / "refs" / self._asked
        return reference.read_text().strip() if reference.is_file() else ""

    def _snapshot(self) -> Path | None:
        folder = self._repository_folder() / "snapshots" / self.commit
        return folder if self.commit and folder.is_dir() and self._is_complete(folder) else None

    def cached(self, path: str) -> Path | None:
        found = self.commit and huggingface_hub.try_to_load_from_cache(self._id, path, revision=self.commit)
        if found and isinstance(found, str):
            return Path(found)
        # Another commit may have had the same file: the cache keeps files by their digests.
        blob = self._repository_folder() / "blobs" / self.files[path].sha256
        return blob if blob.is_file() else None

    def download(self, path: str) -> Path:
        try:
            # By the name that was asked for: asked by a commit, the cache would not know of the branch when offline.
            found = Path(huggingface_hub.hf_hub_download(self._id, path, revision=self._asked))
        except HfHubHTTPError as error:
            raise self.refused(HubResponseError.of(_response(error)), path) from None
        except _DOWNLOAD_ERRORS as error:
            why = str(error).partition("\n")[0]
            raise HubError(f"{self.name}/{path}: could not be downloaded: {why}", "try again") from None
        if self.commit and self.commit not in found.parts:
            raise HubError(f"{self.name}/{path}: changed while it was being downloaded", "run again")
        # The library checks the size alone.
        expected = self.files[path].sha256
        if expected and (digest := sha256_of(LocalFile(found))) != expected:
            # Left in the cache, it would be taken for the file by whoever looks there next.
            for damaged in (found.resolve(), found):
                with suppress(OSError):
                    damaged.unlink()
            raise HubError(
                f"{self.name}/{path}: what came does not have the SHA-256 that the hub gives, and was removed",
                f"expected {expected}, found {digest}\ntry again",
            )
        return found

    def open(self, path: str, headers: dict[str, str]) -> requests.Response:
        url = huggingface_hub.hf_hub_url(self._id, path, revision=self.commit or self._asked)
        own = utils.build_hf_headers(  # type: ignore[attr-defined]
            library_name="dsocr-convert", library_version=__version__
        )
        # requests drops the token where the hub sends us to another host.
        return self._session.get(url, headers={**own, **headers}, stream=True, timeout=self.timeout)

    def refused(self, answer: HubResponseError, path: str) -> HubError:
        where = f"{self.name}/{path}" if path else self.name
        page, has_token = f"{constants.ENDPOINT}/{self._id}", huggingface_hub.get_token() is not None
        log_in = "log in with `hf auth login`, or set HF_TOKEN"
        if answer.status == 401 and "Invalid credentials" in answer.told:
            return HubError(f"{where}: your token is not valid at {constants.ENDPOINT}", f"{log_in}")
        if answer.code == "GatedRepo":
            step = "" if has_token else f", then {log_in}"
            return HubError(
                f"{where}: is gated, and you have no access to it", f"accept its conditions at {page}{step}"
            )
        if answer.code == "RevisionNotFound":
            return HubError(f"{where}: there is no revision {self._asked!r}", f"its branches and tags are at {page}")
        if answer.code == "EntryNotFound":
            return HubError(
                f"{where}: there is no such file", f"its files are at {page}/tree/{self.commit or self._asked}"
            )
        if answer.code == "RepoNotFound" or answer.status in (401, 404):
            hidden = "is private and not shown to your token" if has_token else "is private"
            step = "see whether the name is right" + ("" if has_token else f"; for a private one, {log_in}")
            return HubError(f"{where}: there is no such repository at {constants.ENDPOINT}, or it {hidden}", f"{step}")
        if answer.status == 403:
            return HubError(f"{where}: access is refused: {answer.told}", f"see {page}")
        return HubError(f"{where}: {constants.ENDPOINT} answers {answer}", "try again later")


def _response(error: HfHubHTTPError) -> Any:
    """The response behind an error: requests' or httpx's, by the library's version; both have what is read of it."""
    response: Any = error.response
    if not hasattr(response, "reason"):
        response.reason = getattr(response, "reason_phrase", "")
    return response

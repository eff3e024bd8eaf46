"""Hugging Face, with the HTTP client, the cache and the settings of huggingface_hub."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import huggingface_hub
import requests
from huggingface_hub import constants, errors, utils

from converter import __version__
from converter.errors import HubError, UnreachableError
from converter.hub import requests_http
from converter.hub.http_range import with_retries
from converter.hub.repository import (
    HttpResponse,
    HubConnectionError,
    HubResponseError,
    RepositoryFile,
    is_intact,
    parse_file_list,
    same_origin,
)

_COMMIT = re.compile(r"[0-9a-f]{40}")
# Network errors of the HTTP library that huggingface_hub uses: requests before 1.0, then httpx, then httpx2.
_NETWORK_ERRORS: tuple[type[Exception], ...] = (
    requests.RequestException,
    *(
        getattr(sys.modules[library], name)
        for library in ("httpx", "httpx2")
        if library in sys.modules
        for name in ("RequestError", "InvalidURL")
    ),
)
_DOWNLOAD_ERRORS: tuple[type[Exception], ...] = (OSError, *_NETWORK_ERRORS)
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


class HuggingFaceRepository:
    """A Repository on Hugging Face, or on the mirror that HF_ENDPOINT names; the arguments are `open_repository`'s."""

    def __init__(self, repository: str, revision: str | None, is_complete: Callable[[Path], bool]) -> None:
        self._id, self._revision, self._is_complete = repository, revision or constants.DEFAULT_REVISION, is_complete
        self.name = f"hf://{repository}" + (f"@{revision}" if revision else "")
        self.files: dict[str, RepositoryFile] = {}
        self.notes: list[str] = []
        self.commit = ""
        self.cached_snapshot: Path | None = None
        try:
            utils.validate_repo_id(repository)  # type: ignore[attr-defined]
        except errors.HFValidationError as error:
            raise HubError(f"{self.name}: {error}") from None
        # A commit never changes, so that its files can be taken from the cache without a request.
        if constants.HF_HUB_OFFLINE or _COMMIT.fullmatch(self._revision):
            self._use_cached_snapshot()
        if constants.HF_HUB_OFFLINE and self.cached_snapshot is None:
            raise HubError(
                f"{self.name}: is not in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set",
                "unset HF_HUB_OFFLINE, or download the repository first",
            )
        if self.cached_snapshot is None:
            self._list_files()

    def _use_cached_snapshot(self) -> bool:
        """Use the cache's snapshot of the revision; return whether it has the requested files."""
        try:
            folder = huggingface_hub.snapshot_download(self._id, revision=self._revision, local_files_only=True)
        except errors.LocalEntryNotFoundError as error:
            # An incomplete snapshot may have the requested files.
            folder = getattr(error, "snapshot_path", "")
        if not folder or not self._is_complete(Path(folder)):
            return False
        self.cached_snapshot = Path(folder)
        self.commit = self.cached_snapshot.name
        return True

    def _list_files(self) -> None:
        """Request the commit and the file list; if the hub cannot be reached, use the cache as transformers does."""
        try:
            info = with_retries(self._request_info)
        except HubResponseError as error:
            raise self.to_hub_error(error, "") from None
        except HubConnectionError as error:
            problem = f"{constants.ENDPOINT} cannot be reached"
            if not self._use_cached_snapshot():
                hint = f"or try ModelScope, where names of repositories differ: --hub modelscope, or ms://{self._id}"
                raise UnreachableError(problem, str(error), hint) from None
            self.notes.append(f"{problem}: taken from the cache, commit {self.commit}")
            return
        # Validated because it becomes a part of paths in the cache.
        self.commit = info.sha if info.sha and _COMMIT.fullmatch(info.sha) else ""
        self.files = parse_file_list(
            (file.rfilename, file.size, file.lfs.sha256 if file.lfs else "") for file in info.siblings or []
        )

    def _request_info(self) -> huggingface_hub.ModelInfo:
        timeout = float(constants.HF_HUB_ETAG_TIMEOUT)
        try:
            return huggingface_hub.HfApi().model_info(
                self._id, revision=self._revision, files_metadata=True, timeout=timeout
            )
        except errors.HfHubHTTPError as error:
            raise _response_error(error) from None
        except json.JSONDecodeError:
            raise HubConnectionError("the answer is not JSON (a captive portal or a proxy?)") from None
        except _NETWORK_ERRORS as error:
            raise HubConnectionError(str(error)) from None

    def cached_file(self, path: str) -> Path | None:
        # The cache may have an older commit of the revision, whose file is used if it is unchanged.
        for revision in filter(None, (self.commit, self._revision)):
            file = huggingface_hub.try_to_load_from_cache(self._id, path, revision=revision)
            if isinstance(file, str) and (revision == self.commit or is_intact(Path(file), self.files[path])):
                return Path(file)
        return None

    def download(self, path: str) -> Path:
        where = f"{self.name}/{path}"
        try:
            # With the revision, not the commit, so that the cache finds the branch when offline.
            file = Path(huggingface_hub.hf_hub_download(self._id, path, revision=self._revision))
        except errors.HfHubHTTPError as error:
            raise self.to_hub_error(_response_error(error), path) from None
        except _DOWNLOAD_ERRORS as error:
            reason = str(error).partition("\n")[0]
            raise HubError(f"{where}: could not be downloaded: {reason}", "try again") from None
        if self.commit and self.commit not in file.parts:
            raise HubError(f"{where}: changed while it was being downloaded", "run again")
        # huggingface_hub itself checks only the size.
        if self.files[path].sha256 and not is_intact(file, self.files[path]):
            # Otherwise other programs would use the damaged file from the cache.
            for damaged in (file.resolve(), file):
                with suppress(OSError):
                    damaged.unlink()
            expected = f"the hub's SHA-256, {self.files[path].sha256}"
            raise HubError(f"{where}: the download does not match {expected}, and was removed", "try again")
        return file

    def url(self, path: str) -> str:
        return huggingface_hub.hf_hub_url(self._id, path, revision=self.commit or self._revision)

    @contextmanager
    def get(self, url: str, headers: dict[str, str]) -> Iterator[HttpResponse]:
        if same_origin(url, constants.ENDPOINT):
            hub_headers = utils.build_hf_headers(  # type: ignore[attr-defined]
                library_name="dsocr-convert", library_version=__version__
            )
            headers = {**hub_headers, **headers}
        # This is the client that the user may have configured.
        session, timeout = huggingface_hub.get_session(), float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
        if isinstance(session, requests.Session):
            with requests_http.stream(session, url, headers, (timeout, timeout)) as response:
                yield response
            return
        try:
            with session.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=False) as response:
                yield HttpResponse(url, response.status_code, response.headers, response.iter_raw())
        except _NETWORK_ERRORS as error:
            raise HubConnectionError(str(error)) from None

    def close(self) -> None:
        """Do nothing, as all users of huggingface_hub share the client."""

    def to_hub_error(self, error: HubResponseError, path: str) -> HubError:
        where = f"{self.name}/{path}" if path else self.name
        page, has_token = f"{constants.ENDPOINT}/{self._id}", huggingface_hub.get_token() is not None
        if error.status == 401 and "Invalid credentials" in error.message:
            return HubError(f"{where}: your token is not valid at {constants.ENDPOINT}", _LOG_IN)
        if error.code == "GatedRepo":
            step = "" if has_token else f", then {_LOG_IN}"
            return HubError(
                f"{where}: is gated, and you have no access to it", f"accept its conditions at {page}{step}"
            )
        if error.code == "RevisionNotFound":
            return HubError(f"{where}: there is no revision {self._revision!r}", f"its branches and tags are at {page}")
        if error.code == "EntryNotFound":
            return HubError(
                f"{where}: there is no such file", f"its files are at {page}/tree/{self.commit or self._revision}"
            )
        if error.code == "RepoNotFound" or error.status in (401, 404):
            or_private = "is private and not visible to your token" if has_token else "is private"
            step = "check the name" + ("" if has_token else f"; for a private one, {_LOG_IN}")
            return HubError(f"{where}: there is no such repository at {constants.ENDPOINT}, or it {or_private}", step)
        if error.status == 403:
            return HubError(f"{where}: access is refused: {error.message}", f"see {page}")
        return HubError(f"{where}: {constants.ENDPOINT} returned {error}", "try again later")


def _response_error(error: errors.HfHubHTTPError) -> HubResponseError:
    return HubResponseError.from_headers(error.response.status_code, error.response.headers)

"""Hugging Face, with the HTTP client, the cache and the settings of huggingface_hub."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import requests
from huggingface_hub import constants, errors, utils

from converter import __version__
from converter.errors import HubError
from converter.hub.repository import (
    HttpResponse,
    HubConnectionError,
    HubResponseError,
    Repository,
    get_with_requests,
    is_intact,
    parse_file_list,
    same_origin,
)

_COMMIT = re.compile(r"[0-9a-f]{40}")
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
# Problem and next step for Hugging Face's error codes.
_REFUSALS = {
    "GatedRepo": ("is gated, and you have no access to it", "accept its conditions at {page}{then_log_in}"),
    "RevisionNotFound": ("there is no revision {revision!r}", "its branches and tags are at {page}"),
    "EntryNotFound": ("there is no such file", "its files are at {page}/tree/{commit}"),
    "RepoNotFound": (
        "there is no such repository at {endpoint}, or it is private{not_visible}",
        "check the name{or_log_in}",
    ),
    "InvalidCredentials": ("your token is not valid at {endpoint}", _LOG_IN),
    "Forbidden": ("access is refused: {error.message}", "see {page}"),
    "": ("{endpoint} returned {error}", "try again later"),
}


class HuggingFaceRepository(Repository):
    """A Repository on Hugging Face, or on the mirror that HF_ENDPOINT names; the arguments are `open_repository`'s."""

    response_errors = (errors.HfHubHTTPError,)
    # Those of the HTTP library that huggingface_hub uses: requests before 1.0, then httpx, then httpx2.
    network_errors = (
        requests.RequestException,
        *(
            getattr(sys.modules[library], name)
            for library in ("httpx", "httpx2")
            if library in sys.modules
            for name in ("RequestError", "InvalidURL")
        ),
    )

    def __init__(self, repository: str, revision: str | None, is_complete: Callable[[Path], bool]) -> None:
        name = f"hf://{repository}" + (f"@{revision}" if revision else "")
        super().__init__(name, constants.ENDPOINT, is_complete)
        other = f"--hub modelscope, or ms://{repository}"
        self.other_hub = f"\nor try ModelScope, where names of repositories differ: {other}"
        self._id, self._revision = repository, revision or constants.DEFAULT_REVISION
        try:
            utils.validate_repo_id(repository)  # type: ignore[attr-defined]
        except errors.HFValidationError as error:
            raise HubError(f"{self.name}: {error}") from None
        # A commit never changes, so that its files can be taken from the cache without a request.
        if (constants.HF_HUB_OFFLINE or _COMMIT.fullmatch(self._revision)) and self._use_cached_snapshot():
            return
        if constants.HF_HUB_OFFLINE:
            raise HubError(
                f"{self.name}: is not in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set",
                "unset HF_HUB_OFFLINE, or download the repository first",
            )
        self.list_files()

    def _find_snapshot(self) -> Path | None:
        try:
            folder = huggingface_hub.snapshot_download(self._id, revision=self._revision, local_files_only=True)
        except errors.LocalEntryNotFoundError as error:
            # An incomplete snapshot may have the requested files.
            folder = getattr(error, "snapshot_path", None) or ""
        self.commit = Path(folder).name
        return Path(folder) if folder else None

    def _list_files(self) -> None:
        info = self._request(
            lambda: huggingface_hub.HfApi().model_info(
                self._id, revision=self._revision, files_metadata=True, timeout=float(constants.HF_HUB_ETAG_TIMEOUT)
            )
        )
        # Validated because it becomes a part of paths in the cache.
        self.commit = info.sha if info.sha and _COMMIT.fullmatch(info.sha) else ""
        self.files = parse_file_list(
            (file.rfilename, file.size, file.lfs.sha256 if file.lfs else "") for file in info.siblings or []
        )

    def cached_file(self, path: str) -> Path | None:
        # The cache may have an older commit of the revision, whose file is used if it is unchanged.
        for revision in filter(None, (self.commit, self._revision)):
            file = huggingface_hub.try_to_load_from_cache(self._id, path, revision=revision)
            if isinstance(file, str) and (revision == self.commit or is_intact(Path(file), self.files[path])):
                return Path(file)
        return None

    def _download(self, path: str) -> Path:
        # With the revision, not the commit, so that the cache finds the branch when offline.
        file = Path(huggingface_hub.hf_hub_download(self._id, path, revision=self._revision))
        if self.commit and self.commit not in file.parts:
            raise HubError(f"{self.name}/{path}: changed while it was being downloaded", "run again")
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
            with get_with_requests(session, url, headers, timeout=timeout) as response:
                yield response
            return
        with (
            self._translated_errors(),
            session.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=False) as response,
        ):
            yield HttpResponse(url, response.status_code, response.headers, response.iter_raw())

    def close(self) -> None:
        """Do nothing, as all users of huggingface_hub share the client."""

    def _response_error(self, error: errors.HfHubHTTPError) -> Exception:
        # Without a response: a download for which the hub could not be reached, in versions before 1.0.
        if error.response is None:
            return HubConnectionError(str(error))
        return HubResponseError.from_headers(error.response.status_code, error.response.headers)

    def to_hub_error(self, error: HubResponseError, path: str) -> HubError:
        code = error.code if error.code in _REFUSALS else {404: "RepoNotFound", 403: "Forbidden"}.get(error.status, "")
        if error.status == 401:
            code = "InvalidCredentials" if "Invalid credentials" in error.message else code or "RepoNotFound"
        has_token = huggingface_hub.get_token() is not None
        values = {
            "endpoint": constants.ENDPOINT,
            "page": f"{constants.ENDPOINT}/{self._id}",
            "revision": self._revision,
            "commit": self.commit or self._revision,
            "error": error,
            "not_visible": " and not visible to your token" if has_token else "",
            "then_log_in": "" if has_token else f", then {_LOG_IN}",
            "or_log_in": "" if has_token else f"; for a private one, {_LOG_IN}",
        }
        problem, step = (text.format(**values) for text in _REFUSALS[code])
        return HubError(f"{self.name}/{path}".rstrip("/") + f": {problem}", step)

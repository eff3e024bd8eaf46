"""ModelScope, with its client library modelscope_hub, which does not import torch as modelscope does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

import requests
from modelscope_hub import HubApi, get_default_config
from modelscope_hub import errors as library
from modelscope_hub.constants import API_CONNECT_TIMEOUT, DOWNLOAD_TIMEOUT

from converter.errors import HubError
from converter.hub.repository import (
    HttpResponse,
    HubResponseError,
    Repository,
    get_with_requests,
    is_intact,
    parse_file_list,
    same_origin,
)

_MODEL = "model"
_MAX_LISTING_SIZE = 32 << 20  # bytes
_LOG_IN = "log in with `modelscope login`, or set MODELSCOPE_API_TOKEN"


class ModelScopeRepository(Repository):
    """A Repository on ModelScope; the arguments are `open_repository`'s."""

    response_errors = (library.APIError,)
    network_errors = (library.NetworkError, library.StorageError, library.FileIntegrityError, requests.RequestException)

    def __init__(self, repository: str, revision: str | None, is_complete: Callable[[Path], bool]) -> None:
        name = f"ms://{repository}" + (f"@{revision}" if revision else "")
        super().__init__(name, str(get_default_config().endpoint), is_complete)
        self._id, self._revision = repository, revision or "master"
        self._api, self._session = HubApi(), requests.Session()
        self.list_files()

    def _list_files(self) -> None:
        listed = self._request(lambda: self._api.list_repo_files(self._id, _MODEL, revision=self._revision))
        files = [file for file in listed if not file.is_dir]
        if not files:
            # ModelScope returns an empty list for an unknown revision.
            found = self._request(lambda: self._api.list_repo_revisions(self._id, _MODEL))
            revisions = [revision["Revision"] for revision in found]
            if self._revision not in revisions:
                message = f"{self.name}: there is no revision {self._revision!r}"
                raise HubError(message, f"it has {', '.join(revisions)}")
            raise HubError(f"{self.name}: holds no files")
        # The client gives a size of 0 for a file whose size the hub does not list.
        self.files = parse_file_list((file.path, file.size or None, file.sha256) for file in files)
        self.commit = self._request(self._request_commit)

    def _request_commit(self) -> str:
        """Return the commit of the newest file, as ModelScope gives no commit of the repository."""
        query = urlencode({"Revision": self._revision, "Recursive": "True"})
        body = bytearray()
        with self.get(f"{self._api_url}/repo/files?{query}", {}) as response:
            for data in response.body:
                body += data
                if len(body) > _MAX_LISTING_SIZE:
                    return ""
        if response.status != 200:
            raise HubResponseError.from_headers(response.status, response.headers)
        try:
            newest = max(json.loads(body)["Data"]["Files"], key=lambda file: int(file.get("CommittedDate") or 0))
            return str(newest.get("Revision") or "")
        except (LookupError, ValueError, TypeError, AttributeError):
            # An answer of another form, which is not needed for anything else.
            return ""

    def _find_snapshot(self) -> Path | None:
        # The cache does not record commits.
        try:
            return self._api.download_repo(self._id, _MODEL, revision=self._revision, local_files_only=True)
        except library.CacheNotFound:
            return None

    def cached_file(self, path: str) -> Path | None:
        try:
            file = self._api.download_file(self._id, _MODEL, path, revision=self._revision, local_files_only=True)
        except library.CacheNotFound:
            return None
        # The cache is by branch, not by commit, so that the file may be an older one.
        return file if is_intact(file, self.files[path]) else None

    def _download(self, path: str) -> Path:
        return self._api.download_file(self._id, _MODEL, path, revision=self._revision, file_size=self.files[path].size)

    @property
    def _api_url(self) -> str:
        return f"{self._endpoint}/api/v1/models/{self._id}"

    def url(self, path: str) -> str:
        return f"{self._api_url}/repo?{urlencode({'Revision': self._revision, 'FilePath': path})}"

    @contextmanager
    def get(self, url: str, headers: dict[str, str]) -> Iterator[HttpResponse]:
        cookies = self._api.get_cookies() if same_origin(url, self._endpoint) else None
        timeout = (float(API_CONNECT_TIMEOUT), float(DOWNLOAD_TIMEOUT))
        with get_with_requests(self._session, url, headers, timeout=timeout, cookies=cookies) as response:
            yield response

    def close(self) -> None:
        self._session.close()

    def _response_error(self, error: library.APIError) -> Exception:
        after = getattr(error, "retry_after", None)
        return HubResponseError(error.status_code or 0, error.message, retry_after=float(after) if after else None)

    def to_hub_error(self, error: HubResponseError, path: str) -> HubError:
        where = f"{self.name}/{path}" if path else self.name
        if error.status == 404:
            what = "file" if path else "repository"
            return HubError(
                f"{where}: there is no such {what} at ModelScope, or it is private",
                f"check the name; for a private one, {_LOG_IN}",
            )
        if error.status in (401, 403):
            return HubError(
                f"{where}: ModelScope refuses access: {error.message}",
                f"ask for access at {self._endpoint}/models/{self._id}, then {_LOG_IN}",
            )
        return HubError(f"{where}: ModelScope returned {error}", "try again later")

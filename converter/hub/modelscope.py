"""ModelScope, with its client library modelscope_hub, which does not import torch as modelscope does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

import requests
from modelscope_hub import FileInfo, HubApi, get_default_config
from modelscope_hub import errors as library
from modelscope_hub.constants import API_CONNECT_TIMEOUT, DOWNLOAD_TIMEOUT

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

_MODEL = "model"
_MAX_LISTING_SIZE = 32 << 20  # bytes
_LOG_IN = "log in with `modelscope login`, or set MODELSCOPE_API_TOKEN"


class ModelScopeRepository:
    """A Repository on ModelScope; the arguments are `open_repository`'s."""

    def __init__(self, repository: str, revision: str | None, is_complete: Callable[[Path], bool]) -> None:
        self._id, self._revision = repository, revision or "master"
        self.name = f"ms://{repository}" + (f"@{revision}" if revision else "")
        self.notes: list[str] = []
        self.commit = ""
        self.cached_snapshot: Path | None = None
        self.files: dict[str, RepositoryFile] = {}
        self._endpoint = str(get_default_config().endpoint)
        self._api, self._session = HubApi(), requests.Session()
        try:
            self._list_files()
        except HubResponseError as error:
            raise self.to_hub_error(error, "") from None
        except HubConnectionError as error:
            problem = "ModelScope cannot be reached"
            self.cached_snapshot = self._find_cached_snapshot(revision, is_complete)
            if self.cached_snapshot is None:
                raise UnreachableError(problem, str(error)) from None
            # The cache does not record commits.
            self.notes.append(f"{problem}: taken from the cache, {self.cached_snapshot}")

    def _list_files(self) -> None:
        files = [file for file in with_retries(self._request_files) if not file.is_dir]
        if not files:
            # ModelScope returns an empty list for an unknown revision.
            with _translated_errors():
                revisions = [revision["Revision"] for revision in self._api.list_repo_revisions(self._id, _MODEL)]
            if self._revision not in revisions:
                raise HubError(
                    f"{self.name}: there is no revision {self._revision!r}", f"it has {', '.join(revisions)}"
                )
            raise HubError(f"{self.name}: holds no files")
        self.files = parse_file_list((file.path, file.size, file.sha256) for file in files)
        self.commit = with_retries(self._request_commit)

    def _request_files(self) -> list[FileInfo]:
        with _translated_errors():
            return self._api.list_repo_files(self._id, _MODEL, revision=self._revision)

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
        newest = max(json.loads(body)["Data"]["Files"], key=lambda file: int(file.get("CommittedDate") or 0))
        return str(newest.get("Revision") or "")

    def _find_cached_snapshot(self, revision: str | None, is_complete: Callable[[Path], bool]) -> Path | None:
        try:
            folder = self._api.download_repo(self._id, _MODEL, revision=revision, local_files_only=True)
        except library.CacheNotFound:
            return None
        return folder if is_complete(folder) else None

    def cached_file(self, path: str) -> Path | None:
        try:
            file = self._api.download_file(self._id, _MODEL, path, revision=self._revision, local_files_only=True)
        except library.CacheNotFound:
            return None
        # The cache is by branch, not by commit, so that the file may be an older one.
        return file if is_intact(file, self.files[path]) else None

    def download(self, path: str) -> Path:
        size, sha256 = self.files[path]
        try:
            return self._api.download_file(
                self._id, _MODEL, path, revision=self._revision, expected_sha256=sha256 or None, file_size=size
            )
        except library.APIError as error:
            raise self.to_hub_error(_response_error(error), path) from None
        except (library.HubError, requests.RequestException, OSError) as error:
            raise HubError(f"{self.name}/{path}: could not be downloaded: {_first_line(error)}", "try again") from None

    @property
    def _api_url(self) -> str:
        return f"{self._endpoint}/api/v1/models/{self._id}"

    def url(self, path: str) -> str:
        return f"{self._api_url}/repo?{urlencode({'Revision': self._revision, 'FilePath': path})}"

    @contextmanager
    def get(self, url: str, headers: dict[str, str]) -> Iterator[HttpResponse]:
        cookies = self._api.get_cookies() if same_origin(url, self._endpoint) else None
        timeout = (float(API_CONNECT_TIMEOUT), float(DOWNLOAD_TIMEOUT))
        with requests_http.stream(self._session, url, headers, timeout, cookies) as response:
            yield response

    def close(self) -> None:
        self._session.close()

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


@contextmanager
def _translated_errors() -> Iterator[None]:
    """Raise the client's errors as HubResponseError or HubConnectionError."""
    try:
        yield
    except library.APIError as error:
        raise _response_error(error) from None
    except (json.JSONDecodeError, requests.exceptions.JSONDecodeError):
        raise HubConnectionError("the answer is not JSON (a captive portal or a proxy?)") from None
    except (library.NetworkError, requests.RequestException) as error:
        raise HubConnectionError(_first_line(error)) from None


def _response_error(error: library.APIError) -> HubResponseError:
    after = getattr(error, "retry_after", None)
    return HubResponseError(error.status_code or 0, error.message, retry_after=float(after) if after else None)


def _first_line(error: Exception) -> str:
    return (getattr(error, "message", "") or str(error)).partition("\n")[0]

"""The hubs' own clients, unmodified, against the server that the tests of remote sources rely on."""

from __future__ import annotations

import hashlib
import http.client
import importlib.metadata
import io
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from command import inside
from hubserver import Faults, HubServer, Repo, environment, hub_server

OLD_HUB = importlib.metadata.version("huggingface_hub") < "1"
WEIGHTS = b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(20_000))
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
CONFIG = b'{"hidden_size": 768}'
FILES = {"config.json": CONFIG, "model.safetensors": WEIGHTS, "sub dir/vocab.json": b"{}"}


def client(server: HubServer, folder: Path, script: str, **extra: str) -> Any:
    """What `script` leaves in `result`, run with the hubs' libraries led to `server`."""
    names: dict[str, Any] = {}
    with inside(folder, {**environment(server, folder), **extra}), redirect_stdout(io.StringIO()):
        exec(script, names)
    return json.loads(json.dumps(names["result"]))


def get(url: str, headers: dict[str, str], method: str = "GET") -> tuple[int, bytes, http.client.HTTPMessage]:
    """Status, body and headers, without following a redirect; the body is what came of it before a drop."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=5)
    try:
        connection.request(method, url.removeprefix(f"http://{parts.netloc}"), headers=headers)
        response = connection.getresponse()
        try:
            return response.status, response.read(), response.headers
        except http.client.IncompleteRead as error:
            return response.status, error.partial, response.headers
    finally:
        connection.close()


def location(server: HubServer) -> str:
    """A signed URL of the CDN for the weights."""
    return get(f"{server.hf_endpoint}/org/name/resolve/main/model.safetensors", {})[2]["Location"]


def test_hugging_face(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    repos = [Repo("org/name", FILES), Repo("org/gated", FILES, gated=True, token="good")]
    repos.append(Repo("org/private", FILES, private=True, token="good"))
    script = """
from huggingface_hub import HfApi, hf_hub_download
info = HfApi().model_info("org/name", files_metadata=True)
entries = HfApi().get_paths_info("org/name", ["config.json", "model.safetensors"])
tree = [entry.path for entry in HfApi().list_repo_tree("org/name", recursive=True)]
paths = [hf_hub_download("org/name", sibling.rfilename) for sibling in info.siblings]
def error(repo, token=False, **more):
    try:
        hf_hub_download(repo, **{"filename": "model.safetensors", **more}, token=token)
    except Exception as error:
        return type(error).__name__, error.response.status_code
result = {
    "sha": info.sha,
    "sizes": [sibling.size for sibling in info.siblings],
    "digests": [sibling.lfs and sibling.lfs.sha256 for sibling in info.siblings],
    "blobs": [info.siblings[0].blob_id, entries[0].blob_id],
    "tree": tree,
    "paths": paths,
    "errors": [
        error("org/missing"), error("org/gated"), error("org/gated", "bad"), error("org/gated", "good"),
        error("org/private", "bad"), error("org/private", "good"),
        error("org/name", filename="nothing"), error("org/name", revision="nothing"),
    ],
}
"""
    with hub_server(repos) as server:
        result = client(server, tmp_path, script)
        assert result["sha"] == repos[0].commit
        assert result["sizes"] == [len(data) for data in FILES.values()]
        assert result["digests"] == [None, SHA256, None]
        assert set(result["blobs"]) == {hashlib.sha1(b"blob %d\0" % len(CONFIG) + CONFIG).hexdigest()}
        assert result["tree"] == list(FILES)
        assert [Path(path).read_bytes() for path in result["paths"]] == list(FILES.values())
        assert result["errors"] == [
            ["RepositoryNotFoundError", 401],
            ["GatedRepoError", 401],
            ["GatedRepoError", 403],
            None,
            ["RepositoryNotFoundError", 404],
            None,
            ["EntryNotFoundError" if OLD_HUB else "RemoteEntryNotFoundError", 404],
            ["RevisionNotFoundError", 404],
        ]
        on_cdn = [request for request in server.requests if request.host == "cdn"]
        assert on_cdn and all(request.status == 200 and request.token is None for request in on_cdn)
        before = len(server.requests)
        offline = (
            'from huggingface_hub import hf_hub_download\nresult = hf_hub_download("org/name", "model.safetensors")'
        )
        assert client(server, tmp_path, offline, HF_HUB_OFFLINE="1") == result["paths"][1]
        assert len(server.requests) == before


def test_modelscope(tmp_path: Path) -> None:
    pytest.importorskip("modelscope_hub")
    repos = [Repo("org/name", FILES), Repo("org/gated", FILES, gated=True, token="good")]
    script = """
from modelscope_hub import HubApi
api = HubApi()
files = api.list_repo_files("org/name", "model")
paths = [str(api.download_file("org/name", "model", file.path, expected_sha256=file.sha256)) for file in files]
part = api.legacy.download_stream("org/name", "model", "model.safetensors", headers={"Range": "bytes=5-9"})
def error(repo, file, token=""):
    try:
        HubApi(token=token).download_file(repo, "model", file)
    except Exception as error:
        return type(error).__name__, error.status_code
result = {
    "files": [(file.path, file.size, file.sha256) for file in files],
    "commits": [file["Revision"] for file in api.legacy.list_repo_files("org/name", "model")],
    "paths": paths,
    "part": [part.status_code, part.content.hex()],
    "unknown": api.list_repo_files("org/name", "model", revision="nothing"),
    "revisions": api.list_repo_revisions("org/name", "model"),
    "exists": [api.repo_exists("org/name", "model"), api.repo_exists("org/missing", "model")],
    "errors": [
        error("org/missing", "x"), error("org/name", "x"),
        error("org/gated", "model.safetensors"), error("org/gated", "model.safetensors", "good"),
    ],
}
"""
    with hub_server(repos) as server:
        result = client(server, tmp_path, script)
        digests = [hashlib.sha256(data).hexdigest() for data in FILES.values()]
        assert result["files"] == [[name, len(FILES[name]), sha] for name, sha in zip(FILES, digests, strict=True)]
        assert set(result["commits"]) == {repos[0].commit}
        assert [Path(path).read_bytes() for path in result["paths"]] == list(FILES.values())
        assert result["part"] == [206, WEIGHTS[5:10].hex()]
        assert (result["unknown"], result["revisions"]) == ([], [{"Revision": "master"}])
        assert result["exists"] == [True, False]
        assert result["errors"] == [
            ["NotExistError", 404],
            ["NotExistError", 404],
            ["PermissionDeniedError", 403],
            None,
        ]
        assert {request.token for request in server.requests if request.host == "cdn"} == {None}


@pytest.mark.parametrize("hub", ["huggingface_hub", "modelscope_hub"])
def test_clients_survive_drops(tmp_path: Path, hub: str) -> None:
    pytest.importorskip(hub)
    if hub == "huggingface_hub" and OLD_HUB:
        pytest.skip("before 1.0 it gave up when a connection broke")
    script = {
        "huggingface_hub": "from huggingface_hub import hf_hub_download as get\nresult = get('org/name', '{}')",
        "modelscope_hub": "from modelscope_hub import HubApi\n"
        "result = str(HubApi().download_file('org/name', 'model', '{}'))",
    }[hub].format("model.safetensors")
    with hub_server([Repo("org/name", FILES)]) as server:
        server.count("bodies")
        server.faults = Faults(drop_every=2)
        assert Path(client(server, tmp_path, script)).read_bytes() == WEIGHTS
        assert sum(request.host == "cdn" for request in server.requests) == 2


def test_ranges_in_parallel_with_drops() -> None:
    def fetch(url: str, first: int, end: int) -> bytes:
        data = b""
        while len(data) < end - first:
            status, more, _ = get(url, {"Range": f"bytes={first + len(data)}-{end - 1}"})
            assert status == 206
            data += more
        return data

    with hub_server([Repo("org/name", FILES)], Faults(drop_every=10)) as server:
        url, step = location(server), 10_000
        with ThreadPoolExecutor(8) as pool:
            firsts = range(0, len(WEIGHTS), step)
            segments = pool.map(lambda first: fetch(url, first, min(first + step, len(WEIGHTS))), firsts)
            assert b"".join(segments) == WEIGHTS
        assert server.sent == len(WEIGHTS)
        assert sum(request.host == "cdn" for request in server.requests) > len(firsts)


def test_ranges() -> None:
    size = len(WEIGHTS)
    with hub_server([Repo("org/name", FILES)]) as server:
        url = location(server)
        for asked, expected in (("0-0", WEIGHTS[:1]), ("-7", WEIGHTS[-7:]), ("639990-9999999", WEIGHTS[639_990:])):
            status, body, headers = get(url, {"Range": f"bytes={asked}"})
            assert (status, body, headers["ETag"]) == (206, expected, f'"{SHA256}"')
            assert headers["Content-Range"].endswith(f"/{size}")
        status, body, headers = get(url, {"Range": f"bytes={size}-"})
        assert (status, body, headers["Content-Range"]) == (416, b"", f"bytes */{size}")
        assert get(url, {"Range": "bytes=0-1", "If-Range": '"other"'})[:2] == (200, WEIGHTS)
        assert get(url, {"Authorization": "Bearer x"})[0] == 400
        assert get(url.replace("Signature=", "Signature=0"), {})[0] == 403


def test_faults() -> None:
    half = len(WEIGHTS) // 2
    repo = Repo("org/name", FILES)
    with hub_server([repo]) as server:
        url = location(server)

        def answers(faults: Faults, count: int, method: str = "GET") -> list[tuple[int, int]]:
            server.faults = faults
            replies = [get(url, {"Range": "bytes=0-"}, method) for _ in range(count)]
            return [(status, len(body)) for status, body, _ in replies]

        whole = (206, len(WEIGHTS))
        assert answers(Faults(busy=1, limited=2), 4) == [(503, 4), (429, 9), (429, 9), whole]
        assert answers(Faults(where="resolve", drop_every=1), 1) == [whole]
        assert answers(Faults(answer=(401, b"no", {})), 1) == [(401, 2)]
        with pytest.raises(http.client.RemoteDisconnected):
            answers(Faults(silent=True, stall=0.05), 1)
        assert answers(Faults(truncate_every=1), 1) == [(206, half)]
        assert answers(Faults(stall_every=1, stall=0.05), 1) == [(206, half)]
        assert answers(Faults(ignore_range=True), 1) == [(200, len(WEIGHTS))]
        assert answers(Faults(no_head=True), 1, "HEAD") == [(405, 0)]
        url = location(server)
        assert answers(Faults(url_uses=1), 2) == [whole, (403, 78)]
        commit, url = repo.commit, location(server)
        after = server.count("bodies") + 1
        assert answers(Faults(replace_after=after, replacement={"model.safetensors": b"new"}), 2) == [whole, (206, 3)]
        assert repo.commit != commit


def test_sparse_file_of_a_checkpoints_size(tmp_path: Path) -> None:
    path, size = tmp_path / "model.safetensors", 6_672_547_120
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(5_000_000_000)
        file.write(WEIGHTS)
    with hub_server([Repo("org/name", {path.name: path})]) as server:
        asked = {"Range": f"bytes=4999999000-{5_000_000_000 + len(WEIGHTS) - 1}"}
        status, body, headers = get(location(server), asked)
        assert (status, body) == (206, bytes(1000) + WEIGHTS)
        assert headers["Content-Range"].endswith(f"/{size}")
        assert server.sent == len(body)

"""Sources on the hubs: the real client libraries against a server that speaks both hubs' HTTP, faults included."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

import models
import pytest
import requests
import safetensors
import safetensors.torch
import torch
from command import inside, run
from hostile.dcp import write as write_dcp
from hubserver import Faults, HubServer, Repo, environment, hub_server
from hypothesis import given
from hypothesis import strategies as st

import converter
from converter.api.verify import verify
from converter.errors import HubError, OutputError, UsageError
from converter.hub import remote_file, repository
from converter.hub.address import Address, parse_address
from converter.hub.http_range import RangeReader
from converter.hub.huggingface import HuggingFaceRepository
from converter.hub.modelscope import ModelScopeRepository
from converter.hub.remote_file import RemoteFile, plan_chunks
from converter.hub.repository import (
    HttpResponse,
    HubResponseError,
    Repository,
    RepositoryFile,
    get_with_requests,
    parse_file_list,
    retry_wait,
)
from converter.options import HubOptions
from converter.storage.range_set import RangeSet

PROGRAM = str(Path(sys.executable).with_name("dsocr-convert"))
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning"
)
PR, ODD = "refs/pr/1", "v1.0+cu 12%2F#é"

# Checkpoints --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny checkpoints in the containers of the field."""
    path = tmp_path_factory.mktemp("hubs")
    sam = models.sam_hf().state_dict()
    safetensors.torch.save_file({key: value.clone() for key, value in sam.items()}, path / "model.safetensors")
    torch.save(sam, path / "pytorch_model.bin")
    torch.save(models.sam_meta().state_dict(), path / "sam_vit_b.pth")
    torch.save(models.sam_meta().state_dict(), path / "legacy.pth", _use_new_zipfile_serialization=False)
    script = torch.jit.trace(
        models.clip_hf().vision_model, torch.zeros(1, 3, models.CLIP_IMAGE, models.CLIP_IMAGE), strict=False
    )
    torch.jit.save(script, path / "clip.pt")
    models.clip_hf().save_pretrained(path / "clip", max_shard_size="100KB")
    write_dcp(path / "dcp", models.sam_meta().state_dict())
    return path


@pytest.fixture(scope="module")
def repos(made: Path) -> list[Repo]:
    sam: dict[str, Path | bytes] = {name: made / name for name in ("model.safetensors", "pytorch_model.bin")}
    sam |= {"meta/sam_vit_b.pth": made / "sam_vit_b.pth", "old/legacy.pth": made / "legacy.pth"}
    sam |= {"several/a.pth": b"a", "several/b.pth": b"b", "config.json": b"{}"}
    clip: dict[str, Path | bytes] = {f"sharded/{file.name}": file for file in (made / "clip").iterdir()}
    clip["script/clip.pt"] = made / "clip.pt"
    titan: dict[str, Path | bytes] = {f"step-10/{file.name}": file for file in (made / "dcp").iterdir()}
    kept = {"model.safetensors": made / "model.safetensors"}
    return [
        Repo("org/sam", sam, tags=("v1", PR, ODD)),
        Repo("org/clip.v1.0", clip),
        Repo("org/titan", titan),
        Repo("org/gated", kept, gated=True, token="good"),
        Repo("org/private", kept, private=True, token="good"),
        Repo("org/hf-only", kept, hubs=("hf",)),
    ]


@pytest.fixture
def server(repos: list[Repo]) -> Iterator[HubServer]:
    with hub_server(repos) as running:
        yield running


# Runs ---------------------------------------------------------------------------------------------------------------


class Place:
    """A user's machine: a folder to work in, the hubs' caches and a TMPDIR."""

    def __init__(self, folder: Path, server: HubServer) -> None:
        self.work, self.tmp, self.caches, self.server = folder / "work", folder / "tmp", folder / "caches", server
        for path in (self.work, self.tmp):
            path.mkdir()

    def environment(self, **more: str) -> dict[str, str]:
        home = {"TMPDIR": str(self.tmp), "HOME": str(self.caches), "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1"}
        return {**environment(self.server, self.caches), **home, **more}

    def run(self, *args: object, program: str = "dsocr-convert", **more: str) -> subprocess.CompletedProcess[str]:
        return run(*args, cwd=self.work, program=program, **self.environment(**more))

    def convert(self, *args: object, **more: str) -> Path:
        """The output of a conversion that must succeed, and leave nothing else."""
        done = self.run(*args, "-o", "out", "-f", **more)
        assert done.returncode == 0, done.stderr
        self.said = done.stderr
        self.check_left("out")
        return self.work / "out"

    def refused(self, *args: object, code: int = 5, **more: str) -> str:
        """What a command says that must fail, and leave nothing."""
        before = sorted(self.work.iterdir())
        done = self.run(*args, **more)
        assert done.returncode == code, done.stderr
        if code != 2:
            # The hubs' own clients draw bars while they download.
            bars, error, said = done.stderr.partition("error: ")
            assert error and (not bars or "--download" in args) and "error: " not in said, done.stderr
            assert len(said.splitlines()) >= 2, "there is no next step"
        assert "Traceback" not in done.stderr
        assert sorted(self.work.iterdir()) == before and not list(self.tmp.iterdir())
        return done.stderr

    def script(self, code: str, **more: str) -> str:
        """What a hub's own client prints."""
        with inside(self.tmp, self.environment(**more)), redirect_stdout(io.StringIO()) as printed:
            exec(code, {})
        return printed.getvalue().strip()

    def check_left(self, *names: str) -> None:
        assert sorted(path.name for path in self.work.iterdir()) == sorted(names) and not list(self.tmp.iterdir())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(repository, "_MAX_WAIT", 0.05)


@pytest.fixture
def place(tmp_path: Path, server: HubServer, quick: None) -> Place:
    return Place(tmp_path, server)


@pytest.fixture(scope="module")
def local(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Converts a local checkpoint, each once."""
    folder, outputs = tmp_path_factory.mktemp("local"), {}

    def convert(family: str, name: str, **options: Any) -> Path:
        key = (family, name, *options.items())
        if key not in outputs:
            outputs[key] = folder / str(len(outputs))
            converter.convert(made / name, family, out=outputs[key], **options)
        return outputs[key]

    return convert


def parts(path: Path) -> tuple[dict[str, str], dict[str, Any], bytes]:
    """Metadata, tensors' descriptions and data of a safetensors file."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    return header.pop("__metadata__"), header, data[end:]


def same(found: Path, expected: Path, source: str = "", commit: str = "") -> None:
    """Byte-identical but for source and commit, which are those that are given."""
    metadata, *rest = parts(found)
    plain, *wanted = parts(expected)
    assert rest == wanted
    expected = {"source": source or metadata["source"], "commit": commit or metadata["commit"]}
    assert metadata == {**plain, **expected}


def bodies(server: HubServer) -> int:
    """Bytes of weights that left the server."""
    server.sent  # noqa: B018 (waits for answers under way)
    return sum(request.sent for request in server.requests if request.host == "cdn")


HF_GET = "from huggingface_hub import hf_hub_download as get\nprint(get('org/sam', '{}', revision={!r}))"
MS_GET = "from modelscope_hub import HubApi\nprint(HubApi().download_file('org/sam', 'model', '{}'))"
UNREACHABLE = "http://127.0.0.1:9"

# Addresses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "file", "source"),
    [
        (["org/sam"], "model.safetensors", "hf://org/sam/model.safetensors"),
        (["hf://org/sam@v1/pytorch_model.bin"], "pytorch_model.bin", "hf://org/sam@v1/pytorch_model.bin"),
        (["org/sam@v1/meta/sam_vit_b.pth"], "sam_vit_b.pth", "hf://org/sam@v1/meta/sam_vit_b.pth"),
        (["org/sam/meta"], "sam_vit_b.pth", "hf://org/sam/meta/sam_vit_b.pth"),
        (["hf://org/sam/old/legacy.pth"], "legacy.pth", "hf://org/sam/old/legacy.pth"),
        (["org/sam", "--revision", PR], "model.safetensors", f"hf://org/sam@{PR}/model.safetensors"),
        ([f"hf://org/sam@{PR}/old"], "legacy.pth", f"hf://org/sam@{PR}/old/legacy.pth"),
        (["org/sam", "--revision", ODD], "model.safetensors", f"hf://org/sam@{ODD}/model.safetensors"),
        (["ms://org/sam"], "model.safetensors", "ms://org/sam/model.safetensors"),
        (["ms://org/sam@v1/pytorch_model.bin"], "pytorch_model.bin", "ms://org/sam@v1/pytorch_model.bin"),
        (["org/sam", "--hub", "modelscope"], "model.safetensors", "ms://org/sam/model.safetensors"),
        (["org/sam/old", "--hub", "ms", "--revision", ODD], "legacy.pth", f"ms://org/sam@{ODD}/old/legacy.pth"),
        (["org/hf-only", "--hub", "hf"], "model.safetensors", "hf://org/hf-only/model.safetensors"),
    ],
    ids=lambda value: "-".join(value).replace("/", "_") if isinstance(value, list) else "",
)
def test_addresses(arguments: list[str], file: str, source: str, place: Place, local: Any) -> None:
    commit = next(repo.commit for repo in place.server.repos if repo.id in source)
    same(place.convert("sam", *arguments), local("sam", file), source, commit)
    assert f"commit {commit}" in place.said and "% " not in place.said.split("fetched")[0]
    assert "checked: sizes, ranges, ETags" in place.said
    hubs = {request.host for request in place.server.requests}
    assert hubs == {source[:2], "cdn"}


@pytest.mark.parametrize("scheme", ["hf", "ms"])
def test_shards(scheme: str, place: Place, local: Any) -> None:
    source = f"{scheme}://org/clip.v1.0/sharded"
    index = f"{source}/model.safetensors.index.json"
    same(place.convert("clip", source), local("clip", "clip"), index)
    shards = [name for name in place.server.repos[1].contents if name.endswith(".safetensors")]
    sent = {
        name: sum(it.sent for it in place.server.requests if name in it.path and it.host == "cdn") for name in shards
    }
    assert len(shards) > 4 and all(sent.values())
    same(place.convert("clip", index), local("clip", "clip"), index)


def test_the_record_has_commit_and_bytes(place: Place) -> None:
    done = place.run("sam", "hf://org/sam", "--json")
    record = json.loads(done.stdout)
    (source,) = record["sources"]
    assert source["commit"] == place.server.repos[0].commit and source["name"] == "hf://org/sam/model.safetensors"
    ((name, fetched),) = record["fetched"].items()
    assert name == "hf://org/sam/model.safetensors" and 0 < fetched == bodies(place.server)


@pytest.mark.parametrize(
    ("source", "hub_options"),
    [
        ("hf://org/name", HubOptions(hub="modelscope")),
        ("ms://org/name", HubOptions(hub="hf")),
        ("hf://org/name@v1", HubOptions(revision="v2")),
        ("org/name", HubOptions(hub="gitee")),
        ("hf://name", HubOptions()),
        ("hf://org/name@", HubOptions()),
        ("hf://org/name/../other", HubOptions()),
        ("./some/path", HubOptions(hub="hf")),
    ],
)
def test_contradictions(source: str, hub_options: HubOptions) -> None:
    with pytest.raises(UsageError):
        parse_address(source, hub_options)


def test_addresses_are_parsed() -> None:
    assert parse_address("ms://org/n.a-m_e@v1/a/b.bin", HubOptions()) == Address("ms", "org/n.a-m_e", "v1", "a/b.bin")
    assert parse_address("org/name@refs/convert/pt/x/", HubOptions()) == Address(
        "hf", "org/name", "refs/convert/pt", "x"
    )
    assert parse_address("org/name", HubOptions("v1", "modelscope")) == Address("ms", "org/name", "v1", "")


def test_a_default_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """DSOCR_HUB is for names without a scheme, and no fall-back."""
    monkeypatch.setenv("DSOCR_HUB", "modelscope")
    assert parse_address("org/name@v1/a", HubOptions()) == Address("ms", "org/name", "v1", "a")
    assert parse_address("hf://org/name", HubOptions()).hub == "hf"
    assert parse_address("org/name", HubOptions(hub="hf")).hub == "hf"
    monkeypatch.setenv("DSOCR_HUB", "gitee")
    assert parse_address("ms://org/name", HubOptions()).hub == "ms"
    with pytest.raises(UsageError, match="DSOCR_HUB gitee: expected hf or modelscope"):
        parse_address("org/name", HubOptions())
    monkeypatch.setenv("DSOCR_HUB", "")
    assert parse_address("org/name", HubOptions()).hub == "hf"


def test_hub_and_revision_hold_for_every_source(place: Place) -> None:
    """Of a command with several; the default hub too."""
    clip = "org/clip.v1.0/sharded"
    cases: list[tuple[list[str], dict[str, str]]] = [
        (["sam", "org/sam", "--fill-from", "org/sam/meta", "--hub", "ms", "--revision", "v1"], {}),
        (["encoder", "--sam", "org/sam", "--clip", clip, "--compressor", "random:0"], {"DSOCR_HUB": "ms"}),
    ]
    for command, more in cases:
        place.server.requests.clear()
        done = place.run(*command, "--dry-run", "--json", **more)
        assert done.returncode == 0, done.stderr
        names = [source["name"] for source in json.loads(done.stdout)["sources"]]
        assert len(names) == 2 and all(name.startswith("ms://") for name in names)
        assert "--revision" not in command or all("@v1" in name for name in names)
        assert {request.host for request in place.server.requests} <= {"ms", "cdn"}
    # The compressor is opened last.
    said = place.refused("encoder", "--sam", "org/sam", "--clip", clip, "--compressor", "org/hf-only", "--hub", "ms")
    assert "ms://org/hf-only" in said


def test_hub_options_need_a_hub(place: Place, made: Path, local: Any) -> None:
    converted, source = local("sam", "model.safetensors"), made / "model.safetensors"
    with pytest.raises(UsageError, match="--revision only applies to hub repositories"):
        verify(converted, source, revision="v1", fast=True)
    for option in (["--revision", "v1"], ["--download"]):
        assert "only applies to hub repositories" in place.refused("sam", made / "sam_vit_b.pth", *option, code=2)
    place.refused("sam", "hf://org/sam", "--hub", "ms", code=2)
    # A mistyped path is no repository.
    (place.work / "runs").mkdir()
    for path in ("runs/sam.pth", "runs/best/sam.pth", "nothing/model.safetensors"):
        assert "no such file or folder" in place.refused("sam", path, code=3)
    assert not place.server.requests


# Which hub ----------------------------------------------------------------------------------------------------------


def test_no_other_hub_is_asked(place: Place) -> None:
    # A mirror's name without its scheme is a frequent slip.
    for endpoint in (UNREACHABLE, "mirror.example"):
        said = place.refused("sam", "org/sam", HF_ENDPOINT=endpoint)
        assert f"{endpoint} cannot be reached" in said and "check the network" in said
        assert "--hub modelscope" in said and "ms://org/sam" in said
    for source in ("org/missing", "org/private", "org/sam@nothing", "org/sam/nothing.bin"):
        place.refused("sam", source)
    assert not [request for request in place.server.requests if request.host == "ms"]


def test_hub_options_hold_for_every_source_of_a_command(place: Place, made: Path) -> None:
    options = ("--hub", "modelscope", "--revision", "v1")
    commands = {
        "equal": ("diff", "org/sam", "org/sam/pytorch_model.bin"),
        "my.yaml": ("mapping", "derive", "org/sam/meta", "org/sam/meta"),
        "valid": ("mapping", "check", "my.yaml", "org/sam/meta"),
    }
    for says, command in commands.items():
        done = place.run(*command, *options)
        assert done.returncode == 0 and says in done.stdout, done.stderr
    assert {request.host for request in place.server.requests} == {"ms", "cdn"}
    pages = [request.path for request in place.server.requests if "evision=" in request.path]
    assert pages and all("evision=v1" in path for path in pages)
    local = (made / "sam_vit_b.pth", made / "model.safetensors")
    for verb in (("diff",), ("mapping", "derive", "-o", "new.yaml")):
        assert "only applies to hub repositories" in place.refused(*verb, *local, *options, code=2)


def test_a_login_page_is_not_a_hub(place: Place) -> None:
    page = (200, b"<!DOCTYPE html><html>Log in", {"Content-Type": "text/html"})
    place.server.faults = Faults("/api/", answer=page)
    for source in ("hf://org/sam", "ms://org/sam"):
        assert "the answer is not JSON" in place.refused("sam", source)
    place.server.faults = Faults(r"localhost|/model\.safetensors", answer=page)
    assert "answers with a web page" in place.refused("sam", "hf://org/sam", "-o", "new")


def test_an_unreachable_hub_is_reported_in_time(place: Place) -> None:
    began = time.monotonic()
    place.refused("sam", "org/sam", HF_ENDPOINT=UNREACHABLE)
    assert f"{UNREACHABLE} cannot be reached" in place.refused("sam", "ms://org/sam", MODELSCOPE_ENDPOINT=UNREACHABLE)
    assert time.monotonic() - began < 15


def test_a_silent_hub_is_given_up(place: Place) -> None:
    place.server.faults = Faults("/api/models/org/sam", silent=True, stall=20)
    began = time.monotonic()
    assert "cannot be reached" in place.refused("sam", "org/sam", HF_HUB_ETAG_TIMEOUT="1")
    assert time.monotonic() - began < 15


CLIENT = """
import converter, huggingface_hub as hub
urls, kind = [], type(hub.get_session())
hook = lambda request: urls.append(str(request.url))
hub.set_client_factory(lambda: kind(event_hooks={"request": [hook]}, follow_redirects=True))
converter.convert("hf://org/sam", "sam", out="out")
print(sum("localhost" in url for url in urls))
"""


@pytest.mark.skipif(version("huggingface_hub") < "1", reason="clients can be configured since 1.0")
def test_the_users_http_client_is_used(place: Place) -> None:
    fetched = int(place.script(CLIENT))
    assert fetched == sum(request.host == "cdn" for request in place.server.requests) > 0


@pytest.mark.parametrize("error", [TypeError("unexpected argument"), KeyError("etag"), FileNotFoundError("its own")])
def test_only_answers_of_the_network_mean_that_a_hub_cannot_be_reached(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    for call, cls in (
        ("huggingface_hub.HfApi.model_info", HuggingFaceRepository),
        ("modelscope_hub.HubApi.list_repo_files", ModelScopeRepository),
    ):
        monkeypatch.setattr(call, fail)
        with pytest.raises(type(error)):
            cls("org/none", None, lambda folder: False)


def test_the_process_is_left_as_it_is() -> None:
    code = (
        "import logging, os, huggingface_hub, modelscope_hub\n"
        "names = 'huggingface_hub', 'modelscope_hub'\n"
        "state = lambda: ({**os.environ}, [logging.getLogger(name).level for name in names])\n"
        "before = state()\n"
        "import converter.hub.huggingface, converter.hub.modelscope\n"
        "assert state() == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Caches -------------------------------------------------------------------------------------------------------------


@contextmanager
def changed_commit(repo: Repo) -> Iterator[None]:
    """Let the branch of a repository have another commit with the same files."""
    old, repo.commit = repo.commit, "c" * 40
    try:
        yield
    finally:
        repo.commit = old


def test_hugging_face_cache(place: Place, local: Any) -> None:
    expected, repo = local("sam", "model.safetensors"), place.server.repos[0]
    source = "hf://org/sam/model.safetensors"
    place.script(HF_GET.format("model.safetensors", None))
    before, asked = bodies(place.server), len(place.server.requests)
    same(place.convert("sam", "org/sam"), expected, source, repo.commit)
    # The listing, and the config of the model, which the cache lacks.
    _, *config = place.server.requests[asked:]
    assert bodies(place.server) == before and all("config.json" in request.path for request in config)
    assert "fetched" not in place.said

    # Offline, unreachable, and pinned to what the cache has: the same file, and no request.
    asked = len(place.server.requests)
    same(place.convert("sam", "org/sam", HF_HUB_OFFLINE="1"), expected, source, repo.commit)
    same(place.convert("sam", "org/sam", HF_ENDPOINT=UNREACHABLE), expected, source, repo.commit)
    assert f"taken from the cache, commit {repo.commit}" in place.said
    out = place.convert("sam", "org/sam", "--revision", repo.commit)
    same(out, expected, f"hf://org/sam@{repo.commit}/model.safetensors", repo.commit)
    assert len(place.server.requests) == asked

    # What the cache lacks: reported offline, fetched where it can be.
    said = place.refused("sam", "org/sam/pytorch_model.bin", "-o", "new", HF_HUB_OFFLINE="1")
    assert "is not in the cache" in said and "HF_HUB_OFFLINE" in said
    place.refused("sam", "hf://org/sam/pytorch_model.bin", "-o", "new", HF_ENDPOINT=UNREACHABLE)
    out = place.convert("sam", f"org/sam@{repo.commit}/pytorch_model.bin")
    same(out, local("sam", "pytorch_model.bin"), commit=repo.commit)
    assert bodies(place.server) > before

    # A new commit with the same file: the cache knows it by the old one.
    before = bodies(place.server)
    with changed_commit(repo):
        same(place.convert("sam", "org/sam"), expected, source, repo.commit)
    assert bodies(place.server) == before


def test_a_cache_without_weights_is_not_used(place: Place, local: Any) -> None:
    place.script(HF_GET.format("config.json", None))
    assert "cannot be reached" in place.refused("sam", "org/sam", HF_ENDPOINT=UNREACHABLE)
    assert "is not in the cache" in place.refused("sam", "org/sam", "-o", "new", HF_HUB_OFFLINE="1")
    repo = place.server.repos[0]
    same(place.convert("sam", "org/sam", "--revision", repo.commit), local("sam", "model.safetensors"))


def test_modelscope_cache(place: Place, local: Any) -> None:
    expected = local("sam", "model.safetensors")
    cached = Path(place.script(MS_GET.format("model.safetensors")).splitlines()[-1])
    before = bodies(place.server)
    same(place.convert("sam", "ms://org/sam"), expected, "ms://org/sam/model.safetensors", place.server.repos[0].commit)
    assert bodies(place.server) == before
    out = place.convert("sam", "ms://org/sam", MODELSCOPE_ENDPOINT=UNREACHABLE)
    assert parts(out)[1:] == parts(expected)[1:] and "taken from the cache" in place.said
    # A branch's folder may be older than the branch: another file of the same size is not taken for it.
    data = bytearray(cached.read_bytes())
    data[-1] ^= 1
    cached.write_bytes(data)
    same(place.convert("sam", "ms://org/sam"), expected)
    assert bodies(place.server) > before


@pytest.mark.parametrize("scheme", ["hf", "ms"])
def test_download(scheme: str, place: Place, local: Any, made: Path) -> None:
    source = f"{scheme}://org/sam/model.safetensors"
    same(place.convert("sam", source, "--download"), local("sam", "model.safetensors"), source)
    whole = bodies(place.server)
    assert whole == (made / "model.safetensors").stat().st_size
    same(place.convert("sam", source), local("sam", "model.safetensors"), source)
    same(place.convert("sam", source, "--download"), local("sam", "model.safetensors"), source)
    assert bodies(place.server) == whole
    same(place.convert("clip", f"{scheme}://org/clip.v1.0/sharded", "--download"), local("clip", "clip"))


@pytest.mark.parametrize("scheme", ["hf", "ms"])
def test_a_download_with_a_wrong_digest_is_removed(scheme: str, tmp_path: Path, made: Path) -> None:
    repo = Repo("org/sam", {"model.safetensors": made / "model.safetensors"}, sha256={"model.safetensors": "5" * 64})
    with hub_server([repo]) as server:
        place = Place(tmp_path, server)
        said = place.refused("sam", f"{scheme}://org/sam", "--download")
        assert "5" * 16 in said
        left = [path for path in place.caches.rglob("*") if path.is_file() and path.stat().st_size > 100_000]
        assert not left


def test_folders_made_by_the_hubs_own_programs(place: Place, local: Any) -> None:
    hf = "from huggingface_hub import snapshot_download as get\nget('org/sam', local_dir='{}')"
    ms = "from modelscope_hub import HubApi\nHubApi().download_repo('org/sam', 'model', local_dir='{}')"
    for script in (hf, ms):
        folder = place.caches / script[5:10]
        place.script(script.format(folder))
        assert parts(place.convert("sam", folder)) == parts(local("sam", "model.safetensors"))


# Little is fetched --------------------------------------------------------------------------------------------------


def large_clip() -> dict[str, torch.Tensor]:
    """CLIP whose text tower is larger than all else."""
    state = {key: value.clone() for key, value in models.clip_hf().state_dict().items()}
    return {**state, "text_model.embeddings.token_embedding.weight": torch.zeros(1 << 18, 32)}


@pytest.mark.parametrize("scheme", ["hf", "ms"])
def test_metadata_takes_few_bytes(scheme: str, tmp_path: Path) -> None:
    safetensors.torch.save_file(large_clip(), tmp_path / "model.safetensors")
    torch.save(large_clip(), tmp_path / "pytorch_model.bin")
    names = ("model.safetensors", "pytorch_model.bin")
    with hub_server([Repo("org/clip", {name: tmp_path / name for name in names})]) as server:
        place = Place(tmp_path, server)
        for name in names:
            for arguments in (["inspect"], ["clip", "--dry-run"]):
                before = server.sent
                done = place.run(*arguments, f"{scheme}://org/clip/{name}")
                assert done.returncode == 0 and "vision_model" in done.stdout, done.stderr
                assert server.sent - before < 512 << 10
            before = server.sent
            done = place.run("clip", f"{scheme}://org/clip/{name}", "-f")
            assert done.returncode == 0 and server.sent - before < 2 << 20, done.stderr
        place.check_left("deepencoder-clip.safetensors")


def test_shards_without_needed_tensors_are_not_fetched(tmp_path: Path) -> None:
    state = large_clip()
    text = {key: value for key, value in state.items() if key.startswith("text_model")}
    shards = {"a.safetensors": {key: state[key] for key in state.keys() - text.keys()}, "b.safetensors": text}
    for name, tensors in shards.items():
        safetensors.torch.save_file(tensors, tmp_path / name)
    index = {"weight_map": {key: name for name, tensors in shards.items() for key in tensors}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    files = {name: tmp_path / name for name in (*shards, "model.safetensors.index.json")}
    with hub_server([Repo("org/clip", files)]) as server:
        place = Place(tmp_path, server)
        place.convert("clip", "org/clip")
        sent = sum(request.sent for request in server.requests if "b.safetensors" in request.path)
        assert 0 < sent <= 128 << 10


def test_verification(place: Place, local: Any, tmp_path: Path) -> None:
    cases = [
        ("sam", "hf://org/sam", "model.safetensors"),
        ("sam", "ms://org/sam/pytorch_model.bin", "pytorch_model.bin"),
        ("sam", "org/sam/old/legacy.pth", "legacy.pth"),
        ("clip", "org/clip.v1.0/script", "clip.pt"),
        ("clip", "org/clip.v1.0/sharded", "clip"),
    ]
    pairs = [(str(local(family, name)), source) for family, source, name in cases]
    # In one process, as torch takes seconds to import.
    done = place.script(
        f"from converter.api.verify import verify\nfor pair in {pairs}: print(*verify(*pair, fast=True).done)"
    )
    assert done.splitlines() == ["structure bytes"] * len(cases)
    place.check_left()


def test_verification_of_a_zip_with_small_members_in_their_own_block(tmp_path: Path) -> None:
    """torch.load asks for members that a conversion does not: `version`, just before the directory."""
    path, block, state = tmp_path / "pytorch_model.bin", 128 << 10, models.sam_hf().state_dict()

    def directory(padding: int) -> int:
        unwanted = {"a": torch.ones(padding, dtype=torch.uint8), "b": torch.ones(3 * block, dtype=torch.uint8)}
        torch.save({"model": state, **unwanted}, path)
        with zipfile.ZipFile(path) as archive:
            return archive.start_dir

    assert 0 < directory(128 - directory(64) % block + block) % block < 100
    with hub_server([Repo("org/sam", {path.name: path})]) as server:
        place = Place(tmp_path, server)
        converted = place.convert("sam", "org/sam")
        done = place.run(converted, "--source", "org/sam", "--fast", program="dsocr-verify")
        assert (done.returncode, done.stdout) == (0, "partly verified (structure, bytes)\n"), done.stderr


def test_verification_of_outputs(place: Place, local: Any) -> None:
    converted = local("sam", "pytorch_model.bin")
    done = place.run(converted, "--source", "hf://org/sam/pytorch_model.bin", "--device", "cpu", program="dsocr-verify")
    assert (done.returncode, done.stdout) == (0, "verified\n"), done.stderr
    place.check_left()


def test_other_outputs(place: Place, local: Any) -> None:
    cases: list[tuple[str, str, str, dict[str, Any]]] = [
        ("sam", "org/sam", "model.safetensors", {"format": "pth"}),
        ("sam", "org/sam/old/legacy.pth", "legacy.pth", {"format": "pth"}),
        ("sam", "org/sam", "model.safetensors", {"dtype": "float16"}),
        ("clip", "org/clip.v1.0/sharded", "clip", {"image_size": 112}),
    ]
    outputs = [str(place.work / str(number)) for number in range(len(cases))]
    calls = [
        (source, family, {**options, "out": out})
        for (family, source, _, options), out in zip(cases, outputs, strict=True)
    ]
    # In one process, as torch takes seconds to import.
    code = f"import converter\nfor source, family, options in {calls}: converter.convert(source, family, **options)"
    place.script(code)
    place.check_left(*map(str, range(len(cases))))
    for (family, _, name, options), out in zip(cases, outputs, strict=True):
        expected = local(family, name, **options)
        if options.get("format") == "pth":
            assert Path(out).read_bytes() == expected.read_bytes()
        else:
            same(Path(out), expected)


# What a connection may do -------------------------------------------------------------------------------------------

SOURCES = pytest.mark.parametrize("source", ["hf://org/sam", "ms://org/sam/pytorch_model.bin"], ids=["hf", "ms"])


@pytest.mark.parametrize(
    "faults",
    [
        Faults(busy=1, limited=1),
        Faults(r"\.(safetensors|bin)", busy=1, limited=2, retry_after=1),
        Faults(drop_every=2),
        Faults(truncate_every=2),
        Faults(url_uses=1),
        Faults(no_head=True),
    ],
    ids=["api-busy", "files-busy", "drop", "truncate", "expired", "no-head"],
)
@SOURCES
def test_transient_faults(source: str, faults: Faults, place: Place, local: Any) -> None:
    place.server.faults = faults
    same(place.convert("sam", source), local("sam", place_file(source)))
    assert bodies(place.server) < 4 << 20


def place_file(source: str) -> str:
    return "pytorch_model.bin" if source.endswith(".bin") else "model.safetensors"


@SOURCES
def test_a_server_that_ignores_ranges_is_an_error(source: str, place: Place) -> None:
    place.server.faults = Faults(ignore_range=True)
    said = place.refused("sam", source)
    assert "does not serve byte ranges" in said and "--download" in said
    if source.startswith("hf"):
        place.convert("sam", source, "--download")


@SOURCES
def test_a_replaced_file_is_an_error(source: str, place: Place, made: Path) -> None:
    other = made / ("model.safetensors" if source.endswith(".bin") else "pytorch_model.bin")
    changed = bytearray((made / place_file(source)).read_bytes())
    changed[-9] ^= 1
    for new in (bytes(changed), other):
        with hub_server([Repo("org/sam", {place_file(source): made / place_file(source)})]) as server:
            server.faults = Faults(replace_after=1, replacement={place_file(source): new})
            there = Place(Path(tempfile.mkdtemp(dir=place.caches.parent)), server)
            said = there.refused("sam", source, code=3)
            assert "changed while it was being read" in said and "--revision" in said


def test_permanent_errors(place: Place) -> None:
    loop = (302, b"", {"Location": "/org/sam/resolve/main/model.safetensors"})
    place.server.faults = Faults("resolve", answer=loop)
    assert "redirects" in place.refused("sam", "hf://org/sam")
    zipped = (206, b"x", {"Content-Encoding": "gzip"})
    place.server.faults = Faults("resolve", answer=zipped)
    assert "compresses" in place.refused("sam", "hf://org/sam")
    place.server.faults = Faults("/api/models", answer=(500, b"", {}))
    assert "HTTP 500" in place.refused("sam", "hf://org/sam")
    place.server.faults = Faults("resolve", answer=(302, b"", {"Location": "file:///etc/passwd"}))
    place.refused("sam", "hf://org/sam")


@pytest.mark.parametrize(
    "fault", [Faults(stall_every=1, stall=50), Faults(r"resolve|localhost|repo\?", silent=True, stall=50)]
)
@SOURCES
def test_interruption_of_a_stalled_transfer(source: str, fault: Faults, place: Place) -> None:
    if not fault.silent:
        # The metadata comes, the weights do not: a block of 128 KiB holds the header.
        place.server.faults = Faults()
        place.server.count("bodies")
    place.server.faults = fault
    process = subprocess.Popen(
        [PROGRAM, "sam", source],
        cwd=place.work,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **place.environment()},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 20
    while place.server.answering == 0 or not any(r.range for r in place.server.requests):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    time.sleep(0.5)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in said
    assert time.monotonic() - began < 15
    place.check_left()


# What the hubs refuse -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["hf", "ms"])
def test_refusals(scheme: str, place: Place, local: Any) -> None:
    token = "HF_TOKEN" if scheme == "hf" else "MODELSCOPE_API_TOKEN"
    endpoint = place.server.hf_endpoint if scheme == "hf" else place.server.ms_endpoint

    said = place.refused("sam", f"{scheme}://org/missing")
    assert "no such repository" in said and token in said
    assert "no such repository" in place.refused("sam", f"{scheme}://org/private")
    assert "no such repository" in place.refused("sam", f"{scheme}://org/private", **{token: "bad"})
    said = place.refused("sam", f"{scheme}://org/gated")
    assert token in said and f"{endpoint}/" in said and "org/gated" in said
    said = place.refused("sam", f"{scheme}://org/gated", **{token: "bad"})
    assert f"{endpoint}/" in said
    place.refused("sam", f"{scheme}://org/gated", "--download")
    for repo in ("gated", "private"):
        same(place.convert("sam", f"{scheme}://org/{repo}", **{token: "good"}), local("sam", "model.safetensors"))
    (place.work / "out").unlink()
    assert any(request.token == "good" for request in place.server.requests)
    assert {request.token for request in place.server.requests if request.host == "cdn"} == {None}

    assert "there is no revision 'nothing'" in place.refused("sam", f"{scheme}://org/sam@nothing")
    said = place.refused("sam", f"{scheme}://org/sam/nothing.bin")
    assert "there is no file 'nothing.bin'" in said and "meta/sam_vit_b.pth" in said and "model.safetensors" in said
    said = place.refused("sam", f"{scheme}://org/sam/several")
    assert "a.pth, b.pth" in said and "give the path of one of them" in said


def test_a_token_that_is_not_valid(place: Place) -> None:
    message = "Invalid credentials in Authorization header"
    place.server.faults = Faults(answer=(401, b"", {"X-Error-Message": message}))
    said = place.refused("sam", "hf://org/sam", HF_TOKEN="hf_old")
    assert "your token is not valid" in said and "hf auth login" in said


@pytest.mark.parametrize("scheme", ["hf", "ms"])
def test_netrc_is_not_used(scheme: str, place: Place, local: Any) -> None:
    place.caches.mkdir()
    (place.caches / ".netrc").write_text("default login me password secret\n")
    (place.caches / ".netrc").chmod(0o600)
    token = {"HF_TOKEN": "good", "MODELSCOPE_API_TOKEN": "good"}
    same(place.convert("sam", f"{scheme}://org/gated", **token), local("sam", "model.safetensors"))
    files = [request for request in place.server.requests if request.range]
    assert {request.token for request in files if request.host == "cdn"} == {None}
    assert {request.token for request in files if request.host == scheme} == {"good"}


def test_hostile_listings(tmp_path: Path) -> None:
    rows: list[tuple[object, object, object]] = [
        ("a/../../b", 1, ""), ("/etc/passwd", 1, ""), ("a\\..\\b", 1, ""), ("a\x1b[31m", 1, ""), (None, 1, ""),
        ("", 1, ""), ("ok", 1, "5" * 64), ("less", -1, "../x"), ("text", "7", None), ("ünï/code.bin", 2, None),
    ]  # fmt: skip
    assert parse_file_list(rows) == {
        "ok": RepositoryFile(1, "5" * 64),
        "less": RepositoryFile(None),
        "text": RepositoryFile(None),
        "ünï/code.bin": RepositoryFile(2),
    }


@pytest.mark.parametrize("size", [-1, None, 10**19, 2**62, "many"])
def test_impossible_sizes(size: object, place: Place) -> None:
    info = {"id": "org/sam", "sha": "5" * 40, "siblings": [{"rfilename": "model.safetensors", "size": size}]}
    place.server.faults = Faults("/api/models/", answer=(200, json.dumps(info).encode(), {}))
    done = place.run("sam", "hf://org/sam")
    assert done.returncode in (3, 4, 5) and "Traceback" not in done.stderr and "model.safetensors" in done.stderr
    place.check_left()


def test_a_mirror_that_lists_no_sizes(place: Place, local: Any) -> None:
    info = {"id": "org/sam", "sha": place.server.repos[0].commit, "siblings": [{"rfilename": "model.safetensors"}]}
    place.server.faults = Faults("/api/models/", answer=(200, json.dumps(info).encode(), {}))
    same(place.convert("sam", "hf://org/sam"), local("sam", "model.safetensors"))


def test_files_are_closed_if_a_later_shard_fails(place: Place, made: Path) -> None:
    files: dict[str, Path | bytes] = {file.name: file for file in (made / "clip").iterdir()}
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    files[shards[-1]] = b"nothing of the kind"
    with hub_server([Repo("org/clip", files)]) as server:
        place.server = server
        place.refused("clip", "hf://org/clip", code=3)


# One file, in this process ------------------------------------------------------------------------------------------

DATA = random.Random(0).randbytes(3 << 20)


class OneFile(Repository):
    """A repository with one file, read without a hub's library."""

    def __init__(self, server: HubServer, size: int | None) -> None:
        super().__init__("hf://org/one", server.hf_endpoint, lambda folder: False)
        self._url = f"{server.hf_endpoint}/org/one/resolve/main/file.bin"
        self.files = {"file.bin": RepositoryFile(size)}
        self._session = requests.Session()

    @property
    def connections(self) -> int:
        """The number of hosts to which connections may be open."""
        return sum(len(adapter.poolmanager.pools) for adapter in self._session.adapters.values())  # type: ignore[attr-defined]

    def url(self, path: str) -> str:
        return self._url

    def get(self, url: str, headers: dict[str, str]) -> AbstractContextManager[HttpResponse]:
        return get_with_requests(self._session, url, headers, timeout=(1.0, 0.5))

    def close(self) -> None:
        self._session.close()

    def to_hub_error(self, error: HubResponseError, path: str) -> HubError:
        return HubError(f"{path}: {error}")

    def _unused(self, *args: object) -> Any:
        raise NotImplementedError

    cached_file = _download = _find_snapshot = _list_files = _response_error = _unused


@pytest.fixture
def one() -> Iterator[HubServer]:
    with hub_server([Repo("org/one", {"file.bin": DATA})]) as running:
        yield running


@pytest.fixture
def file(one: HubServer, quick: None) -> Iterator[RemoteFile]:
    opened = RemoteFile(OneFile(one, len(DATA)), "file.bin")
    yield opened
    opened.close()


@pytest.mark.parametrize(
    "faults",
    [
        Faults(),
        Faults(drop_every=1),
        Faults(drop_every=10),
        Faults(truncate_every=1),
        Faults(stall_every=9, stall=1),
        Faults(url_uses=1),
        Faults(busy=3, limited=3, retry_after=0),
    ],
)
def test_bytes_are_right_with_faults(
    faults: Faults, file: RemoteFile, one: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    one.faults = faults
    wanted = [(at, min(at + 150_000, len(DATA))) for at in range(0, len(DATA), 300_000)]
    small = [chunk for start, end in wanted for chunk in plan_chunks([(start, end)], size=50_000)]
    monkeypatch.setattr(
        remote_file,
        "plan_chunks",
        lambda wanted: [c._replace(first_read=i // 3, last_read=i // 3) for i, c in enumerate(small)],
    )
    progress: list[int] = []
    file.prefetch(wanted, lambda: progress.append(file.fetched_bytes))
    for start, end in wanted:
        assert file.read(start, end - start) == DATA[start:end]
    # Behind the reader, and what nobody had announced.
    assert file.read(10, 100) == DATA[10:110] and file.read(160_000, 9) == DATA[160_000:160_009]
    assert file.needed_bytes == sum(end - start for start, end in wanted) and progress


def test_a_file_that_is_served_whole_is_resumed(file: RemoteFile, one: HubServer) -> None:
    """As small files of ModelScope are. The second body breaks off."""
    one.count("bodies")
    one.faults = Faults(ignore_range=True, drop_every=2)
    assert file.read(0, len(DATA)) == DATA
    assert file.fetched_bytes == len(DATA)


def test_a_file_can_be_read_by_several_threads(file: RemoteFile, one: HubServer) -> None:
    one.faults = Faults(drop_every=7)
    wanted = [(at, at + 100_000) for at in range(0, 3_000_000, 100_000)]
    file.prefetch(wanted, lambda: None)
    with ThreadPoolExecutor(8) as pool:
        order = random.Random(1).sample(wanted, len(wanted))
        found = pool.map(lambda part: file.read(part[0], part[1] - part[0]), order)
        assert list(found) == [DATA[start:end] for start, end in order]


def test_errors_of_a_worker_reach_the_reader(file: RemoteFile, one: HubServer) -> None:
    one.faults = Faults(answer=(404, b"", {}))
    file.prefetch([(0, len(DATA))], lambda: None)
    for _ in range(2):
        with pytest.raises(HubError, match="HTTP 404"):
            file.read(5, 5)


def test_waits() -> None:
    assert [retry_wait(tried, None) for tried in (1, 2, 3, 9)] == [0.5, 1, 2, 30]
    assert (retry_wait(1, 7), retry_wait(1, 3600)) == (7, 30)


def test_attempts_end(file: RemoteFile, one: HubServer) -> None:
    one.faults = Faults(answer=(503, b"", {}))
    with pytest.raises(HubError, match=r"could not be fetched in 6 attempts: HTTP 503"):
        file.read(5, 5)
    assert len(one.requests) == 6


def test_a_full_disk_is_not_retried(file: RemoteFile, one: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    # A limit of the process, as near to a full disk as a test gets.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    file.fetch_all([(0, 10)])
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OutputError, match="TMPDIR"):
            file.fetch_all([(0, len(DATA))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert len([request for request in one.requests if request.host == "cdn"]) == 2


def test_free_space_is_checked_before_the_transfer(
    file: RemoteFile, one: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with pytest.raises(OutputError, match="TMPDIR"):
        file.fetch_all([(0, 100_000)])
    assert not one.requests


def test_closing_stops_transfers(file: RemoteFile, one: HubServer) -> None:
    one.faults = Faults(stall_every=1, stall=20)
    file.prefetch([(0, len(DATA))], lambda: None)

    def read() -> None:
        with pytest.raises(HubError, match="stopped"):
            file.read(0, 1)

    reader = threading.Thread(target=read)
    reader.start()
    time.sleep(0.2)
    began = time.monotonic()
    file.close()
    assert time.monotonic() - began < 10
    for thread in threading.enumerate():
        if thread.name.startswith("fetch"):
            thread.join(3)
            assert not thread.is_alive()
    reader.join(3)


def test_a_request_that_begins_as_the_file_is_closed_leaves_no_connection(one: HubServer, quick: None) -> None:
    class Late(OneFile):
        def get(self, url: str, headers: dict[str, str]) -> AbstractContextManager[HttpResponse]:
            opened.close()
            return super().get(url, headers)

    repository = Late(one, len(DATA))
    opened = RemoteFile(repository, "file.bin")
    with pytest.raises(HubError, match="stopped"):
        opened.read(0, 1)
    assert one.requests and repository.connections == 0


@pytest.mark.parametrize(("data", "ranges"), [(DATA, True), (b"", True), (b"1", True), (b"1", False)])
def test_a_size_that_is_not_listed_is_that_of_a_response(data: bytes, ranges: bool, quick: None) -> None:
    faults = Faults(ignore_range=not ranges, drop_every=2)
    with hub_server([Repo("org/one", {"file.bin": data})], faults) as server:
        opened = RemoteFile(OneFile(server, None), "file.bin")
        assert opened.size == len(data)
        assert opened.read(0, len(data)) == data
        opened.close()


def test_a_size_that_no_response_gives_is_an_error(one: HubServer, quick: None) -> None:
    one.faults = Faults("localhost|Signature", ignore_range=True)
    repository = OneFile(one, None)
    opened = RemoteFile(repository, "file.bin")
    with pytest.raises(HubError, match="does not serve byte ranges"):
        opened.read(5, 5)
    opened.close()
    one.faults = Faults(answer=(404, b"", {}))
    with pytest.raises(HubError, match="HTTP 404"):
        RemoteFile(repository, "file.bin")
    repository.close()


def test_expired_addresses(one: HubServer, quick: None) -> None:
    """All threads meet the expired address at once, and none takes it for a refusal."""
    one.faults = Faults(url_uses=3)
    repository = OneFile(one, len(DATA))
    reader = RangeReader(repository, "file.bin")
    with ThreadPoolExecutor(8) as pool:
        starts = range(0, len(DATA), 50_000)
        found = pool.map(lambda at: b"".join(reader.read(at, min(at + 50_000, len(DATA)))), starts)
        assert b"".join(found) == DATA
    repository.close()


def resident() -> int:
    """Bytes of memory that the process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_is_bounded(tmp_path: Path) -> None:
    size = 200 << 20
    path = tmp_path / "file.bin"
    path.write_bytes(b"")
    os.truncate(path, size)
    with hub_server([Repo("org/one", {"file.bin": path}, sha256={"file.bin": "5" * 64})]) as server:
        opened = RemoteFile(OneFile(server, size), "file.bin")
        opened.prefetch([(at, at + (2 << 20)) for at in range(0, size, 2 << 20)], lambda: None)
        largest, before, buffer = 0, resident(), memoryview(bytearray(1 << 20))
        for at in range(0, size, 1 << 20):
            opened.readinto(buffer, at)
            largest = max(largest, resident())
        assert largest - before <= (remote_file.MAX_CHUNKS + 4) * remote_file.MAX_CHUNK_SIZE
        assert opened.fetched_bytes == opened.needed_bytes == size
        opened.close()


def test_ranges_that_are_needed_again_and_again_are_read_again(one: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The window is full of ranges that are needed until the end: others are fetched without it."""
    monkeypatch.setattr(remote_file, "MAX_CHUNKS", 2)
    opened = RemoteFile(OneFile(one, len(DATA)), "file.bin")
    wanted = [(at, at + 1000) for at in range(0, 3_000_000, 200_000)] * 2
    opened.prefetch(wanted, lambda: None)
    for start, end in wanted:
        assert opened.read(start, end - start) == DATA[start:end]
    opened.close()


def test_a_local_copy_has_what_was_fetched(file: RemoteFile, one: HubServer) -> None:
    one.faults = Faults(drop_every=3)
    assert file.path == "" and file.read(0, 8) == DATA[:8]
    ranges = [(1_000_000, 2_000_000), (2_500_000, len(DATA) + 9)]
    file.fetch_all(ranges)
    data = Path(file.path).read_bytes()
    assert len(data) == len(DATA) and data[:1000] == DATA[:1000]
    assert all(data[start:end] == DATA[start:end] for start, end in ranges)
    before = len(one.requests)
    file.fetch_all(ranges[:1])
    assert file.read(1_500_000, 100) == DATA[1_500_000:1_500_100] and len(one.requests) == before
    path = file.path
    file.close()
    assert not Path(path).exists()


# Ranges -------------------------------------------------------------------------------------------------------------

RANGE = st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda pair: (min(pair), max(pair) + 1))


@given(st.lists(RANGE, max_size=20), RANGE)
def test_ranges_are_a_set_of_bytes(changes: list[tuple[int, int]], asked: tuple[int, int]) -> None:
    ranges, expected = RangeSet(), set()
    for start, end in changes:
        ranges.add(start, end)
        expected |= {*range(start, end)}
        assert all(low < high for low, high in ranges)
        assert all(a[1] < b[0] for a, b in itertools.pairwise(ranges))
    missing = [byte for low, high in ranges.missing(*asked) for byte in range(low, high)]
    assert missing == sorted({*range(*asked)} - expected)


@given(st.lists(RANGE, max_size=20), st.integers(0, 10), st.integers(1, 30))
def test_chunks_cover_ranges(wanted: list[tuple[int, int]], gap: int, size: int) -> None:
    found = plan_chunks(wanted, gap, size)
    covered = [byte for chunk in found for byte in range(chunk.start, chunk.end)]
    needed = {byte for start, end in wanted for byte in range(start, end)}
    assert needed <= set(covered) and len(covered) == len(set(covered))
    assert all(0 < chunk.end - chunk.start <= size for chunk in found)
    # A gap costs no more than it may, and is between two ranges.
    assert len(covered) <= len(needed) + gap * max(0, len(wanted) - 1)
    for chunk in found:
        at = [i for i, (start, end) in enumerate(wanted) if start < chunk.end and chunk.start < end]
        assert (chunk.first_read, chunk.last_read) == (at[0], at[-1])
    assert [chunk.first_read for chunk in found] == sorted(chunk.first_read for chunk in found)


# The real hubs ------------------------------------------------------------------------------------------------------


@pytest.mark.network
@pytest.mark.parametrize(
    ("family", "source"),
    [
        ("sam", "facebook/sam-vit-base"),
        ("sam", "hf://facebook/sam-vit-base@main/pytorch_model.bin"),
        ("clip", "ms://AI-ModelScope/clip-vit-large-patch14"),
        ("sam", "deepseek-ai/DeepSeek-OCR"),
    ],
)
def test_the_real_hubs(family: str, source: str, tmp_path: Path) -> None:
    """With the caches, tokens and mirrors of the user: `pytest -m network`."""
    done = subprocess.run(
        [PROGRAM, family, source, "-o", "out", "--json"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["num_tensors"] == {"sam": 177, "clip": 294}[family]
    assert sum(record["fetched"].values()) <= 1.02 * record["nbytes"] + (2 << 20)
    with safetensors.safe_open(tmp_path / "out", "pt") as opened:
        assert opened.metadata()["commit"] == record["sources"][0]["commit"]


def test_a_dcp_folder_below_the_top_of_a_repository(made: Path, server: HubServer, tmp_path: Path) -> None:
    place = Place(tmp_path, server)
    found = safetensors.torch.load_file(place.convert("sam", "hf://org/titan"))
    wanted = converter.load(made / "sam_vit_b.pth", "sam")
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert "read from its folder step-10" in place.said and "torch DCP: the CRC-32 of every tensor" in place.said
    done = place.run("out", "--source", "hf://org/titan", "--fast", program="dsocr-verify")
    assert done.returncode == 2 and "add --download" in done.stderr
    done = place.run("out", "--source", "hf://org/titan", "--fast", "--download", program="dsocr-verify")
    assert done.returncode == 0, done.stderr

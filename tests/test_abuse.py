"""Mistakes of users and hostile options: each gives a short error, and only the output is written."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import safetensors.torch
import torch
from command import run
from test_encoder_command import deepseek_ocr, save

import converter
from converter.api.verify import verify
from converter.cli.diff import diff as diff_command
from converter.errors import ContainerError, DsocrError, OutputError, UsageError
from converter.layouts import registry
from converter.output.target import check_target
from converter.reports import check_files

TOO_LONG = "x" * 5000 + ".safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("abuse")
    torch.save(models.sam_meta().state_dict(), path / "sam.pth")
    torch.save(models.clip_hf_vision().state_dict(), path / "clip.pth")
    models.clip_hf().save_pretrained(path / "clip", max_shard_size="100KB")
    save(path / "deepseek", deepseek_ocr())
    return path


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new folder with copies of the sources, so that changes to them are detected."""
    for path in (path for path in made.rglob("*") if path.is_file()):
        (tmp_path / path.relative_to(made)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path.relative_to(made)).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def check_refused(folder: Path, error: type[DsocrError], words: str, call: Callable[[], object]) -> None:
    """The call fails with a short message that contains the words, and changes nothing in the folder."""
    before = contents(folder)
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value) and len(str(caught.value).splitlines()) <= 12
    assert contents(folder) == before


def sam(**options: Any) -> Callable[[], object]:
    return lambda: converter.convert("sam.pth", "sam", **options)


def encoder(**options: Any) -> Callable[[], object]:
    return lambda: converter.encoder(sam="sam.pth", clip="clip.pth", compressor="random:0", **options)


def clip(**options: Any) -> Callable[[], object]:
    return lambda: converter.convert("clip", "clip", force=True, **options)


REFUSED: dict[str, tuple[type[DsocrError], str, Callable[[], object]]] = {
    "long output": (OutputError, "too long", sam(out=TOO_LONG)),
    "long folder": (OutputError, "too long", sam(out="x" * 5000, to="sam-hf")),
    "long record": (OutputError, "too long", sam(record="x" * 5000 + ".json")),
    "long source": (ContainerError, "no such file", lambda: converter.diff(TOO_LONG, "sam.pth")),
    "long checkpoint": (UsageError, "no such file", encoder(into=TOO_LONG, out="x.safetensors")),
    "NUL in output": (OutputError, "embedded null", sam(out="a\0b")),
    "empty source": (UsageError, "SOURCE is empty", lambda: converter.convert("", "sam")),
    "empty donor": (UsageError, "SOURCE is empty", sam(fill_from="", to="sam-hf", out="x.pth")),
    "over the index": (
        OutputError,
        "is the source",
        clip(out="clip/model.safetensors.index.json", format="safetensors"),
    ),
    "over a pipe": (OutputError, "a device or a pipe", sam(out="pipe", force=True)),
    "huge images": (UsageError, "expected 1 to", clip(image_size=14_000_000)),
    "huge images, loaded": (
        UsageError,
        "expected 1 to 8192",
        lambda: converter.load("clip", "clip", image_size=14_000_000),
    ),
    "no device": (UsageError, "device None", lambda: converter.load("clip", "clip", device=None)),  # type: ignore[arg-type]
    "three state dicts": (UsageError, "--state-dict a,b,c", lambda: converter.diff("clip", "clip", state_dict="a,b,c")),
    **{
        f"prefix {p!r}": (UsageError, "--add-prefix", encoder(add_prefix=p))
        for p in ("model", "..", "a/b", "\n.", "\udcff.")
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_refused_before_anything_is_written(name: str, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    check_refused(folder, *REFUSED[name])


@pytest.mark.parametrize("link", [False, True], ids=["itself", "hard link"])
@pytest.mark.parametrize("what", ["source", "index", "mapping"])
def test_a_record_never_replaces_an_input(what: str, link: bool, folder: Path) -> None:
    own = {"source": "sam.json", "index": "clip/model.safetensors.index.json", "mapping": "m.json"}
    (folder / "sam.pth").rename("sam.json")
    (folder / "m.json").write_text(registry.yaml_text("sam-meta"))
    record = "record.json" if link else own[what]
    if link:
        os.link(own[what], record)
    source, family = ("clip", "clip") if what == "index" else ("sam.json", "sam")
    options: dict[str, Any] = {"mapping": {"mapping": "m.json"}}.get(what, {})
    call = lambda **more: converter.convert(source, family, force=True, **options, **more)  # noqa: E731
    check_refused(folder, OutputError, "cannot be the record", lambda: call(record=record))
    if what == "mapping":
        check_refused(folder, OutputError, "is the source", lambda: call(out=own[what], format="safetensors"))


def test_file_names_that_are_not_utf8(folder: Path) -> None:
    """On Linux a file name is bytes. Records and mapping files contain it escaped."""
    (folder / "clip.pth").rename("\udcff.pth")
    converter.convert("\udcff.pth", "clip", out="\udcfe.pth", record=["\udcfd.json", "\udcfd.md"])
    assert "# \\udcfe.pth" in Path("\udcfd.md").read_text()
    assert json.loads(Path("\udcfd.json").read_bytes())["sources"][0]["name"]
    Path("sam.pth").rename("\udcff.pth")
    assert "\\udcff.pth" in converter.derive("\udcff.pth", "deepencoder-sam").text


# Into a checkpoint ------------------------------------------------------------------------------------------------


def test_lone_surrogates_in_a_checkpoint(folder: Path) -> None:
    """JSON can escape them, UTF-8 cannot encode them: they are escaped again."""
    index = folder / "deepseek" / "model.safetensors.index.json"
    document = json.loads(index.read_bytes())
    document["metadata"] = {"total_size": 3, "by": "\ud800"}
    index.write_text(json.dumps(document))
    shard = folder / "deepseek" / document["weight_map"]["model.sam_model.pos_embed"]
    data = shard.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps({**json.loads(data[8:end]), "__metadata__": {"by": "\ud800"}}).encode()
    shard.write_bytes(struct.pack("<Q", len(header)) + header + data[end:])
    encoder(into="deepseek", out="new", dtype="float32")()
    assert json.loads((folder / "new" / index.name).read_bytes())["metadata"]["by"] == "\ud800"
    written = (folder / "new" / shard.name).read_bytes()
    found = json.loads(written[8 : 8 + int.from_bytes(written[:8], "little")])
    assert found["__metadata__"] == {"by": "\ud800"} and found["model.sam_model.pos_embed"]["dtype"] == "F32"


def test_another_file_of_the_folder_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def refusing(path: Path, *options: Any, **more: Any) -> Any:
        if path.name == "config.json":
            raise PermissionError(13, "Permission denied")
        return opened(path, *options, **more)

    # Patched, because root may read everything.
    monkeypatch.setattr(Path, "open", refusing)
    with pytest.raises(ContainerError, match=r"config\.json: cannot be read: Permission denied"):
        encoder(into="deepseek", out="new")()
    assert not [path for path in folder.iterdir() if "new" in path.name]


# Records and reports ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hostile", [{"shape": [float("inf")]}, {"shape": [[1]]}, {"shape": None}, {"record": ["x" * 100_000]}], ids=str
)
def test_hostile_records(hostile: dict[str, Any], folder: Path) -> None:
    converter.convert("clip.pth", "clip", out="out.safetensors", record="record.json")
    record = json.loads(Path("record.json").read_bytes())
    next(iter(record["tensors"].values())).update({key: value for key, value in hostile.items() if key != "record"})
    Path("record.json").write_text(json.dumps({**record, **{k: v for k, v in hostile.items() if k == "record"}}))
    with pytest.raises(ContainerError, match="record") as caught:
        verify("out.safetensors", record="record.json", fast=True)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("path", ["/dev/zero", "pipe.json", TOO_LONG], ids=["endless", "pipe", "long"])
def test_records_that_are_not_files(path: str, folder: Path) -> None:
    os.mkfifo("pipe.json")
    converter.convert("clip.pth", "clip", out="out.safetensors")
    check_refused(folder, ContainerError, "", lambda: verify("out.safetensors", record=path, fast=True))


@pytest.mark.parametrize("name", ["sam.pth", "clip/config.json", TOO_LONG, "/dev/null"], ids=lambda name: name[:20])
def test_reports_only_replace_reports(name: str, folder: Path) -> None:
    check_refused(
        folder, OutputError, "", lambda: diff_command("sam.pth", "sam.pth", html=Path(name), json=False, quiet=True)
    )
    (folder / "report.html").write_text("an older one")
    check_files(folder / "report.html", folder / "new", None)


def test_only_files_and_folders_are_replaced(tmp_path: Path) -> None:
    """A rename by root would replace /dev/null."""
    for is_folder in (False, True):
        with pytest.raises(OutputError):
            check_target(Path("/dev/null"), force=True, needed_bytes=0, is_folder=is_folder)
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "old.safetensors")
    check_target(tmp_path / "old.safetensors", force=True, needed_bytes=0)


# Names with control characters ----------------------------------------------------------------------------------------

# Terminal control sequences, and a command of GitHub's runner at the beginning of a line.
STEERING = "a\r\n::error::b\x1b[2J\u202e\u2028"
SHOWN: dict[str, tuple[str, ...]] = {
    "inspected": ("inspect", "odd.safetensors"),
    "planned": ("sam", "odd.safetensors", "--dry-run"),
    "compared": ("diff", "odd.safetensors", "other.safetensors"),
    "derived": ("mapping", "derive", "odd.safetensors", "deepencoder-sam", "-o", "x.yaml"),
    "several state dicts": ("sam", "several.pth"),
    "no such state dict": ("sam", "several.pth", "--state-dict", "x"),
    "several to compare": ("diff", "several.pth", "odd.safetensors"),
    "several to derive from": ("mapping", "derive", "several.pth", "deepencoder-sam", "-o", "x.yaml"),
    "a file of that name": ("sam", f"{STEERING}.pth"),
    "no file of that name": ("sam", f"{STEERING}.safetensors"),
}


@pytest.mark.parametrize("how", SHOWN)
def test_control_characters_in_names_are_escaped(how: str, tmp_path: Path) -> None:
    state = {f"{STEERING}.{name}": tensor.contiguous() for name, tensor in models.sam_meta().state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "odd.safetensors")
    safetensors.torch.save_file({STEERING: torch.ones(2), "b": torch.ones(1)}, tmp_path / "other.safetensors")
    torch.save({STEERING: models.sam_meta().state_dict(), f"{STEERING}2": state}, tmp_path / "several.pth")
    (tmp_path / f"{STEERING}.pth").write_bytes(b"")
    done = run(*SHOWN[how], cwd=tmp_path)
    text = done.stdout + done.stderr
    assert "Traceback" not in text and "::error::b" in text
    assert all(line.isprintable() and not line.lstrip().startswith("::") for line in text.split("\n"))

"""The record of a conversion as a file, and what a verification makes of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import models
import pytest
import safetensors.torch
import torch
from command import run
from hubserver import Repo, environment, hub_server
from memory import raw
from test_oracles import LAYOUTS
from typer.testing import CliRunner

import converter
from converter.api.verify import verify
from converter.cli import convert as cli
from converter.cli import render
from converter.errors import ContainerError, OutputError, UsageError
from converter.output.json_document import canonical_json
from converter.output.record import RecordedSource
from converter.verification.result import FAILED, PASSED


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny checkpoints: SAM as Meta saves it, CLIP in a folder as transformers does."""
    path = tmp_path_factory.mktemp("record")
    torch.save(models.sam_meta().state_dict(), path / "sam.pth")
    models.clip_hf().save_pretrained(path / "clip", max_shard_size="100KB")
    return path


def document(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_bytes())
    assert isinstance(found, dict)
    return found


def converted(folder: Path, tmp_path: Path, **options: object) -> tuple[Path, Path]:
    """CLIP converted with a record: both files."""
    out, record = tmp_path / "out.safetensors", tmp_path / "out.json"
    converter.convert(folder / "clip", "clip", out=out, record=record, **options)  # type: ignore[arg-type]
    return out, record


# What is in it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["safetensors", "pth"])
@pytest.mark.parametrize(
    "options", [{}, {"dtype": "float16"}, {"to": "clip-timm"}, {"to": "clip-hf"}, {"image_size": 112}], ids=str
)
def test_digests_are_of_the_output(options: dict[str, object], format: str, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / f"out.{format}"
    made = converter.convert(folder / "clip", "clip", out=out, format=format, record=tmp_path / "c.json", **options)  # type: ignore[arg-type]
    found = torch.load(out, weights_only=True) if format == "pth" else safetensors.torch.load_file(out)
    record = document(tmp_path / "c.json")
    assert record["tensors"].keys() == found.keys()
    for name, tensor in found.items():
        entry = record["tensors"][name]
        assert entry["sha256"] == hashlib.sha256(raw(tensor)).hexdigest(), name
        assert (entry["dtype"], entry["shape"]) == (str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        assert [part["key"] for part in entry["from"]] == made.converted[name]
    assert record["dropped"] == made.dropped
    assert ("torch" in record["tools"]) == ("dtype" in options or "image_size" in options)
    if format == "safetensors":
        with safetensors.safe_open(out, "pt") as file:
            assert record["metadata"] == file.metadata()


def test_large_tensors_and_empty_ones(tmp_path: Path) -> None:
    """Tensors that fill several buffers, begin in the midst of one, or have no bytes."""
    from memory import expr

    from converter.formats.safetensors import write_safetensors
    from converter.output.record_files import TensorDigests
    from converter.storage.stream import BUFFER

    tensors = {"a": torch.empty(0, 2), "b": torch.ones(3), "c": torch.randn(BUFFER, 2), "d": torch.tensor(1.0)}
    tensors |= {"e": torch.empty(0), "f": torch.randn(BUFFER // 4)}
    outputs = {name: expr(tensor) for name, tensor in tensors.items()}
    digests = TensorDigests(outputs)
    with (tmp_path / "out").open("wb") as file:
        write_safetensors(file.fileno(), outputs, {}, lambda count: None, digests)
    assert {name: digests.hex(name) for name in outputs} == {
        name: hashlib.sha256(raw(tensor)).hexdigest() for name, tensor in tensors.items()
    }


def test_local_files_are_digested_and_named_without_their_folder(folder: Path, tmp_path: Path) -> None:
    _, path = converted(folder, tmp_path)
    (source,) = document(path)["sources"]
    assert source["name"] == "model.safetensors.index.json"
    assert len(source["files"]) > 2
    for file in source["files"]:
        data = (folder / "clip" / file["name"]).read_bytes()
        assert (file["size"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert str(folder) not in path.read_text() and str(tmp_path) not in path.read_text()


def test_the_document_is_canonical(folder: Path, tmp_path: Path) -> None:
    _, path = converted(folder, tmp_path)
    data = path.read_bytes()
    assert data == canonical_json(json.loads(data))
    assert data.endswith(b"}\n") and data.count(b"\n") == 1
    odd = {"b": "caf\u00e9 \ud800", "a": [1, 2]}
    assert canonical_json(odd) == '{"a":[1,2],"b":"café \\ud800"}\n'.encode()
    assert json.loads(canonical_json(odd)) == odd


def test_the_same_input_gives_the_same_record(folder: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        where = tmp_path / name
        where.mkdir()
        (where / "sam.pth").write_bytes((folder / "sam.pth").read_bytes())
        outputs = {"out": where / "x.safetensors", "record": [where / "x.json", where / "x.md"]}
        converter.convert(where / "sam.pth", "sam", **outputs)  # type: ignore[arg-type]
    for name in ("x.json", "x.md", "x.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_what_was_filled_in_names_its_source(folder: Path, tmp_path: Path) -> None:
    out, _ = converted(folder, tmp_path)
    back = {"out": tmp_path / "hf.safetensors", "to": "clip-hf", "fill_from": folder / "clip"}
    converter.convert(out, "clip", record=tmp_path / "hf.json", **back)  # type: ignore[arg-type]
    record = document(tmp_path / "hf.json")
    first, second = record["sources"]
    assert len(first["files"]) == 1 < len(second["files"])
    norm = record["tensors"]["vision_model.post_layernorm.weight"]
    assert norm["from"] == [{"key": "vision_model.post_layernorm.weight", "source": 1}]
    assert verify(tmp_path / "hf.safetensors", record=tmp_path / "hf.json").ok


# How it is written ------------------------------------------------------------------------------------------------


def test_a_record_that_exists_is_refused_without_force(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out.json").write_text("mine")
    with pytest.raises(OutputError, match=r"out\.json: exists already\nchoose another path with --record"):
        converted(folder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    converted(folder, tmp_path, force=True)
    assert document(tmp_path / "out.json")["record"] == 1


@pytest.mark.parametrize("name", ["out.json", "other/../out.json"])
def test_a_record_is_no_other_file_of_the_conversion(name: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(OutputError, match="another file of this conversion"):
        converter.convert(
            folder / "clip", "clip", out=tmp_path / "out.json", format="safetensors", record=tmp_path / name
        )
    with pytest.raises(OutputError, match="another file of this conversion"):
        records = [tmp_path / "a.json", tmp_path / name, tmp_path / "a.json"]
        converter.convert(folder / "clip", "clip", out=tmp_path / "out", record=records)


def test_the_record_of_a_folder_is_written_next_to_it(folder: Path, tmp_path: Path) -> None:
    options = {"out": tmp_path / "DIR", "to": "sam-hf", "full_model": True}
    with pytest.raises(OutputError, match="is inside the output folder"):
        converter.convert(folder / "sam.pth", "sam", record=tmp_path / "DIR" / "README.md", **options)  # type: ignore[arg-type]
    with pytest.raises(OutputError, match="there is no folder"):
        converter.convert(folder / "sam.pth", "sam", record=tmp_path / "none" / "c.json", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    converter.convert(folder / "sam.pth", "sam", record=tmp_path / "c.json", **options)  # type: ignore[arg-type]
    assert verify(tmp_path / "DIR", record=tmp_path / "c.json").ok


def test_a_record_of_another_kind_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"ends in \.json, or \.md"):
        converter.convert(folder / "clip", "clip", record="record.txt")


def test_no_record_without_its_output(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: memoryview) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("converter.storage.stream.write_all", full)
    with pytest.raises(OutputError, match="No space left"):
        converted(folder, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_output_without_its_record(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: memoryview) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("converter.output.write.write_all", full)
    with pytest.raises(OutputError, match="No space left"):
        converted(folder, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_writes_none(folder: Path, tmp_path: Path) -> None:
    converted(folder, tmp_path, dry_run=True)
    assert list(tmp_path.iterdir()) == []


# As Markdown ------------------------------------------------------------------------------------------------------


def test_a_model_card_is_read_by_the_hubs_library(folder: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    converter.convert(folder / "sam.pth", "sam", out=tmp_path / "sam.safetensors", record=tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "pytorch" and card.data.base_model is None
    assert card.data.tags == ["deepseek-ocr", "sam", "deepencoder-sam", "dsocr-convert"]
    assert "# sam.safetensors" in card.text
    assert hashlib.sha256((folder / "sam.pth").read_bytes()).hexdigest() in card.text
    assert (
        "| `blocks.{}.attn.qkv.weight` | 3 | float32 [72, 24] | `image_encoder.blocks.{}.attn.qkv.weight` |"
        in card.text
    )
    assert "dsocr-verify sam.safetensors --source sam.pth" in card.text


def test_names_from_a_file_do_not_steer_the_markdown(tmp_path: Path) -> None:
    _, _, make = LAYOUTS["clip-deepseek-ocr"]
    torch.save({**make()[0], "lm`_`head|<b>\n# c": torch.ones(1)}, tmp_path / "x.pth")
    converter.convert(tmp_path / "x.pth", "clip", out=tmp_path / "x.safetensors", record=tmp_path / "x.md")
    text = (tmp_path / "x.md").read_text()
    assert "`lm\u02bb_\u02bbhead\\|<b>\\x0a# c`" in text and "\n# c" not in text


# From a hub -------------------------------------------------------------------------------------------------------


def test_a_remote_source_is_named_by_its_commit(folder: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    repo = Repo("org/sam", {"sam.pth": folder / "sam.pth"})
    with hub_server([repo]) as server:
        command = ("sam", "org/sam", "--record", "x.json", "--record", "x.md")
        done = run(*command, cwd=tmp_path, **environment(server, tmp_path))
    assert done.returncode == 0, done.stderr
    (source,) = document(tmp_path / "x.json")["sources"]
    assert source["name"] == "hf://org/sam/sam.pth" and len(source["commit"]) == 40
    (file,) = source["files"]
    assert file["sha256"] is None and file["reason"].startswith("fetched in parts")
    card = ModelCard.load(tmp_path / "x.md")
    assert card.data.base_model == "org/sam"
    assert f"--source hf://org/sam/sam.pth --revision {source['commit']}" in card.text
    assert verify(tmp_path / "deepencoder-sam.safetensors", record=tmp_path / "x.json", fast=True).ok


# Verified ---------------------------------------------------------------------------------------------------------


def verdicts(out: Path, record: Path, **options: object) -> dict[str, str]:
    """The record's checks, each with its verdict; the rest of the verification must have run too."""
    found = verify(out, record=record, fast=True, **options)  # type: ignore[arg-type]
    checks = [check for check in found.checks if check.group == "record"]
    assert found.ok == all(check.verdict != FAILED for check in found.checks)
    return {check.name: check.verdict for check in checks}


@pytest.mark.parametrize("format", ["safetensors", "pth"])
def test_a_file_fits_its_record(format: str, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    converter.convert(folder / "clip", "clip", out=out, format=format, record=tmp_path / "c.json")
    metadata = {"metadata": PASSED} if format == "safetensors" else {}
    assert verdicts(out, tmp_path / "c.json") == {"tensors": PASSED, **metadata}
    assert verdicts(out, tmp_path / "c.json", source=folder / "clip") == {"tensors": PASSED, **metadata}


def rewritten(out: Path, change: Any) -> None:
    with safetensors.safe_open(out, "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(out)
    change(tensors, metadata)
    safetensors.torch.save_file(tensors, out, metadata)


def test_what_differs_is_named(folder: Path, tmp_path: Path) -> None:
    out, record = converted(folder, tmp_path)

    def change(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        # The k bias: no output shows it.
        tensors["transformer.layers.1.self_attn.qkv_proj.bias"][models.CLIP_WIDTH] += 1e-3
        tensors["pre_layrnorm.weight"] = tensors["pre_layrnorm.weight"].half()
        tensors["embeddings.class_embedding"] = torch.ones(3)
        tensors["more"] = tensors.pop("pre_layrnorm.bias")
        metadata["tool"] = "by hand"

    rewritten(out, change)
    found = verdicts(out, record)
    assert found == dict.fromkeys(
        [
            "more",
            "pre_layrnorm.bias",
            "pre_layrnorm.weight",
            "embeddings.class_embedding",
            "transformer.layers.1.self_attn.qkv_proj.bias",
            "metadata",
        ],
        FAILED,
    )
    details = {
        check.name: check.detail for check in verify(out, record=record, fast=True).checks if check.group == "record"
    }
    assert details["pre_layrnorm.weight"] == "pre_layrnorm.weight is float16 [64], in the record float32 [64]"
    assert "tool is 'by hand', in the record 'dsocr-convert" in details["metadata"]
    assert details["more"] == "more is not in the record"


def test_the_record_of_another_file_is_called_so(folder: Path, tmp_path: Path) -> None:
    out, record = converted(folder, tmp_path)
    rewritten(out, lambda tensors, metadata: [t.add_(1) for t in tensors.values() if t.is_floating_point()])
    assert verdicts(out, record)["file"] == FAILED


@pytest.mark.parametrize("layout", ["clip-hf", "clip-timm", "clip-openai"])
def test_other_layouts_are_checked_against_their_record_alone(layout: str, folder: Path, tmp_path: Path) -> None:
    out, record = converted(folder, tmp_path, to=layout)
    found = verify(out, record=record)
    assert found.ok and {check.group for check in found.checks if check.verdict != "skipped"} == {"record"}
    name = next(iter(document(record)["tensors"]))
    rewritten(out, lambda tensors, metadata: tensors[name].zero_())
    assert verdicts(out, record)[name] == FAILED
    both = verify(out, folder / "clip", record=record, fast=True, device="cpu")
    assert {check.group for check in both.checks if check.verdict == FAILED} == {"record", "bytes"}


NO_RECORDS = ["", "nonsense", "[]", "{}", '{"record":1}', '{"record":1,"tensors":[]}', '{"record":1,"tensors":{"a":1}}']


@pytest.mark.parametrize("content", [*NO_RECORDS, '{"record":2}', "[" * 5000])
def test_what_is_no_record_is_refused(content: str, folder: Path, tmp_path: Path) -> None:
    out, record = converted(folder, tmp_path)
    record.write_text(content)
    with pytest.raises(ContainerError, match=r"out\.json: (not a conversion record|a record of another format)"):
        verify(out, record=record, fast=True)


def test_a_model_card_or_a_missing_one_is_refused(folder: Path, tmp_path: Path) -> None:
    out, _ = converted(folder, tmp_path)
    with pytest.raises(UsageError, match=r"ends in \.json"):
        verify(out, record=tmp_path / "x.md")
    with pytest.raises(ContainerError, match="cannot be read: No such file"):
        verify(out, record=tmp_path / "x.json")


# On the command line ----------------------------------------------------------------------------------------------


def test_the_command_writes_records(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["clip", str(folder / "clip"), "--record", "c.json", "--record", "README.md"]
    done = CliRunner().invoke(cli.app, arguments)
    assert (done.exit_code, done.stdout) == (0, "deepencoder-clip.safetensors\n")
    assert "record: c.json, README.md" in done.stderr
    assert document(tmp_path / "c.json")["tensors"]


# How it is printed ------------------------------------------------------------------------------------------------


def test_transfers_are_those_of_hub_sources(folder: Path) -> None:
    """A local source counts neither in the total nor in the checks; a hub may give no commit."""

    def source(name: str, container: str, nbytes: int) -> RecordedSource:
        return RecordedSource(name, {f"{name}/file": nbytes}, [container], "", [])

    sam, clip = source("hf://org/sam", "torch zip", 3000), source("ms://org/clip", "safetensors", 5000)
    local = source("donor", "safetensors", 90_000)
    record = converter.convert(folder / "sam.pth", "sam", dry_run=True)
    assert not list(render.transfers(dataclasses.replace(record, sources=[local])))
    fetched = {"hf://org/sam/file": 1500}
    said = list(render.transfers(dataclasses.replace(record, sources=[sam, local], fetched=fetched)))
    assert said[0] == "  fetched 1.5 kB of 3.0 kB, 50.0%"
    assert len(said) == 2 and "torch zip: the CRC-32 of every tensor" in said[1]
    fetched |= {"ms://org/clip/file": 2500}
    said = list(render.transfers(dataclasses.replace(record, sources=[sam, clip], fetched=fetched)))
    assert said[0] == "  fetched 4.0 kB of 8.0 kB, 50.0%"
    assert len(said) == 3 and "safetensors has no checksums" in said[1] and "CRC-32" in said[2]

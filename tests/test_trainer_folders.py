"""Folders that trainers write: the checkpoint in them is found, or the choice is listed, and every file is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import models
import pytest
import safetensors.torch
import torch
from hostile.dcp import write
from test_docs import DOCS, under
from walkthrough import check

import converter
from converter.checkpoint.file_kinds import describe
from converter.checkpoint.open import open_checkpoint
from converter.cli.main import convert
from converter.errors import ContainerError

A = {"a": torch.ones(2)}
BY_PRODUCTS = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json")
ZERO_1 = ("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",)


def put(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")
    return folder


def trainer(folder: Path) -> None:
    """transformers' Trainer, ms-swift and unsloth."""
    safetensors.torch.save_file(A, put(folder, *BY_PRODUCTS) / "model.safetensors")


def deepspeed(folder: Path) -> None:
    """Under the Trainer, with ZeRO-1."""
    put(folder, *BY_PRODUCTS, "zero_to_fp32.py")
    (folder / "latest").write_text("global_step7")
    torch.save({"module": A}, put(folder / "global_step7", *ZERO_1) / "mp_rank_00_model_states.pt")
    put(folder / "global_step3", "mp_rank_00_model_states.pt")


def lightning(folder: Path) -> None:
    torch.save({"state_dict": A}, put(folder / "version_0" / "checkpoints") / "epoch=0-step=10.ckpt")


def lightning_fsdp(folder: Path) -> None:
    write(put(folder / "checkpoints") / "epoch=0-step=10.ckpt", {"model": A, "optimizer_0": {"x": torch.ones(1)}})
    put(folder / "checkpoints" / "epoch=0-step=10.ckpt", "meta.pt")


def accelerate_fsdp(folder: Path) -> None:
    put(folder, *BY_PRODUCTS)
    write(folder / "pytorch_model_fsdp_0", {"model": A})
    write(folder / "optimizer_0", {"optimizer": {"x": torch.ones(1)}})


def torchtitan(folder: Path) -> None:
    write(folder, A | {"optimizer": {"x": torch.ones(1)}, "train_state": {"step": 10}})


TRAINERS = (trainer, deepspeed, lightning, lightning_fsdp, accelerate_fsdp, torchtitan)


@pytest.mark.parametrize("save", TRAINERS)
def test_the_checkpoint_is_found(save: object, tmp_path: Path) -> None:
    """In the folder itself, and in the only step of a training; of several steps, none is chosen."""
    assert callable(save)
    for step in (100, 20):
        save(tmp_path / "runs" / f"checkpoint-{step}")
    found = open_checkpoint(tmp_path / "runs" / "checkpoint-20")
    assert "'a': TensorInfo" in str(found.contents)
    with pytest.raises(ContainerError, match=r"runs: has no checkpoint itself; 2 of its folders have one: .*-20.*-100"):
        open_checkpoint(tmp_path / "runs")
    (tmp_path / "runs" / "checkpoint-100").rename(tmp_path / "elsewhere")
    again = open_checkpoint(tmp_path / "runs")
    assert [file.name for file in again.files] == [file.name for file in found.files]
    assert again.notes[0].startswith("read from its folder checkpoint-20")


def test_the_config_of_the_step_is_used_or_that_next_to_its_folder(tmp_path: Path) -> None:
    deepspeed(tmp_path)
    assert open_checkpoint(tmp_path).read_config("config.json") is None
    for path in (tmp_path, tmp_path / "global_step7"):
        (path / "config.json").write_text(f'{{"where": "{path.name}"}}')
        assert open_checkpoint(tmp_path).read_config("config.json") == {"where": path.name}


@pytest.mark.parametrize("count", [2, 30])
def test_steps_are_listed_with_commands(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in range(count):
        trainer(tmp_path / "my runs" / f"checkpoint-{step}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dsocr-convert", "clip", "my runs/", "--to", "clip-timm"])
    assert convert() == 3
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == f"  dsocr-convert clip 'my runs/checkpoint-{count - 1}' --to clip-timm"
    assert sum("dsocr-convert clip" in line for line in lines) == min(count, 8) and len(lines) <= 12


def test_files_of_one_folder_are_listed_with_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("last.ckpt", "epoch=0-step=10.ckpt"):
        torch.save({"state_dict": A}, put(tmp_path / "version_0" / "checkpoints") / name)
    monkeypatch.setattr(sys, "argv", ["dsocr-convert", "sam", str(tmp_path)])
    assert convert() == 3
    assert capsys.readouterr().err.endswith(f"  dsocr-convert sam {tmp_path}/version_0/checkpoints/last.ckpt\n")


def test_zero_3_is_refused_with_the_script_that_gathers_it(tmp_path: Path) -> None:
    put(tmp_path / "checkpoint-1", "zero_to_fp32.py")
    (tmp_path / "checkpoint-1" / "latest").write_text("global_step1")
    put(tmp_path / "checkpoint-1" / "global_step1", "zero_pp_rank_0_mp_rank_00_model_states.pt")
    for source in (tmp_path, tmp_path / "checkpoint-1"):
        with pytest.raises(ContainerError, match=r"global_step1: .*ZeRO-3.*\n.*python zero_to_fp32.py \. gathered"):
            open_checkpoint(source)


def test_inspect_tells_what_the_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    deepspeed(tmp_path)
    put(tmp_path, "rng_state_0.pth", "rng_state_1.pth", "a\x1b[2J", "weights.onnx")
    files = {files.name: files for files in converter.inspect(tmp_path).folder}
    assert files["rng_state_*.pth"].count == 2
    assert files["global_step*/mp_rank_*_model_states.pt"].is_read and not files["optimizer.pt"].is_read
    assert files["zero_to_fp32.py"].what == "DeepSpeed's script that gathers the weights"
    assert files["weights.onnx"].what == "an ONNX or CoreML model" and files["a\\x1b[2J"].what == ""
    monkeypatch.setattr(sys, "argv", ["dsocr-convert", "inspect", str(tmp_path)])
    assert convert() == 0
    assert "\n> global_step*/mp_rank_*_model_states.pt (x 2)  " in capsys.readouterr().out
    # Also where there is no checkpoint to choose.
    (tmp_path / "latest").unlink()
    assert convert() == 3
    put(tmp_path / "global_step3", *ZERO_1)
    (tmp_path / "global_step3" / "mp_rank_00_model_states.pt").unlink()
    (tmp_path / "global_step7" / "mp_rank_00_model_states.pt").unlink()
    sys.argv.append("--json")
    capsys.readouterr()
    assert convert() == 3
    listed = json.loads(capsys.readouterr().out)["folder"]
    assert {entry["name"] for entry in listed} >= {"scheduler.pt", "rng_state_*.pth"}


def test_the_recipes_of_the_docs(tmp_path: Path) -> None:
    """docs/fine-tuned.md, on a tiny CLIP."""
    state = {name: tensor.clone() for name, tensor in models.clip_hf_vision().state_dict().items()}
    tuned = {n: t * 1.01 if "layers.1." in n or "layers.2." in n else t for n, t in state.items()}
    for name, tensors in {"base": state, "runs/checkpoint-100": state, "runs/checkpoint-200": tuned}.items():
        safetensors.torch.save_file(tensors, put(tmp_path / name, *BY_PRODUCTS[: name != "base"]) / "model.safetensors")
    write(tmp_path / "titan" / "step-10", tuned | {"optimizer": {"a": torch.ones(1), "b": torch.ones(1)}})
    for name in ("zero", "zero3"):
        put(tmp_path / name, "zero_to_fp32.py")
        (tmp_path / name / "latest").write_text("global_step20")
        (tmp_path / name / "config.json").write_text("{}")
        put(tmp_path / name / "global_step20", *ZERO_1)
    torch.save({"module": tuned}, tmp_path / "zero" / "global_step20" / "mp_rank_00_model_states.pt")
    put(tmp_path / "zero3" / "global_step20", "zero_pp_rank_0_mp_rank_00_model_states.pt")
    put(tmp_path / "verl" / "global_step_3" / "actor", "model_world_size_2_rank_0.pt", "optim_world_size_2_rank_0.pt")
    logs = put(tmp_path / "lightning_logs" / "version_0" / "checkpoints")
    for name in ("epoch=0-step=10.ckpt", "last.ckpt"):
        torch.save({"state_dict": {f"model.{key}": tensor for key, tensor in tuned.items()}}, logs / name)
    page = DOCS / "fine-tuned.md"
    headings = ("## Which checkpoint is read", "## Trainer, ms-swift, unsloth", "## FSDP and torchtitan: DCP folders")
    for heading in (*headings, "## DeepSpeed", "## verl", "## Lightning"):
        check(under(page, heading), tmp_path)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model-00001-of-00002.safetensors", "a shard of weights"),
        ("model.safetensors.index.json", "an index of shards"),
        ("adapter_model.safetensors", "a LoRA adapter"),
        ("vit.safetensors", "the vision encoder and projector next to an adapter (ms-swift)"),
        ("optim_world_size_8_rank_0.pt", "states of the optimizer"),
        ("model_world_size_8_rank_0.pt", "a part of each tensor (verl)"),
        ("__3_0.distcp", "tensors of a DCP checkpoint"),
        ("zero_pp_rank_0_mp_rank_00_model_states.pt", "a part of each tensor (DeepSpeed ZeRO-3)"),
        ("flax_model.msgpack", "Flax weights (MessagePack)"),
        ("notes", ""),
    ],
)
def test_kinds_of_files(name: str, what: str) -> None:
    assert describe(name) == what

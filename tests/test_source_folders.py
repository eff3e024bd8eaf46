"""Folders as sources: which files are the checkpoint, and what is said where there is none."""

from __future__ import annotations

import json
from argparse import Namespace
from contextlib import closing
from pathlib import Path, PurePath

import models
import pytest
import safetensors.torch
import torch

import converter
from converter.checkpoint.open import Checkpoint, open_checkpoint
from converter.errors import ContainerError, SourceError

A, B = {"a": torch.ones(2)}, {"b": torch.zeros(3)}


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def shards(folder: Path, *names: str, index: str = "") -> Path:
    weight_map = {}
    for name, tensors in zip(names, (A, B), strict=True):
        safetensors.torch.save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    if index:
        (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def opened(path: Path) -> Checkpoint:
    with closing(open_checkpoint(path)) as checkpoint:
        return checkpoint


BY_PRODUCTS = [
    "training_args.bin", "optimizer.pt", "optimizer.bin", "optimizer_1.bin", "scheduler.pt", "lr_scheduler.pt",
    "dataloader.pt", "optimizer-0.bin",
    "rng_state.pth", "rng_state_0.pth", "random_states_0.pt", "scaler.pt", "sampler.bin",
    "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
]  # fmt: skip


def test_by_products_are_no_checkpoints(tmp_path: Path) -> None:
    put(tmp_path, *BY_PRODUCTS)
    with pytest.raises(ContainerError, match=r"contains no checkpoint; bf16_.*training_args.bin: written by a trainer"):
        opened(tmp_path)
    torch.save(A, tmp_path / "optimal.pth.tar")
    assert list(opened(tmp_path).contents) == ["a"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("training_args.bin", Namespace(a=1)), ("rng_state.pth", {"cpu": torch.ones(2)}), ("scheduler.pt", {"step": 1})],
)
def test_a_by_product_in_place_of_the_weights(name: str, content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / name)
    with pytest.raises(SourceError, match=r"\nby its name it holds .*: convert the weights next to it"):
        converter.convert(tmp_path / name, "clip", out=tmp_path / "out.safetensors")


def test_the_files_of_openvino_are_named(tmp_path: Path) -> None:
    (tmp_path / "openvino_model.bin").write_bytes(b"\1\2\3\4" * 9)
    with pytest.raises(ContainerError, match="an OpenVINO model"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["sam.PTH", "sam.pth.tar", "sam.ckpt", "SAM.Safetensors"])
def test_endings_in_any_case(name: str, tmp_path: Path) -> None:
    torch.save(A, tmp_path / name)
    put(tmp_path, "notes.tar")
    assert opened(tmp_path).name == str(tmp_path / name)


@pytest.mark.parametrize(
    ("names", "index"),
    [
        (("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), ""),
        (("x-0-of-2.fp16.safetensors", "x-1-of-2.fp16.safetensors"), ""),
        (("model.fp16-00001-of-000002.safetensors", "model.fp16-00002-of-000002.safetensors"), ""),
        (("a.safetensors", "b.safetensors"), "model.safetensors.index.json"),
        (("m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"), "m.safetensors.index.fp16.json"),
        (("m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"), "other.index.json"),
        (("part1.safetensors", "part2.safetensors"), "other.index.json"),
    ],
)
def test_shards(names: tuple[str, str], index: str, tmp_path: Path) -> None:
    put(tmp_path, "tf_model.h5.index.json", "training_args.bin")
    checkpoint = opened(shards(tmp_path, *names, index=index))
    assert sorted(checkpoint.contents) == ["a", "b"]
    assert [PurePath(file.name).name for file in checkpoint.files] == list(names)
    assert checkpoint.notes == (() if index else ("no index: read the 2 shards by their headers",))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_an_index_as_programs_on_windows_write_it_under_any_name(encoding: str, tmp_path: Path) -> None:
    shards(tmp_path, "1.safetensors", "2.safetensors", index="model.safetensors.index.json")
    text = (tmp_path / "model.safetensors.index.json").read_text().replace(",", ",\r\n")
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode(encoding))
    assert sorted(opened(tmp_path).contents) == ["a", "b"]
    (tmp_path / "renamed.json").write_text(text)
    assert sorted(opened(tmp_path / "renamed.json").contents) == ["a", "b"]


@pytest.mark.parametrize("index", ["", "model.safetensors.index.json"])
def test_one_shard_is_read_alone(index: str, tmp_path: Path) -> None:
    """Whole encoders in it convert, with a note; for all others the error says how to read all shards."""
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    state = {name: tensor.clone() for name, tensor in models.clip_hf_vision().state_dict().items()}
    language = {"lm_head.weight": torch.ones(2)}
    step = f"give {index} next to it" if index else "give its folder"
    last = f"layers.{models.CLIP_DEPTH - 1}."
    cuts = [state, {name: state[name] for name in list(state)[:9]}, {"norm.weight": torch.ones(2)}]
    # Without the last layer, it is a CLIP of fewer layers: only the index shows that it is not whole.
    cuts += [{name: tensor for name, tensor in state.items() if last not in name}] if index else []
    for first in cuts:
        second = {name: tensor for name, tensor in state.items() if name not in first} | language
        for name, tensors in zip(names, (first, second), strict=True):
            safetensors.torch.save_file(tensors, tmp_path / name)
        if index:
            listed = {name: shard for shard, held in zip(names, (first, second), strict=True) for name in held}
            (tmp_path / index).write_text(json.dumps({"weight_map": listed}))
        assert f"{names[0]}: one of 2 shards, read alone; for the whole, {step}" in opened(tmp_path / names[0]).notes
        if first is state:
            converter.convert(tmp_path / names[0], "clip", out=tmp_path / "out" / "x.pth", dry_run=True)
            continue
        with pytest.raises(SourceError) as caught:
            converter.convert(tmp_path / names[0], "clip", dry_run=True)
        assert caught.value.hint == f"the file is one of several shards: {step}"
        converter.convert(tmp_path, "clip", dry_run=True)


def test_a_set_of_one_shard(tmp_path: Path) -> None:
    safetensors.torch.save_file(A, tmp_path / "model-00001-of-000001.safetensors")
    assert opened(tmp_path).name.endswith("model-00001-of-000001.safetensors")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "is an empty folder"),
        (("model-00001-of-00003.pth", "model-00003-of-00003.pth"), r"lacks shards: model-00002-of-00003\.pth\n"),
        (("model-00002-of-00002.pth",), r"lacks shards: model-00001-of-00002\.pth\n"),
        (("a-1-of-1.pth", "b-1-of-1.pth"), r"several checkpoints: a-1-of-1\.pth, b-1-of-1\.pth"),
        (("a-1-of-2.pth", "a-2-of-2.pth", "b.pth"), r"several checkpoints: a-\*-of-2\.pth, b\.pth"),
        (("a.safetensors.index.json", "b.safetensors.index.json"), "several checkpoints: a"),
        (("model.safetensors.incomplete", "config.json"), "unfinished download: model.safetensors.incomplete"),
        (("model.safetensors.tmp",), "unfinished download: model.safetensors.tmp"),
        ((".cache/x.incomplete", "config.json"), r"contains no checkpoint\nlooked for [^\n]*$"),
        (("x.safetensors", "x.safetensors.aria2"), "x.safetensors: an unfinished download of aria2"),
        (("flax_model.msgpack", "config.json"), r"flax_model\.msgpack is Flax.*\n.*from_flax"),
        (("model.onnx",), "model.onnx is an ONNX or CoreML model"),
        (("model.engine", "config.json"), "model.engine is a TensorRT engine"),
        (("_sharding", "manifest.ocdbt", "d/x"), "an Orbax checkpoint"),
        (("._sam.pth", "config.json"), "contains no checkpoint"),
        (("x.mlpackage/Manifest.json",), "x.mlpackage is a CoreML model"),
        (("data.pkl", "version", "data/0"), r"an unpacked file of torch.save\n.*zip -0 -r weights.pth FOLDER"),
        (("a/b/c/d/model.safetensors", "config.json"), r"no checkpoint\n.*\n.*folders, give that: a"),
        (("optimizer_0/x.pth", ".git/x.pth", "step_universal/x.pth"), "contains no checkpoint"),
        (("model_world_size_2_rank_0.pt",), r"tensor \(verl\).*\n.*verl.model_merger merge .*--local_dir "),
        (("shard-00001-model-00001-of-00001.safetensors",), r"HuggingFaceStorageWriter.*\n.*consolidate_safetensors"),
        (("zero_pp_rank_0_mp_rank_00_model_states.pt",), r"ZeRO-3.*\n.*the folder above.*: python zero_to_fp32.py \. "),
        (("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"), r"model-parallel ranks.*\n.*give mp_rank_00_"),
    ],
)  # fmt: skip
def test_folders_without_a_checkpoint(names: tuple[str, ...], message: str, tmp_path: Path) -> None:
    put(tmp_path, *names)
    with pytest.raises(ContainerError, match=message):
        opened(tmp_path)


def test_files_of_macos_do_not_count(tmp_path: Path) -> None:
    put(tmp_path, "._x.safetensors", "._x.safetensors.index.json", "._0.distcp", "._.metadata")
    torch.save({"a": A}, tmp_path / "x.pth")
    assert opened(tmp_path).contents.keys() == {"a"}


def test_latest_is_followed(tmp_path: Path) -> None:
    put(tmp_path, "training_args.bin", "global_step5/mp_rank_00_model_states.pt")
    (tmp_path / "global_step10").mkdir()
    torch.save({"module": A}, tmp_path / "global_step10" / "mp_rank_00_model_states.pt")
    (tmp_path / "latest").write_bytes(b"\xef\xbb\xbfglobal_step10\r\n")
    assert opened(tmp_path).contents["module"].keys() == {"a"}
    # The weights that the trainer gathered are in the folder itself.
    safetensors.torch.save_file(B, tmp_path / "model.safetensors")
    assert opened(tmp_path).contents.keys() == {"b"}

"""What a conversion says of its values and names: casts, converted files, output suffixes, odd position tensors."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import models
import pytest
import safetensors.torch
import torch

import converter
from converter.errors import MAX_MESSAGE, DsocrError, UsageError
from converter.output.write import format_for
from converter.tensors.dtypes import BY_NAME
from converter.tensors.lazy_tensor import Generated, is_arange

State = dict[str, torch.Tensor]
POSITIONS = "vision_model.embeddings.position_ids"


def clip() -> State:
    return {key: tensor.clone() for key, tensor in models.clip_hf().state_dict().items() if "vision" in key}


def put(state: State, path: Path) -> Path:
    safetensors.torch.save_file(state, path)
    return path


def written(source: Path, out: Path, **options: object) -> State:
    assert converter.convert(source, "clip", out=out, force=True, **options).written
    return safetensors.torch.load_file(out)


# Casts ------------------------------------------------------------------------------------------------------------


def overflowing() -> State:
    state = clip()
    state["vision_model.encoder.layers.0.mlp.fc1.weight"].view(-1)[:5] = 1e6
    state["vision_model.encoder.layers.1.self_attn.k_proj.bias"][:2] = -65520  # rounds to infinity
    state["vision_model.pre_layrnorm.weight"][0] = 65519  # rounds to the largest value of float16
    state["vision_model.pre_layrnorm.bias"][:2] = torch.tensor([torch.inf, torch.nan])
    return state


OVERFLOWS = {
    "transformer.layers.0.mlp.fc1.weight": 5,
    "transformer.layers.1.self_attn.qkv_proj.bias": 2,
}


def test_values_that_a_cast_makes_infinite_are_counted(tmp_path: Path) -> None:
    source, out, record = put(overflowing(), tmp_path / "a.safetensors"), tmp_path / "o.pth", tmp_path / "r.json"
    made = converter.convert(source, "clip", out=out, dtype="float16", record=record)
    assert made.overflows == json.loads(record.read_text())["overflows"] == OVERFLOWS
    loaded = torch.load(out)
    lost = {name: int(torch.isinf(tensor).sum()) for name, tensor in loaded.items()}
    assert {name: number for name, number in lost.items() if number} == {**OVERFLOWS, "pre_layrnorm.bias": 1}
    assert converter.convert(source, "clip", out=tmp_path / "b.pth", dtype="bfloat16").overflows == {}


@pytest.mark.parametrize(
    ("before", "after", "value"), [(torch.float64, "float32", 1e300), (torch.bfloat16, "float16", 1e30)]
)
def test_casts_from_other_types(before: torch.dtype, after: str, value: float, tmp_path: Path) -> None:
    state = {key: tensor.to(before) if tensor.is_floating_point() else tensor for key, tensor in clip().items()}
    state["vision_model.pre_layrnorm.bias"][1] = value
    made = converter.convert(put(state, tmp_path / "a.safetensors"), "clip", out=tmp_path / "o.pth", dtype=after)
    assert made.overflows == {"pre_layrnorm.bias": 1}


def test_load_warns(tmp_path: Path) -> None:
    source = put(overflowing(), tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match=r"7 finite values infinite.*fc1.weight \(5\), .*qkv_proj.bias \(2\);"):
        converter.load(source, "clip", dtype=torch.float16)


# Converted files --------------------------------------------------------------------------------------------------


def test_a_converted_file_is_converted_where_something_differs(tmp_path: Path) -> None:
    canonical = written(put(clip(), tmp_path / "hf.safetensors"), tmp_path / "a.safetensors")
    out = tmp_path / "out.safetensors"
    made = converter.convert(tmp_path / "a.safetensors", "clip", out=out)
    assert made.unchanged and not made.written and not out.exists()
    assert made.output == str(tmp_path / "a.safetensors")

    half = written(tmp_path / "a.safetensors", out, dtype="float16")
    assert half["pre_layrnorm.bias"].dtype == torch.float16
    assert converter.convert(tmp_path / "a.safetensors", "clip", out=tmp_path / "out.pth").written
    resampled = written(tmp_path / "a.safetensors", out, image_size=28)
    assert resampled["embeddings.position_embedding.weight"].shape[0] == 5
    names = written(tmp_path / "a.safetensors", out, to="clip-hf", fill_from=tmp_path / "hf.safetensors").keys()
    assert "vision_model.pre_layrnorm.bias" in names

    torch.save(
        {"model": {f"module.{key}": tensor for key, tensor in canonical.items()}, "epoch": 3}, tmp_path / "s.pth"
    )
    again = written(tmp_path / "s.pth", out)
    assert again.keys() == canonical.keys() and all(torch.equal(again[key], canonical[key]) for key in again)
    result = converter.verify(out, source=tmp_path / "s.pth", fast=True)
    assert result.ok
    with pytest.raises(UsageError, match="is the converted file itself"):
        converter.verify(out, source=out, fast=True)


# Names of outputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.PTH", "x.pth.tar", "x.ckpt", "x.bin", "x.pt", "x.Pt"])
def test_names_of_torch_files(name: str, tmp_path: Path) -> None:
    assert converter.convert(put(clip(), tmp_path / "a"), "clip", out=tmp_path / name).format == "pth"
    assert zipfile.is_zipfile(tmp_path / name) and torch.load(tmp_path / name)


@pytest.mark.parametrize("name", ["x.tar", "x.pkl", "x.ggml", "x.h5", "pth.1"])
def test_names_without_a_format(name: str) -> None:
    with pytest.raises(UsageError, match=r"implies no format\n.*--format"):
        format_for(name, None)
    assert format_for(name, "pth") == "pth"


def test_other_names() -> None:
    assert [format_for(name, None) for name in ("x", "x.SafeTensors", None)] == ["safetensors"] * 3


# Positions --------------------------------------------------------------------------------------------------------


def test_position_ids_without_the_axis_of_the_batch(tmp_path: Path) -> None:
    source = put({**clip(), POSITIONS: torch.arange(17)}, tmp_path / "a.safetensors")
    ids = written(source, tmp_path / "o.safetensors")["embeddings.position_ids"]
    assert torch.equal(ids, torch.arange(17).view(1, -1))
    reverse = put({**clip(), POSITIONS: torch.arange(17).flip(0)}, source)
    with pytest.raises(DsocrError, match=r"has shape \[17\]"):
        converter.convert(reverse, "clip", out=tmp_path / "p.safetensors")


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.uint8]
)
def test_position_ids_of_another_type(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {**clip(), POSITIONS: torch.arange(17).view(1, -1).to(dtype)}
    source = put(state, tmp_path / "a.safetensors")
    ids = written(source, tmp_path / "o.safetensors")["embeddings.position_ids"]
    assert ids.dtype == torch.int64 and torch.equal(ids, torch.arange(17).view(1, -1))
    state[POSITIONS][0, 3] = 4
    with pytest.raises(DsocrError, match=f"'{POSITIONS}'\\) is .*expected int64"):
        converter.convert(put(state, source), "clip", out=tmp_path / "p.safetensors")


@pytest.mark.parametrize("name", ["float16", "bfloat16", "int8", "uint16"])
def test_rounded_indices(name: str) -> None:
    """As torch rounds them: of 577 positions, bfloat16 holds half of those above 256."""
    for numel in (1, 127, 128, 129, 577, 4097):
        values = torch.arange(numel).to(getattr(torch, name))
        data = values.view(torch.uint8).numpy().tobytes()
        found = is_arange(Generated(BY_NAME[name], (1, numel), lambda data=data: data))  # type: ignore[misc]
        assert found == (name != "int8" or numel <= 128)


def test_positions_that_are_no_square(tmp_path: Path) -> None:
    state = clip()
    state.pop(POSITIONS, None)
    state["vision_model.embeddings.position_embedding.weight"] = torch.ones(1 + 4 * 8, models.CLIP_WIDTH)
    made = converter.convert(put(state, tmp_path / "a.safetensors"), "clip", out=tmp_path / "o.safetensors")
    assert any("has 32 positions" in note and "no square" in note for note in made.notes)


# Messages ---------------------------------------------------------------------------------------------------------


def test_tensors_in_place_of_a_path(tmp_path: Path) -> None:
    path = put(clip(), tmp_path / "a.safetensors")
    for call in (
        lambda: converter.convert(clip(), "clip"),  # type: ignore[arg-type]
        lambda: converter.load(clip(), "clip"),  # type: ignore[arg-type]
        lambda: converter.verify(path, clip(), fast=True),
    ):
        with pytest.raises(UsageError, match=r"a path or an address, not a (dict|Tensor)\n.*torch\.save") as caught:
            call()
        assert len(str(caught.value)) < 200


def test_messages_are_bounded() -> None:
    error = DsocrError("a" * 150_000 + "b", "h")
    assert len(error.message) <= MAX_MESSAGE + 5 and error.message.endswith("b") and error.hint == "h"

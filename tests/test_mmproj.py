"""llama.cpp's mmproj: GGUF files of DeepSeek-OCR's vision encoder, read in every way, and written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hostile import ggufs
from inventories import mmproj_name
from test_mlx import State, check_equal, deepseek, deepseek_2, save

import converter
from converter.errors import LayoutError
from converter.layouts import registry

PROJECTOR = (
    "model.projector.layers.weight",
    "model.projector.layers.bias",
    "model.image_newline",
    "model.view_seperator",
)
# By layout: its family, its counterpart in torch's containers, and a checkpoint with the latter.
LAYOUTS: dict[str, tuple[str, str, Callable[[], State]]] = {
    "sam-mmproj": ("sam", "sam-deepseek-ocr", deepseek),
    "clip-mmproj": ("clip", "clip-deepseek-ocr", deepseek),
    "qwen2-mmproj": ("qwen2", "qwen2-deepseek-ocr2", deepseek_2),
}


def with_projector(state: State, hidden: int = 32) -> State:
    """A checkpoint with its projector and vectors; the first version has a newline."""
    torch.manual_seed(3)
    is_second = any(".qwen2_model." in name for name in state)
    width = state["model.sam_model.net_3.weight"].shape[0] * (1 if is_second else 2)
    shapes = dict(zip(PROJECTOR, ((hidden, width), (hidden,), (hidden,), (hidden,)), strict=True))
    if is_second:
        del shapes["model.image_newline"]
    return state | {name: torch.randn(shape) for name, shape in shapes.items()}


def to_mmproj(state: State) -> State:
    """llama.cpp's names and shapes."""
    named = {mmproj_name(name): tensor for name, tensor in state.items()}
    return {name: tensor[None] if name.endswith("view_seperator") else tensor for name, tensor in named.items()}


def put(state: State, path: Path) -> Path:
    path.write_bytes(ggufs.written(ggufs.described(state)))
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_mmproj_is_read_as_its_torch_checkpoint_and_written_back(
    layout: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("reads", f"{layout}/GGUF")
    record_property("writes", f"{layout}/safetensors")
    family, torchs, make = LAYOUTS[layout]
    state = with_projector(make())
    file, plain = put(to_mmproj(state), tmp_path / "mmproj.gguf"), save(state, tmp_path / "plain.safetensors")
    out, expected = tmp_path / "out.safetensors", tmp_path / "expected.safetensors"
    assert converter.convert(file, family, out=out).mapping == layout
    assert converter.convert(plain, family, out=expected).mapping == torchs
    check_equal(safetensors.torch.load_file(out), safetensors.torch.load_file(expected))
    check_equal(converter.load(file, family), safetensors.torch.load_file(expected))
    assert converter.diff(put(to_mmproj(make()), tmp_path / "b.gguf"), save(make(), tmp_path / "b.safetensors")).equal
    back = tmp_path / "back.safetensors"
    converter.convert(out, family, to=layout, out=back)
    prefix = registry.load(layout).signature.prefixes[0]
    names = {name for name in to_mmproj(make()) if name.startswith(prefix)}
    written = safetensors.torch.load_file(back)
    assert written.keys() == {name for name in names if prefix == "v.sam." or not name.startswith("v.sam.")}
    check_equal(written, {name: to_mmproj(state)[name] for name in written})


def test_an_encoder_is_taken_out_of_an_mmproj(tmp_path: Path) -> None:
    state = with_projector(deepseek())
    file = put(to_mmproj(state), tmp_path / "mmproj.gguf")
    record = converter.encoder(file, out=tmp_path / "out.safetensors", with_projector=True)
    check_equal(safetensors.torch.load_file(tmp_path / "out.safetensors"), state)
    assert record.mapping == "sam-mmproj + clip-mmproj" and not record.dropped


def test_inspect_finds_both_encoders(tmp_path: Path) -> None:
    file = put(to_mmproj(with_projector(deepseek())), tmp_path / "mmproj.gguf")
    assert [match.layout for match in converter.inspect(file).layouts] == ["sam-mmproj", "clip-mmproj"]
    file = put(to_mmproj(with_projector(deepseek_2())), tmp_path / "mmproj.gguf")
    assert [match.layout for match in converter.inspect(file).layouts] == ["sam-mmproj", "qwen2-mmproj"]


def test_quantised_parts_are_refused_only_where_they_are_needed(tmp_path: Path) -> None:
    described = ggufs.described(to_mmproj(with_projector(deepseek())))
    data = ggufs.written(
        each._replace(type=8, shape=(32, 6), data=bytes(6 * 34)) if each.name == b"v.blk.0.attn_out.weight" else each
        for each in described
    )
    (tmp_path / "mmproj.gguf").write_bytes(data)
    converter.convert(tmp_path / "mmproj.gguf", "sam", out=tmp_path / "sam.safetensors")
    with pytest.raises(LayoutError, match=r"quantised weights \(Q8_0\).*attn_out.*\n.*dequantise"):
        converter.convert(tmp_path / "mmproj.gguf", "clip", out=tmp_path / "clip.safetensors")

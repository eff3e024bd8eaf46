"""--image-size: position embeddings resampled as DeepSeek-OCR does at run time."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path

import models
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import interpolate

import converter
from converter.checkpoint.open import open_checkpoint
from converter.encoders import SamEncoder
from converter.errors import MappingError, UsageError
from converter.tensors.lazy_tensor import cast, is_resampled, lazy_read, resampled

State = dict[str, torch.Tensor]
WINDOWED = [layer for layer in range(models.DEPTH) if layer not in models.GLOBAL_BLOCKS]


def converted(folder: Path, image_size: int | None, **changed: torch.Tensor) -> State:
    state = {name: tensor.clone() for name, tensor in models.sam_meta().state_dict().items()} | changed
    torch.save(state, folder / "sam.pth")
    out = folder / f"{image_size}.safetensors"
    converter.convert(folder / "sam.pth", "sam", out=out, image_size=image_size, force=True)
    return load_file(out)


@pytest.mark.parametrize("grid", [2, 3, 7, 8])
def test_positions_of_sam(grid: int, tmp_path: Path) -> None:
    before, after = converted(tmp_path, None), converted(tmp_path, grid * models.PATCH)
    # get_abs_pos_sam and get_rel_pos in deepencoder.py of DeepSeek-OCR.
    image = before["pos_embed"].permute(0, 3, 1, 2)
    image = interpolate(image, size=(grid, grid), mode="bicubic", antialias=True, align_corners=False)
    assert torch.equal(after["pos_embed"], image.permute(0, 2, 3, 1))
    for layer in range(models.DEPTH):
        for axis in "hw":
            name = f"blocks.{layer}.attn.rel_pos_{axis}"
            expected = before[name]
            if layer not in WINDOWED:
                rows = expected.reshape(1, len(expected), -1).permute(0, 2, 1)
                rows = interpolate(rows, size=2 * grid - 1, mode="linear")
                expected = rows.reshape(-1, 2 * grid - 1).permute(1, 0)
            assert torch.equal(after[name], expected)
    others = [name for name in before if "pos" not in name]
    assert all(torch.equal(before[name], after[name]) for name in others)


def test_outputs_are_those_of_resampling_at_run_time(tmp_path: Path) -> None:
    grid = 6
    encoders = [
        SamEncoder(models.sam_sizes()),
        SamEncoder(dataclasses.replace(models.sam_sizes(), image_size=grid * models.PATCH)),
    ]
    for encoder, image_size in zip(encoders, (None, grid * models.PATCH), strict=True):
        encoder.load_state_dict(converted(tmp_path, image_size), strict=False)
        encoder.eval()
    pixels = torch.randn(1, 3, grid * models.PATCH, grid * models.PATCH)
    with torch.inference_mode():
        at_run_time, stored = (encoder.features(pixels) for encoder in encoders)
    assert torch.allclose(at_run_time, stored, atol=1e-5)


def test_the_same_size_copies(tmp_path: Path) -> None:
    before, after = converted(tmp_path, None), converted(tmp_path, models.GRID * models.PATCH)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_resampled_sam_is_verified(tmp_path: Path) -> None:
    converted(tmp_path, 6 * models.PATCH)
    result = converter.verify(tmp_path / "96.safetensors", tmp_path / "sam.pth", sizes=(64,), device="cpu")
    assert result.ok, result


def test_windows_as_large_as_the_image(tmp_path: Path) -> None:
    """With equal lengths, layers cannot be told apart; of 3 layers nothing is known."""
    size = 2 * models.WINDOW - 1
    changed = {"image_encoder.pos_embed": torch.randn(1, models.WINDOW, models.WINDOW, models.WIDTH)}
    changed |= {
        f"image_encoder.blocks.{layer}.attn.rel_pos_{axis}": torch.randn(size, models.WIDTH // models.HEADS)
        for layer in range(models.DEPTH)
        for axis in "hw"
    }
    with pytest.raises(MappingError, match="the 3 layers cannot be told apart"):
        converted(tmp_path, 4 * models.PATCH, **changed)
    # Four layers, each of them global, as in SAM with four groups of layers.
    for name, tensor in models.sam_meta().state_dict().items():
        if ".blocks.0." in name:
            changed[name.replace(".0.", ".3.", 1)] = changed.get(name, tensor).clone()
    after = converted(tmp_path, 4 * models.PATCH, **changed)
    assert {len(after[f"blocks.{layer}.attn.rel_pos_h"]) for layer in range(4)} == {7}


@pytest.mark.parametrize(
    ("prefix", "words"), [("image_encoder.", "matches nothing: image_encoder.pos_embed"), ("", "missing .*'pos_embed'")]
)
def test_missing_positions_are_reported(prefix: str, words: str, tmp_path: Path) -> None:
    """In Meta's names and in the DeepEncoder's, which are the same without a prefix."""
    state = {name.replace("image_encoder.", prefix): tensor for name, tensor in models.sam_meta().state_dict().items()}
    del state[f"{prefix}pos_embed"]
    torch.save(state, tmp_path / "sam.pth")
    with pytest.raises(MappingError, match=words):
        converter.convert(tmp_path / "sam.pth", "sam", dry_run=True, image_size=6 * models.PATCH)


@pytest.mark.parametrize("image_size", [17, 0, 9000])
def test_sizes_that_are_refused(image_size: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--image-size {image_size}"):
        converted(tmp_path, image_size)


def test_resampling_is_found_under_a_cast(tmp_path: Path) -> None:
    """A verification resamples on the CPU, as the conversion did."""
    torch.save({"positions": torch.zeros(1, 4, 4, 8)}, tmp_path / "positions.pth")
    with closing(open_checkpoint(str(tmp_path / "positions.pth"))) as opened:
        positions = lazy_read(opened.contents["positions"])
    assert is_resampled(cast(resampled(positions, "grid", 6), "bfloat16"))
    assert not is_resampled(cast(positions, "bfloat16"))

"""Correct conversions of random layouts, sizes and weights, and the verification of each, which must not fail.

Run by tests/test_corruptions.py on tiny encoders and by scripts/error_over_tolerance.py, which also takes true sizes.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import corruptions
import models
import test_oracles
import torch
from torch import Tensor

import converter
from converter.api.verify import verify
from converter.verification.result import FAILED, SKIPPED, Verification

State = dict[str, Tensor]

# Weights with the statistics of trained encoders ----------------------------------------------------------------------


class Tensors(NamedTuple):
    """The tensors of a state dict by their role in any layout. Fused ones in `q_and_k` have v as the last third."""

    matrices: State
    norms: State
    biases: State
    positions: State
    q_and_k: State


def by_role(state: State) -> Tensors:
    floats = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    vectors = {name: tensor for name, tensor in floats.items() if tensor.dim() == 1}
    return Tensors(
        matrices={name: t for name, t in floats.items() if t.dim() > 1 and "pos" not in name},
        norms={name: t for name, t in vectors.items() if name.endswith("weight")},
        biases={name: t for name, t in vectors.items() if re.search(r"(fc2|lin2|c_proj)\.bias$", name)},
        positions={name: t for name, t in floats.items() if t.dim() > 1 and "pos" in name},
        q_and_k={name: t for name, t in floats.items() if re.search(r"qkv|in_proj|\b[qk]_proj", name)},
    )


Statistics = Callable[[Tensors, torch.Generator], State]


def heavy_tails(tensors: Tensors, generator: torch.Generator) -> State:
    """Matrices with the tails of a t distribution of three degrees of freedom."""
    changed = {}
    for name, tensor in tensors.matrices.items():
        chi = torch.randn(3, *tensor.shape, generator=generator).square().mean(0).sqrt()
        changed[name] = tensor / chi.clamp_min(0.05)
    return changed


def outlier_channels(tensors: Tensors, generator: torch.Generator) -> State:
    """Norms that enlarge a few channels thirtyfold."""
    return {name: _some(tensor, 30.0, generator) for name, tensor in tensors.norms.items()}


def massive_activations(tensors: Tensors, generator: torch.Generator) -> State:
    """MLPs that add a thousand times the usual to a channel of every token."""
    return {name: _some(tensor, 1000.0, generator) for name, tensor in tensors.biases.items()}


def sharp_attention(tensors: Tensors, generator: torch.Generator) -> State:
    """Queries and keys three times as large, so that most queries attend to a single key."""
    changed = {}
    for name, tensor in tensors.q_and_k.items():
        fused = len(tensor) // 3 if not re.search(r"\b[qk]_proj", name) else 0
        scale = torch.full((len(tensor),), 3.0)
        scale[len(tensor) - fused :] = 1.0
        changed[name] = tensor * scale.reshape(-1, *[1] * (tensor.dim() - 1))
    return changed


def large_positions(tensors: Tensors, generator: torch.Generator) -> State:
    """Absolute and relative positions ten times as large."""
    return {name: tensor * 10 for name, tensor in tensors.positions.items()}


def initial(tensors: Tensors, generator: torch.Generator) -> State:
    """Matrices of an untrained encoder."""
    return {name: tensor * 0.02 / tensor.std() for name, tensor in tensors.matrices.items() if tensor.numel() > 1}


def _some(tensor: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    """About one element of a hundred, and at least one, multiplied by a factor."""
    scale = torch.ones_like(tensor)
    scale[torch.randperm(len(tensor), generator=generator)[: 1 + len(tensor) // 100]] = factor
    return tensor * scale


STATISTICS: dict[str, tuple[Statistics, ...]] = {
    "calm": (),
    "initial": (initial,),
    "heavy tails": (heavy_tails,),
    "outlier channels": (outlier_channels,),
    "massive activations": (massive_activations,),
    "sharp attention": (sharp_attention,),
    "large positions": (large_positions,),
    "trained": (heavy_tails, outlier_channels, massive_activations, sharp_attention, large_positions),
}


def weights(state: State, statistics: str, seed: int) -> State:
    """Seeded weights for the names and shapes of a state dict."""
    generator = torch.Generator().manual_seed(seed)
    state = corruptions.calm(state, seed)
    for change in STATISTICS[statistics]:
        state = {**state, **change(by_role(state), generator)}
    return state


# Sizes ----------------------------------------------------------------------------------------------------------------


def tiny(draw: random.Random) -> dict[str, Any]:
    """A few layers and channels."""
    heads = draw.randint(1, 3)
    sam = (draw.randint(1, 4), heads * draw.choice([4, 8, 12]), heads, draw.randint(5, 80), draw.randint(3, 8))
    window, patch = draw.randint(2, 5), draw.choice([7, 14, 16])
    clip = (draw.randint(1, 4), draw.randint(1, 2), patch, patch * draw.randint(2, 6))
    return _settings(draw, sam, draw.choice([4, 8, 16]), 8 * draw.randint(1, 4), window, clip)


def small(draw: random.Random) -> dict[str, Any]:
    """Layers enough for errors to add up, and channels enough for outliers."""
    heads = draw.randint(3, 5)
    sam = (12, 32 * heads, heads, 128 * heads, draw.randint(8, 14))
    return _settings(draw, sam, 16, 64, draw.randint(3, 7), (12, draw.randint(2, 4), 14, 14 * draw.randint(6, 10)))


def true(draw: random.Random) -> dict[str, Any]:
    """SAM-base and CLIP-L."""
    return _settings(draw, (12, 768, 12, 3072, 64), 16, 256, 14, (24, 16, 14, 224)) | {"GLOBAL_BLOCKS": (2, 5, 8, 11)}


def _settings(
    draw: random.Random,
    sam: tuple[int, int, int, int, int],
    patch: int,
    neck: int,
    window: int,
    clip: tuple[int, int, int, int],
) -> dict[str, Any]:
    """Sizes for the `models` module, of SAM (depth, width, heads, MLP, grid) and CLIP (depth, heads, patch, image)."""
    depth, (clip_depth, clip_heads, clip_patch, image) = sam[0], clip
    found: dict[str, Any] = dict(zip(("DEPTH", "WIDTH", "HEADS", "MLP", "GRID"), sam, strict=True))
    found |= {"PATCH": patch, "NECK": neck, "WINDOW": window}
    found["GLOBAL_BLOCKS"] = tuple(sorted(draw.sample(range(depth), draw.randint(0, depth))))
    found |= {"CLIP_DEPTH": clip_depth, "CLIP_HEADS": clip_heads, "CLIP_WIDTH": 64 * clip_heads}
    # Only transformers' and timm's CLIP take a width of the MLP of its own.
    return found | {"CLIP_MLP": 256 * clip_heads, "CLIP_PATCH": clip_patch, "CLIP_IMAGE": image}


class Size(NamedTuple):
    """How large the encoders are, and the sizes at which the DeepEncoder runs."""

    settings: Callable[[random.Random], dict[str, Any]]
    images: tuple[int, ...]


SIZES = {
    "tiny": Size(tiny, tuple(16 * side for side in range(3, 13))),
    "small": Size(small, (128, 192, 256)),
    "true": Size(true, (512,)),
}


# Runs -----------------------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """One verification. `ratio` is the largest error at any probe, in tolerances: above one fails."""

    number: int
    layout: str
    statistics: str
    precision: str
    verdict: str
    problems: list[str]
    ratio: float


def run(
    number: int, folder: Path, size: str = "tiny", statistics: str = "", **options: Any
) -> tuple[Result, Verification]:
    """Verify a correct conversion.

    Args:
        number: The seed of layout, sizes, weights, file type and precision.
        folder: Where the files are written.
        size: A key of SIZES.
        statistics: A key of STATISTICS; drawn if empty.
        options: Options of `verify` instead of the drawn ones, such as `device` and `dtype`.
    """
    draw = random.Random(number)
    layout = list(test_oracles.LAYOUTS)[number % len(test_oracles.LAYOUTS)]
    statistics = statistics or list(STATISTICS)[number // len(test_oracles.LAYOUTS) % len(STATISTICS)]
    family, mapping, make = test_oracles.LAYOUTS[layout]
    with mock.patch.multiple(models, **SIZES[size].settings(draw)):
        _forget()
        state, _ = make()
        # Without a patch embedding (Unlimited-OCR) a conversion takes the patch to be 14 pixels.
        resampled = family == "clip" and mapping != "clip-unlimited-ocr-hf" and draw.random() < 0.3
        image_size = models.CLIP_PATCH * draw.randint(2, 6) if resampled else None
    _forget()
    stored = getattr(torch, draw.choice(["float32", "float32", "float32", "float64", "float16", "bfloat16"]))
    state = {
        name: tensor.to(stored) if tensor.is_floating_point() else tensor
        for name, tensor in weights(state, statistics, number).items()
    }
    save = draw.choice([test_oracles.save_zip, test_oracles.save_legacy, test_oracles.save_safetensors])
    source, out = save(state, folder), folder / "out.safetensors"
    dtype = draw.choice(["keep", "keep", "float32", "bfloat16", "float16"])
    converter.convert(str(source), family, out=out, dtype=dtype, image_size=image_size, force=True)
    precision = draw.choice(["float32", "float32", "float32", "bfloat16", "float16"])
    chosen = {"device": "cpu", "dtype": precision, "sizes": [draw.choice(SIZES[size].images)], **options}
    found = verify(str(out), str(source), **chosen)
    assert found.mapping == mapping
    problems = [f"{check.name}: {check.detail}" for check in found.checks if check.verdict in (FAILED, SKIPPED)]
    ratio = max(point.error / point.tolerance for trace in found.traces for point in trace.points)
    return Result(number, layout, statistics, chosen["dtype"], found.result, problems, ratio), found


def _forget() -> None:
    """Clear the caches of the models module."""
    for function in vars(models).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()

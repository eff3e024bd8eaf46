"""Sizes of the encoders, and how to read them off the shapes of a checkpoint's tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt

from converter.errors import LayoutError

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class SamConfig:
    """Sizes of SAM's image encoder; the defaults are SAM-base's, with DeepSeek-OCR's compressor.

    `image_size` (pixels) is the trained one: it fixes the position tables, not what may be run. `window` is in patches;
    blocks not in `global_blocks` attend within windows. `compressor` holds the channels after net_2 and net_3, or is
    None for SAM as Meta made it.
    """

    image_size: int = 1024
    patch: int = 16
    channels: int = 3
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072
    window: int = 14
    global_blocks: tuple[int, ...] = (2, 5, 8, 11)
    neck: int = 256
    compressor: tuple[int, int] | None = (512, 1024)

    @property
    def grid(self) -> int:
        """Patches along a side of the trained image."""
        return self.image_size // self.patch


@dataclass(frozen=True)
class ClipConfig:
    """Sizes of CLIP's vision tower; the defaults are CLIP-L/14's.

    `image_size` (pixels) is the trained one. `patch_convolution` is False for checkpoints without patch embedding:
    inside the DeepEncoder it never runs, so some programs leave it out.
    """

    image_size: int = 224
    patch: int = 14
    channels: int = 3
    width: int = 1024
    depth: int = 24
    heads: int = 16
    mlp: int = 4096
    patch_convolution: bool = True

    @property
    def grid(self) -> int:
        """Patches along a side of the trained image."""
        return self.image_size // self.patch


def sam_config_from(shapes: Shapes) -> SamConfig:
    """The config of a SAM encoder, read off the shapes of its tensors under DeepSeek's names.

    A block is global where its position tables fit the whole image, so a window as large as the image counts as global.
    Raises LayoutError where a tensor is missing or shapes contradict each other.
    """
    width, channels, patch, _ = shape_of(shapes, "patch_embed.proj.weight", 4)
    _, rows, columns, _ = shape_of(shapes, "pos_embed", 4)
    if rows != columns:
        raise LayoutError(f"pos_embed: {rows} rows and {columns} columns, expected a square")
    tables = [shape_of(shapes, f"blocks.{index}.attn.rel_pos_h", 2) for index in range(_depth(shapes, "blocks."))]
    windows = {length for length, _ in tables} - {2 * rows - 1}
    if len(windows) > 1:
        raise LayoutError(f"blocks.*.attn.rel_pos_h: {sorted(windows)} offsets, expected windows of one size")
    head_width = tables[0][1]
    if width % head_width:
        raise LayoutError(f"blocks.0.attn.rel_pos_h: heads of {head_width} channels, expected a divisor of {width}")
    return SamConfig(
        image_size=rows * patch,
        patch=patch,
        channels=channels,
        width=width,
        depth=len(tables),
        heads=width // head_width,
        mlp=shape_of(shapes, "blocks.0.mlp.lin1.weight", 2)[0],
        window=(windows.pop() + 1) // 2 if windows else SamConfig.window,
        global_blocks=tuple(index for index, (length, _) in enumerate(tables) if length == 2 * rows - 1),
        neck=shape_of(shapes, "neck.0.weight", 4)[0],
        compressor=_compressor(shapes),
    )


def _compressor(shapes: Shapes) -> tuple[int, int] | None:
    if "net_2.weight" not in shapes and "net_3.weight" not in shapes:
        return None
    return shape_of(shapes, "net_2.weight", 4)[0], shape_of(shapes, "net_3.weight", 4)[0]


def clip_config_from(shapes: Shapes, head_width: int = 64) -> ClipConfig:
    """The config of a CLIP vision tower, read off the shapes of its tensors under DeepSeek's names.

    No tensor shows the number of heads: those of every vision transformer that OpenAI published are 64 channels wide.
    Without patch convolution the patch is taken to be the default's. Raises LayoutError where a tensor is missing or
    shapes contradict each other.
    """
    table = "embeddings.position_embedding.weight"
    count, width = shape_of(shapes, table, 2)
    grid = isqrt(count - 1)
    if not grid or grid**2 != count - 1:
        raise LayoutError(f"{table}: {count} positions, expected a square of patches and the class token")
    if width % head_width:
        raise LayoutError(f"{table}: {width} channels, expected a multiple of the heads' {head_width}")
    channels, patch = ClipConfig.channels, ClipConfig.patch
    convolution = "embeddings.patch_embedding.weight"
    if convolution in shapes:
        _, channels, patch, _ = shape_of(shapes, convolution, 4)
    return ClipConfig(
        image_size=grid * patch,
        patch=patch,
        channels=channels,
        width=width,
        depth=_depth(shapes, "transformer.layers."),
        heads=width // head_width,
        mlp=shape_of(shapes, "transformer.layers.0.mlp.fc1.weight", 2)[0],
        patch_convolution=convolution in shapes,
    )


def shape_of(shapes: Shapes, name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor that must be there, with as many dimensions, none of them 0."""
    shape = tuple(shapes.get(name, ()))
    if len(shape) != dimensions or min(shape) < 1:
        found = f"shape {list(shape)}" if name in shapes else "missing"
        raise LayoutError(f"{name}: {found}, expected {dimensions} dimensions")
    return shape


def _depth(shapes: Shapes, prefix: str) -> int:
    """How many blocks have tensors under `prefix`; they must be numbered from 0 without gaps."""
    matches = (re.match(rf"{re.escape(prefix)}(\d{{1,6}})\.", name) for name in shapes)
    indices = {int(match[1]) for match in matches if match}
    if not indices or max(indices) >= len(indices):
        raise LayoutError(f"{prefix}*: numbered {sorted(indices)}, expected all from 0 to the last")
    return len(indices)

"""Configs of the encoders, inferred from the shapes of a checkpoint's tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

from converter.errors import LayoutError

Shapes = Mapping[str, Sequence[int]]
# The names of activations in transformers' config.json, and for each the name that `encoders.functional` has for it.
ACTIVATION_NAMES = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


@dataclass(frozen=True)
class SamConfig:
    """Sizes of SAM's image encoder. The defaults are SAM-base with DeepSeek-OCR's compressor."""

    image_size: int = 1024  #: The image size in training, in pixels. Other sizes can be encoded.
    patch: int = 16  #: The patch size in pixels
    channels: int = 3  #: The number of channels of an image
    width: int = 768  #: The embedding dimension
    depth: int = 12  #: The number of blocks
    heads: int = 12  #: The number of attention heads
    mlp: int = 3072  #: The hidden dimension of the MLPs
    window: int = 14  #: The window size in patches
    #: The indices of the blocks with global attention. All others attend within windows.
    global_blocks: tuple[int, ...] = (2, 5, 8, 11)
    neck: int = 256  #: The number of channels of the neck
    compressor: tuple[int, int] | None = (512, 1024)  #: The output channels of net_2 and net_3, or None for Meta's SAM
    activation: str = "gelu"  #: The activation of the MLPs, by transformers' name
    epsilon: float = 1e-6  #: The epsilon of the blocks' layer norms. The neck's is always 1e-6.

    @property
    def grid(self) -> int:
        """The number of patches along each side of an image of `image_size`."""
        return self.image_size // self.patch


@dataclass(frozen=True)
class ClipConfig:
    """Sizes of CLIP's vision tower. The defaults are CLIP-L/14."""

    image_size: int = 224  #: The image size in training, in pixels. Other sizes can be encoded.
    patch: int = 14  #: The patch size in pixels
    channels: int = 3  #: The number of channels of an image
    width: int = 1024  #: The embedding dimension
    depth: int = 24  #: The number of blocks
    heads: int = 16  #: The number of attention heads
    mlp: int = 4096  #: The hidden dimension of the MLPs
    #: Whether the checkpoint has a patch embedding. The DeepEncoder does not run it, so some checkpoints lack it.
    patch_convolution: bool = True
    activation: str = "quick_gelu"  #: The activation of the MLPs, by transformers' name
    epsilon: float = 1e-5  #: The epsilon of the layer norms

    @property
    def grid(self) -> int:
        """The number of patches along each side of an image of `image_size`."""
        return self.image_size // self.patch


@dataclass(frozen=True)
class Qwen2Config:
    """Sizes of Qwen2 as an encoder. The defaults are those of DeepSeek-OCR-2 and of Qwen2-0.5B."""

    width: int = 896  #: The embedding dimension
    depth: int = 24  #: The number of layers
    heads: int = 14  #: The number of attention heads
    key_value_heads: int = 2  #: The number of key and value heads, each shared by several query heads
    mlp: int = 4864  #: The hidden dimension of the MLPs
    #: The rows of query_768 and query_1024, or None for a Qwen2 without them
    queries: tuple[int, int] | None = (144, 256)
    activation: str = "silu"  #: The activation of the MLPs, by transformers' name
    epsilon: float = 1e-6  #: The epsilon of the RMS norms
    rope_theta: float = 1e6  #: The base of the frequencies of rotary position embeddings


def sam_config_from(shapes: Shapes, **assumed: Any) -> SamConfig:
    """Infer the config of a SAM encoder from the shapes of its tensors by DeepSeek's names.

    A block counts as global if its relative position embeddings cover the whole image. `assumed` overrides defaults of
    SamConfig that shapes do not determine: activation and epsilon.

    Raises:
        LayoutError: A tensor is missing, or shapes contradict each other.
    """
    width, channels, patch, _ = shape_of(shapes, "patch_embed.proj.weight", 4)
    _, rows, columns, _ = shape_of(shapes, "pos_embed", 4)
    if rows != columns:
        raise LayoutError(f"pos_embed: {rows} rows and {columns} columns, expected a square")
    rel_pos = [shape_of(shapes, f"blocks.{index}.attn.rel_pos_h", 2) for index in range(_num_blocks(shapes, "blocks."))]
    head_width = rel_pos[0][1]
    if width % head_width:
        raise LayoutError(f"blocks.0.attn.rel_pos_h: heads of {head_width} channels, expected a divisor of {width}")
    return SamConfig(
        image_size=rows * patch,
        patch=patch,
        channels=channels,
        width=width,
        depth=len(rel_pos),
        heads=width // head_width,
        mlp=shape_of(shapes, "blocks.0.mlp.lin1.weight", 2)[0],
        window=_window(rel_pos, rows),
        global_blocks=tuple(index for index, (length, _) in enumerate(rel_pos) if length == 2 * rows - 1),
        neck=shape_of(shapes, "neck.0.weight", 4)[0],
        compressor=_first_dims(shapes, "net_2.weight", "net_3.weight", 4),
        **assumed,
    )


def _window(rel_pos: Sequence[tuple[int, ...]], rows: int) -> int:
    """Return the window size of the blocks whose relative positions do not cover all rows of the image."""
    lengths = {length for length, _ in rel_pos} - {2 * rows - 1}
    if len(lengths) > 1:
        raise LayoutError(f"blocks.*.attn.rel_pos_h: {sorted(lengths)} offsets, expected windows of one size")
    return (lengths.pop() + 1) // 2 if lengths else SamConfig.window


def _first_dims(shapes: Shapes, first: str, second: str, ndim: int) -> tuple[int, int] | None:
    """Return the first dimension of each of two tensors, or None if both are missing."""
    if first not in shapes and second not in shapes:
        return None
    return shape_of(shapes, first, ndim)[0], shape_of(shapes, second, ndim)[0]


def clip_config_from(shapes: Shapes, head_width: int = 64, **assumed: Any) -> ClipConfig:
    """Infer the config of a CLIP vision tower from the shapes of its tensors by DeepSeek's names.

    Without a patch convolution, the patch size and the number of channels are ClipConfig's defaults.

    Args:
        shapes: The shapes of the tensors by name.
        head_width: The channels per head, which shapes do not determine. All models of OpenAI's CLIP have 64.
        assumed: Overrides of ClipConfig's defaults that shapes do not determine: activation and epsilon.

    Raises:
        LayoutError: A tensor is missing, or shapes contradict each other.
    """
    name = "embeddings.position_embedding.weight"
    num_positions, width = shape_of(shapes, name, 2)
    if width % head_width:
        raise LayoutError(f"{name}: {width} channels, expected a multiple of the head width {head_width}")
    grid = isqrt(num_positions - 1)
    if not grid or grid**2 != num_positions - 1:
        raise LayoutError(f"{name}: {num_positions} positions, expected a square of patches and the class token")
    channels, patch = ClipConfig.channels, ClipConfig.patch
    convolution = "embeddings.patch_embedding.weight"
    if convolution in shapes:
        _, channels, patch, _ = shape_of(shapes, convolution, 4)
    return ClipConfig(
        image_size=grid * patch,
        patch=patch,
        channels=channels,
        width=width,
        depth=_num_blocks(shapes, "transformer.layers."),
        heads=width // head_width,
        mlp=shape_of(shapes, "transformer.layers.0.mlp.fc1.weight", 2)[0],
        patch_convolution=convolution in shapes,
        **assumed,
    )


def qwen2_config_from(shapes: Shapes, head_width: int = 64, **assumed: Any) -> Qwen2Config:
    """Infer the config of a Qwen2 encoder from the shapes of its tensors by DeepSeek-OCR-2's names.

    Args:
        shapes: The shapes of the tensors by name.
        head_width: The channels per head, which shapes do not determine. Qwen2-0.5B has 64.
        assumed: Overrides of Qwen2Config's defaults that shapes do not determine: activation, epsilon and rope_theta.

    Raises:
        LayoutError: A tensor is missing, or shapes contradict each other.
    """
    name = "model.model.layers.0.self_attn.k_proj.weight"
    key_value, width = shape_of(shapes, name, 2)
    if width % head_width or key_value % head_width or width % key_value or head_width % 2:
        raise LayoutError(f"{name}: {key_value} x {width} channels do not fit heads of {head_width}")
    return Qwen2Config(
        width=width,
        depth=_num_blocks(shapes, "model.model.layers."),
        heads=width // head_width,
        key_value_heads=key_value // head_width,
        mlp=shape_of(shapes, "model.model.layers.0.mlp.gate_proj.weight", 2)[0],
        queries=_first_dims(shapes, "query_768.weight", "query_1024.weight", 2),
        **assumed,
    )


def shape_of(shapes: Shapes, name: str, ndim: int) -> tuple[int, ...]:
    """Return the shape of a tensor.

    Args:
        shapes: The shapes of all tensors by name.
        name: The tensor's name.
        ndim: The expected number of dimensions.

    Raises:
        LayoutError: The tensor is missing or empty, or has another number of dimensions.
    """
    shape = tuple(shapes.get(name, ()))
    if len(shape) != ndim or min(shape) < 1:
        actual = f"shape {list(shape)}" if name in shapes else "missing"
        raise LayoutError(f"{name}: {actual}, expected {ndim} dimensions")
    return shape


def _num_blocks(shapes: Shapes, prefix: str) -> int:
    """Return the number of blocks under `prefix`; LayoutError unless they are numbered from 0 without gaps."""
    matches = (re.match(rf"{re.escape(prefix)}(\d{{1,6}})\.", name) for name in shapes)
    indices = {int(match[1]) for match in matches if match}
    if not indices or max(indices) >= len(indices):
        raise LayoutError(f"{prefix}*: numbered {sorted(indices)}, expected all from 0 to the last")
    return len(indices)

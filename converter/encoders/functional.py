"""Functions that the encoders share: activations, split attention heads, resampled position embeddings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of GELU. It differs from both the exact and the tanh GELU of torch."""
    return x * torch.sigmoid(1.702 * x)


# Activations by the names that are values of `converter.encoders.config.ACTIVATION_NAMES`.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split the output of a fused q, k, v projection (B, N, 3 * C) into q, k and v, each (B, num_heads, N, D)."""
    q, k, v = qkv.reshape(*qkv.shape[:2], 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    return q, k, v


def resample_abs_pos(pos_embed: Tensor, h: int, w: int) -> Tensor:
    """Resample absolute position embeddings (1, rows, columns, C) to (1, h, w, C).

    The interpolation is bicubic with antialiasing, as in the training of DeepSeek-OCR.

    Args:
        pos_embed: The position embeddings.
        h: The new number of rows.
        w: The new number of columns.
    """
    if pos_embed.shape[1:3] == (h, w):
        return pos_embed
    x = pos_embed.permute(0, 3, 1, 2).to(_resampling_dtype(pos_embed))
    x = F.interpolate(x, (h, w), mode="bicubic", antialias=True, align_corners=False)
    return x.to(pos_embed.dtype).permute(0, 2, 3, 1)


def resample_rel_pos(rel_pos: Tensor, length: int) -> Tensor:
    """Resample relative position embeddings (2 * size - 1, D) to (length, D) linearly, as in ViTDet."""
    if len(rel_pos) == length:
        return rel_pos
    x = F.interpolate(rel_pos.to(_resampling_dtype(rel_pos)).T[None], length, mode="linear", align_corners=False)
    return x[0].T.to(rel_pos.dtype)


def check_image_size(pixels: Tensor, patch_size: int) -> None:
    """Raise ValueError unless height and width are multiples of the patch size.

    A patch convolution would ignore the pixels of an incomplete patch without an error.
    """
    if any(size % patch_size for size in pixels.shape[-2:]):
        raise ValueError(f"pixels of shape {list(pixels.shape)}: height and width must be multiples of {patch_size}")


def _resampling_dtype(tensor: Tensor) -> torch.dtype:
    # In half precision the interpolation weights would be rounded too. float64 stays float64.
    return torch.promote_types(tensor.dtype, torch.float32)

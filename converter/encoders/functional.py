"""Functions for both SAM and CLIP: attention heads, and position embeddings of other sizes than the trained one."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, 3 * C), q then k then v, head after head in each -> three of (B, heads, N, D)."""
    q, k, v = qkv.reshape(*qkv.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
    return q, k, v


def resample_grid(table: Tensor, h: int, w: int) -> Tensor:
    """Position embeddings (1, rows, columns, C) -> (1, h, w, C): bicubic, antialiased, as DeepSeek's were trained."""
    if table.shape[1:3] == (h, w):
        return table
    x = table.permute(0, 3, 1, 2).to(_resampling_dtype(table))
    x = F.interpolate(x, (h, w), mode="bicubic", antialias=True, align_corners=False)
    return x.to(table.dtype).permute(0, 2, 3, 1)


def resample_offsets(table: Tensor, length: int) -> Tensor:
    """Relative positions (offsets, D) -> (length, D), linear, as in ViTDet."""
    if len(table) == length:
        return table
    x = F.interpolate(table.to(_resampling_dtype(table)).T[None], length, mode="linear", align_corners=False)
    return x[0].T.to(table.dtype)


def check_sides(pixels: Tensor, patch: int) -> None:
    """Raises ValueError for pixels left over, which a patch convolution would drop without a word."""
    if any(side % patch for side in pixels.shape[-2:]):
        raise ValueError(f"pixels of shape {list(pixels.shape)}: height and width must be multiples of {patch}")


def _resampling_dtype(table: Tensor) -> torch.dtype:
    # In half precision the weights of the interpolation would be rounded too; float64 must not lose digits midway.
    return torch.promote_types(table.dtype, torch.float32)

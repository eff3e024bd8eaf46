"""SAM's image encoder, a ViTDet (Li et al. 2022, Kirillov et al. 2023), followed by DeepSeek's compressor."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from converter.encoders.config import SamConfig
from converter.encoders.functional import ACTIVATIONS, check_image_size, resample_abs_pos, resample_rel_pos, split_heads

_NECK_EPSILON = 1e-6


class SamEncoder(nn.Module):
    """SAM's image encoder with DeepSeek's compressor.

    Parameter names follow DeepSeek-OCR: Meta's SAM names without the `image_encoder.` prefix, plus net_2 and net_3.
    To compare activations, put forward hooks on `blocks[i]`. Each block maps (B, h, w, C) to the same shape; the input
    of the first block is the patch embeddings with position embeddings added.
    """

    def __init__(self, config: SamConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or SamConfig()
        self.patch_embed = _PatchEmbedding(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid, config.grid, config.width))
        self.blocks = nn.ModuleList(_Block(config, index in config.global_blocks) for index in range(config.depth))
        self.neck = nn.Sequential(
            nn.Conv2d(config.width, config.neck, 1, bias=False),
            _LayerNorm2d(config.neck, _NECK_EPSILON),
            nn.Conv2d(config.neck, config.neck, 3, padding=1, bias=False),
            _LayerNorm2d(config.neck, _NECK_EPSILON),
        )
        if config.compressor is not None:
            middle, last = config.compressor
            self.net_2 = nn.Conv2d(config.neck, middle, 3, stride=2, padding=1, bias=False)
            self.net_3 = nn.Conv2d(middle, last, 3, stride=2, padding=1, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, 3, H, W) to (B, C, ceil(H/64), ceil(W/64)), where C is the compressor's last width.

        Without a compressor, this returns the same as `features`.

        Raises:
            ValueError: Height or width is not a multiple of the patch size.
        """
        x = self.features(pixels)
        if self.config.compressor is not None:
            # No norm or activation between or after the convolutions, as in training.
            x = self.net_3(self.net_2(x))
        return x

    def features(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, 3, H, W) to the output of Meta's encoder (B, neck, H/16, W/16), before the compressor."""
        check_image_size(pixels, self.config.patch)
        x = self.embed(self.patch_embed.proj(pixels))
        for block in self.blocks:
            x = block(x)
        return self.neck(x.permute(0, 3, 1, 2))

    def embed(self, patches: Tensor) -> Tensor:
        """Add position embeddings to patch embeddings (B, C, h, w), and return the first block's input (B, h, w, C)."""
        x = patches.permute(0, 2, 3, 1)
        return x + resample_abs_pos(self.pos_embed, x.shape[1], x.shape[2])


class _PatchEmbedding(nn.Module):
    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.channels, config.width, config.patch, stride=config.patch)


class _Block(nn.Module):
    """Transformer block on (B, h, w, C) with attention within windows or over the whole image."""

    def __init__(self, config: SamConfig, is_global: bool) -> None:
        super().__init__()
        self.window = None if is_global else config.window
        self.norm1 = _layer_norm(config)
        self.attn = _Attention(config, self.window)
        self.norm2 = _layer_norm(config)
        self.mlp = _Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        if self.window is None:
            x = x + self.attn(self.norm1(x))
        else:
            # The padding comes after the norm and is not masked, as in the training of SAM.
            windows = self.attn(window_partition(self.norm1(x), self.window))
            x = x + window_unpartition(windows, x.shape[1], x.shape[2])
        return x + self.mlp(self.norm2(x))


class _Attention(nn.Module):
    """Attention with decomposed relative position embeddings for rows and columns (Li et al. 2022, MViTv2).

    Each of the two tables has an embedding for every offset from -(size - 1) to size - 1. The offset is the position of
    the query minus that of the key, in patches.
    """

    def __init__(self, config: SamConfig, window: int | None) -> None:
        super().__init__()
        size = window or config.grid
        self.is_global = window is None
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * size - 1, config.width // config.heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * size - 1, config.width // config.heads))

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[1:3]
        q, k, v = split_heads(self.qkv(x.flatten(1, 2)), self.heads)
        bias = self._rel_pos_bias(q, h, w)
        # On a GPU the mask of a whole image takes most of the memory and much time. Within windows a mask is faster.
        attend = attention_without_mask if self.is_global and x.device.type != "cpu" else attention_with_mask
        y = attend(q, k, v, *bias)
        return self.proj(y.transpose(1, 2).reshape(x.shape))

    def _rel_pos_bias(self, q: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
        """Return the bias of each query (B, heads, h*w, D), before scaling, for the rows and the columns of the keys.

        They are q.R_h (B, heads, h*w, h) and q.R_w (B, heads, h*w, w).
        """
        q = q.reshape(*q.shape[:2], h, w, -1)
        rows = torch.einsum("bnhwd,hkd->bnhwk", q, _rel_pos_embeddings(self.rel_pos_h, h)).flatten(2, 3)
        columns = torch.einsum("bnhwd,wkd->bnhwk", q, _rel_pos_embeddings(self.rel_pos_w, w)).flatten(2, 3)
        return rows, columns


def attention_with_mask(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Compute attention with a bias for the row and the column of each key, as a mask of N x N elements for each head.

    Args:
        q: Queries (B, heads, N, D).
        k: Keys, of the same shape.
        v: Values, of the same shape.
        rows: The bias of each query for keys in each of the h rows (B, heads, N, h), where N = h * w.
        columns: The same for the w columns (B, heads, N, w).
    """
    mask = (rows[..., :, None] + columns[..., None, :]).flatten(3)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attention_without_mask(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Compute the same as `attention_with_mask`, with the bias as a part of the product of queries and keys.

    Queries get their biases as h + w more channels. Keys get one-hot encodings of their row and their column.

    Args:
        q: Queries (B, heads, N, D).
        k: Keys, of the same shape.
        v: Values, of the same shape.
        rows: The bias of each query for keys in each of the h rows (B, heads, N, h), where N = h * w.
        columns: The same for the w columns (B, heads, N, w).
    """
    h, w = rows.shape[-1], columns.shape[-1]
    # Attention divides the product by `scale`, which the bias has to cancel. The keys are multiplied by the largest
    # power of two below it, which every dtype represents exactly, and the queries by the rest.
    scale = math.sqrt(q.shape[-1])
    key_scale = 2.0 ** math.floor(math.log2(scale))
    bias = torch.cat((rows, columns), -1) * (scale / key_scale)
    one_hot = key_scale * torch.eye(h + w, dtype=k.dtype, device=k.device)
    positions = one_hot[:h].repeat_interleave(w, 0) + one_hot[h:].repeat(h, 1)
    # Zero channels are added, as fast kernels need a multiple of eight channels.
    num_zeros = -(q.shape[-1] + h + w) % 8
    q = torch.cat((q, bias, bias.new_zeros(()).expand(*bias.shape[:-1], num_zeros)), -1)
    k = torch.cat((k, F.pad(positions, (0, num_zeros)).expand(*k.shape[:-1], -1)), -1)
    return F.scaled_dot_product_attention(q, k, v, scale=1 / scale)


class _Mlp(nn.Module):
    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        self.lin1 = nn.Linear(config.width, config.mlp)
        self.lin2 = nn.Linear(config.mlp, config.width)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(self.activation(self.lin1(x)))


def _layer_norm(config: SamConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.width, config.epsilon)


class _LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (B, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        # Meta's LayerNorm2d computes in the input dtype, so it loses precision in fp16 and bf16 and can overflow.
        # torch's kernel accumulates in float32.
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _rel_pos_embeddings(rel_pos: Tensor, size: int) -> Tensor:
    """Return the embedding for each query and key along one direction (size, size, D): queries first, then keys."""
    positions = torch.arange(size, device=rel_pos.device)
    return resample_rel_pos(rel_pos, 2 * size - 1)[positions[:, None] - positions + size - 1]


def window_partition(x: Tensor, size: int) -> Tensor:
    """Partition (B, h, w, C) into windows (B * num_windows, size, size, C), zero-padded at the bottom and right."""
    batch, h, w, channels = x.shape
    x = F.pad(x, (0, 0, 0, -w % size, 0, -h % size))
    x = x.reshape(batch, x.shape[1] // size, size, x.shape[2] // size, size, channels)
    return x.transpose(2, 3).flatten(0, 2)


def window_unpartition(windows: Tensor, h: int, w: int) -> Tensor:
    """Join windows to (B, h, w, C) without the padding: the inverse of `window_partition`.

    Args:
        windows: Windows (B * num_windows, size, size, C).
        h: Number of rows of patches without padding.
        w: Number of columns of patches without padding.
    """
    size, channels = windows.shape[2:]
    num_rows, num_columns = -(-h // size), -(-w // size)  # rounded up
    x = windows.reshape(-1, num_rows, num_columns, size, size, channels)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :h, :w]

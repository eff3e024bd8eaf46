"""SAM's image encoder, a ViTDet (Li et al. 2022, Kirillov et al. 2023), and DeepSeek's compressor after it."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from converter.encoders.config import SamConfig
from converter.encoders.functional import check_sides, resample_grid, resample_offsets, split_heads

EPS = 1e-6


class SamEncoder(nn.Module):
    """SAM's image encoder; `state_dict()` has DeepSeek's names: Meta's, without `image_encoder.`, and the compressor's.

    For comparisons, hook `blocks[i]`: each takes and returns (B, h, w, C), the first one patches with positions added.
    """

    def __init__(self, config: SamConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or SamConfig()
        self.patch_embed = _PatchEmbedding(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid, config.grid, config.width))
        self.blocks = nn.ModuleList(_Block(config, index in config.global_blocks) for index in range(config.depth))
        self.neck = nn.Sequential(
            nn.Conv2d(config.width, config.neck, 1, bias=False),
            _ChannelNorm(config.neck, EPS),
            nn.Conv2d(config.neck, config.neck, 3, padding=1, bias=False),
            _ChannelNorm(config.neck, EPS),
        )
        if config.compressor is not None:
            middle, last = config.compressor
            self.net_2 = nn.Conv2d(config.neck, middle, 3, stride=2, padding=1, bias=False)
            self.net_3 = nn.Conv2d(middle, last, 3, stride=2, padding=1, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, compressed, ceil(H/64), ceil(W/64)); without a compressor, `features`.

        Raises ValueError where a side is no multiple of the patch.
        """
        x = self.features(pixels)
        if self.config.compressor is not None:
            # Nothing between the two convolutions, nor after them: so they were trained.
            x = self.net_3(self.net_2(x))
        return x

    def features(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, neck, H/16, W/16), before the compressor: what Meta's encoder returns."""
        check_sides(pixels, self.config.patch)
        x: Tensor = self.patch_embed(pixels)
        x = x + resample_grid(self.pos_embed, x.shape[1], x.shape[2])
        for block in self.blocks:
            x = block(x)
        features: Tensor = self.neck(x.permute(0, 3, 1, 2))
        return features


class _PatchEmbedding(nn.Module):
    """(B, 3, H, W) -> (B, h, w, C)."""

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.channels, config.width, config.patch, stride=config.patch)

    def forward(self, pixels: Tensor) -> Tensor:
        patches: Tensor = self.proj(pixels)
        return patches.permute(0, 2, 3, 1)


class _Block(nn.Module):
    """A transformer block on (B, h, w, C), attending within windows or over the whole image."""

    def __init__(self, config: SamConfig, attends_globally: bool) -> None:
        super().__init__()
        self.window = None if attends_globally else config.window
        self.norm1 = nn.LayerNorm(config.width, EPS)
        self.attn = _Attention(config, self.window or config.grid)
        self.norm2 = nn.LayerNorm(config.width, EPS)
        self.mlp = _Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm1(x)
        if self.window is None:
            y = self.attn(y)
        else:
            # The padding comes after the norm and is not masked: SAM was trained attending to it.
            windows = self.attn(_to_windows(y, self.window))
            y = _from_windows(windows, x.shape[1], x.shape[2])
        x = x + y
        y = self.mlp(self.norm2(x))
        return x + y


class _Attention(nn.Module):
    """Attention with decomposed relative positions (Li et al. 2022, MViTv2): a table for rows, a table for columns.

    Each runs from the offset -(side - 1) to side - 1, query minus key, in patches.
    """

    def __init__(self, config: SamConfig, side: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, config.width // config.heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, config.width // config.heads))

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[1:3]
        q, k, v = split_heads(self.qkv(x.flatten(1, 2)), self.heads)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self._bias(q, h, w))
        projected: Tensor = self.proj(y.transpose(1, 2).reshape(x.shape))
        return projected

    def _bias(self, q: Tensor, h: int, w: int) -> Tensor:
        """(B, heads, h*w, D) -> (B, heads, h*w, h*w): the query, unscaled, times the embeddings of both offsets."""
        q = q.reshape(*q.shape[:2], h, w, -1)
        rows = torch.einsum("bnhwd,hkd->bnhwk", q, _by_offset(self.rel_pos_h, h)).flatten(2, 3)
        columns = torch.einsum("bnhwd,wkd->bnhwk", q, _by_offset(self.rel_pos_w, w)).flatten(2, 3)
        return (rows[..., :, None] + columns[..., None, :]).flatten(3)


class _Mlp(nn.Module):
    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        self.lin1 = nn.Linear(config.width, config.mlp)
        self.lin2 = nn.Linear(config.mlp, config.width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lin2(F.gelu(self.lin1(x)))
        return y


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        # torch's kernel sums in float32; Meta's formula in half precision rounds on the way, and may overflow.
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _by_offset(table: Tensor, side: int) -> Tensor:
    """(offsets, D) -> (side, side, D): what the table says of each query (first) and key along one direction."""
    place = torch.arange(side, device=table.device)
    return resample_offsets(table, 2 * side - 1)[place[:, None] - place + side - 1]


def _to_windows(x: Tensor, side: int) -> Tensor:
    """(B, h, w, C) -> (B * windows, side, side, C), with zeros below and to the right where `side` does not divide."""
    batch, h, w, channels = x.shape
    x = F.pad(x, (0, 0, 0, -w % side, 0, -h % side))
    x = x.reshape(batch, -(-h // side), side, -(-w // side), side, channels)
    return x.transpose(2, 3).flatten(0, 2)


def _from_windows(windows: Tensor, h: int, w: int) -> Tensor:
    """The inverse of `_to_windows`, without the padding: -> (B, h, w, C)."""
    side, channels = windows.shape[2:]
    x = windows.reshape(-1, -(-h // side), -(-w // side), side, side, channels)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :h, :w]

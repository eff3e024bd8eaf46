"""CLIP's vision tower (Radford et al. 2021). In the DeepEncoder, it encodes SAM's features instead of pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from converter.encoders.config import ClipConfig
from converter.encoders.functional import ACTIVATIONS, check_image_size, resample_abs_pos, split_heads


class ClipEncoder(nn.Module):
    """CLIP's vision tower without the final norm and projection, which DeepSeek-OCR does not use.

    To compare activations, put forward hooks on `transformer.layers[i]`. Each layer maps (B, 1 + h*w, width) to the
    same shape.
    """

    def __init__(self, config: ClipConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ClipConfig()
        self.embeddings = _Embeddings(config)
        self.pre_layrnorm = _layer_norm(config)
        self.transformer = _Transformer(config)

    def forward(self, pixels: Tensor | None, patch_embeds: Tensor | None = None) -> Tensor:
        """Encode pixels or patch embeddings to (B, 1 + h*w, width): the class token, then patches row by row.

        Args:
            pixels: Pixels (B, 3, H, W). They are ignored if `patch_embeds` is given.
            patch_embeds: Features (B, width, h, w) that replace the output of the patch convolution.

        Raises:
            ValueError: Height or width is not a multiple of the patch size, or `patch_embeds` is required: there are
                no pixels, or there is no patch convolution.
        """
        patches = self.embeddings.patches(pixels) if patch_embeds is None else patch_embeds
        return self.transformer(self.embed(patches))

    def embed(self, patches: Tensor) -> Tensor:
        """Return the first block's input (B, 1 + h*w, width) for patch embeddings (B, width, h, w)."""
        return self.pre_layrnorm(self.embeddings(patches))


class _Embeddings(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        num_positions = config.grid**2 + 1
        self.class_embedding = nn.Parameter(torch.zeros(config.width))
        if config.patch_convolution:
            self.patch_embedding = nn.Conv2d(
                config.channels, config.width, config.patch, stride=config.patch, bias=False
            )
        self.position_embedding = nn.Embedding(num_positions, config.width)
        self.register_buffer("position_ids", torch.arange(num_positions)[None])

    def forward(self, patches: Tensor) -> Tensor:
        batch, _, h, w = patches.shape
        class_tokens = self.class_embedding.expand(batch, 1, -1)
        return torch.cat([class_tokens, patches.flatten(2).transpose(1, 2)], dim=1) + self._positions(h, w)

    def patches(self, pixels: Tensor | None) -> Tensor:
        """Return the output of the patch convolution (B, width, h, w)."""
        if pixels is None or not self.config.patch_convolution:
            raise ValueError("patch_embeds is required: there are no pixels, or the encoder has no patch convolution")
        check_image_size(pixels, self.config.patch)
        return self.patch_embedding(pixels)

    def _positions(self, h: int, w: int) -> Tensor:
        """Return position embeddings (1, 1 + h*w, width). Only those of the patches are resampled."""
        # As in DeepSeek's module, the buffer position_ids selects the rows, so wrong values in it change the output.
        table = self.position_embedding(self.position_ids)
        grid = self.config.grid
        patches = resample_abs_pos(table[:, 1:].reshape(1, grid, grid, -1), h, w)
        return torch.cat([table[:, :1], patches.flatten(1, 2)], dim=1)


class _Transformer(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block(config) for _ in range(config.depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class _Block(nn.Module):
    """Transformer block on (B, N, C)."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.layer_norm1 = _layer_norm(config)
        self.self_attn = _Attention(config)
        self.layer_norm2 = _layer_norm(config)
        self.mlp = _Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Attention(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv_proj = nn.Linear(config.width, 3 * config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv_proj(x), self.heads)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp)
        self.fc2 = nn.Linear(config.mlp, config.width)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


def _layer_norm(config: ClipConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.width, config.epsilon)

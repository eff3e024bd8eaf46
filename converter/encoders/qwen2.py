"""Qwen2 (Yang et al. 2024) as the second encoder of DeepSeek-OCR-2, with its tables of queries."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from converter.encoders.config import Qwen2Config
from converter.encoders.functional import ACTIVATIONS


class Qwen2Encoder(nn.Module):
    """Qwen2's layers on image tokens followed by queries, whose features are the encoder's output.

    Parameter names follow DeepSeek-OCR-2, which wraps a whole Qwen2: `model.model.layers`, `model.model.norm`. To
    compare activations, put forward hooks on `model.model.layers[i]`. Each layer maps (B, N, width) to the same shape.
    """

    def __init__(self, config: Qwen2Config | None = None) -> None:
        super().__init__()
        self.config = config = config or Qwen2Config()
        self.model = _LanguageModel(config)
        if config.queries is not None:
            small, large = config.queries
            self.query_768 = nn.Embedding(small, config.width)
            self.query_1024 = nn.Embedding(large, config.width)

    def forward(self, features: Tensor) -> Tensor:
        """Encode features (B, width, h, w) of the compressor to one token for each query, (B, queries, width).

        Images of 768 and of 1024 pixels have a table each. Others have none of their own: as in transformers, up to as
        many image tokens as query_768 has rows (144) get query_768, and more get query_1024.

        Raises:
            ValueError: The encoder has no queries.
        """
        images = features.flatten(2).transpose(1, 2)
        queries = self.queries(images.shape[1]).expand(len(images), -1, -1)
        return self.encode(torch.cat([images, queries], dim=1), images.shape[1])[:, images.shape[1] :]

    def queries(self, image_tokens: int) -> Tensor:
        """Return the table of queries (queries, width) for an image of so many tokens."""
        if self.config.queries is None:
            raise ValueError("the encoder has no tables of queries: load or train query_768 and query_1024")
        table = self.query_768 if image_tokens <= self.config.queries[0] else self.query_1024
        return table.weight

    def encode(self, x: Tensor, image_tokens: int | None = None) -> Tensor:
        """Return the normed features (B, N, width) of all tokens.

        Args:
            x: Image tokens, then queries (B, N, width). Their positions are 0 to N - 1.
            image_tokens: The number of image tokens; half of all by default.
        """
        for layer in self.model.model.layers:
            x = layer(x, image_tokens)
        return self.model.model.norm(x)


class _LanguageModel(nn.Module):
    """The module between the encoder and Qwen2's decoder, which only its names show."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.model = _Decoder(config)


class _Decoder(nn.Module):
    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm = RmsNorm(config)


class _Block(nn.Module):
    """Transformer block on (B, N, C): image tokens, half of all by default, and queries."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = RmsNorm(config)
        self.mlp = _Mlp(config)

    def forward(self, x: Tensor, image_tokens: int | None = None) -> Tensor:
        image_tokens = x.shape[1] // 2 if image_tokens is None else image_tokens
        x = x + self.self_attn(self.input_layernorm(x), image_tokens)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Attention(nn.Module):
    """Attention with rotary positions. Several heads of queries share one head of keys and values."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.head_width = config.width // config.heads
        self.rope_theta = config.rope_theta
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.key_value_heads * self.head_width)
        self.v_proj = nn.Linear(config.width, config.key_value_heads * self.head_width)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, image_tokens: int) -> Tensor:
        q, k, v = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = _rotation(x, self.head_width, self.rope_theta)
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        shared = q.shape[1] // k.shape[1]
        y = attend(q, k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1), image_tokens)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, heads * D) -> (B, heads, N, D)."""
        return x.reshape(*x.shape[:2], -1, self.head_width).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, image_tokens: int) -> Tensor:
    """Attention in which image tokens see all image tokens, and a query also all queries up to itself.

    Args:
        q: Queries (B, heads, N, D).
        k: Keys, of the same shape.
        v: Values, of the same shape.
        image_tokens: The number of image tokens, which come first.
    """
    n, total = image_tokens, q.shape[2]
    images = F.scaled_dot_product_attention(q[:, :, :n], k[:, :, :n], v[:, :, :n])
    mask = torch.ones(total - n, total, dtype=torch.bool, device=q.device).tril(n)
    return torch.cat([images, F.scaled_dot_product_attention(q[:, :, n:], k, v, attn_mask=mask)], dim=2)


def _rotation(x: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (N, head_width) of the positions of x (B, N, C), in its type.

    As in training, frequencies and angles are in float32.
    """
    exponents = torch.arange(0, head_width, 2, dtype=torch.float32, device=x.device) / head_width
    wide = torch.promote_types(x.dtype, torch.float32)
    positions = torch.arange(x.shape[1], dtype=wide, device=x.device)
    angles = (positions[:, None] * (1.0 / theta**exponents).to(wide)).repeat(1, 2)
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each channel of the first half of a head (B, heads, N, D) with its channel of the second half."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class _Mlp(nn.Module):
    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp, bias=False)
        self.down_proj = nn.Linear(config.mlp, config.width, bias=False)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class RmsNorm(nn.Module):
    """RMS norm over the last dimension, in float32 or wider."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.width))
        self.eps = config.epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)

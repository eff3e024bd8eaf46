"""Qwen2 (Yang et al. 2024) as the second encoder of DeepSeek-OCR-2, with its tables of queries."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from converter.encoders.config import Qwen2Config
from converter.encoders.functional import ACTIVATIONS


class Qwen2Encoder(nn.Module):
    """Qwen2's layers, run on image tokens followed by queries. The output is the features of the queries.

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

        As in transformers, images with up to as many image tokens as query_768 has rows (144, for 768 pixels) get the
        queries of query_768. Larger images get those of query_1024 (256, for 1024 pixels).

        Raises:
            ValueError: The encoder has no queries.
        """
        image_tokens = features.flatten(2).transpose(1, 2)
        batch, num_image_tokens, _ = image_tokens.shape
        queries = self.queries(num_image_tokens).expand(batch, -1, -1)
        return self.encode(torch.cat([image_tokens, queries], dim=1), num_image_tokens)[:, num_image_tokens:]

    def queries(self, num_image_tokens: int) -> Tensor:
        """Return the table of queries (queries, width) for an image with this number of tokens."""
        if self.config.queries is None:
            raise ValueError("the encoder has no tables of queries: load or train query_768 and query_1024")
        table = self.query_768 if num_image_tokens <= self.config.queries[0] else self.query_1024
        return table.weight

    def encode(self, x: Tensor, num_image_tokens: int | None = None) -> Tensor:
        """Return the features (B, N, width) of all tokens after the last norm.

        Args:
            x: Image tokens, then queries (B, N, width), at the positions 0 to N - 1.
            num_image_tokens: The number of image tokens; half of all tokens by default.
        """
        for layer in self.model.model.layers:
            x = layer(x, num_image_tokens)
        return self.model.model.norm(x)


class _LanguageModel(nn.Module):
    """A wrapper that only adds a segment to parameter names: in DeepSeek-OCR-2, they begin with `model.model.`."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.model = _Decoder(config)


class _Decoder(nn.Module):
    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm = RmsNorm(config)


class _Block(nn.Module):
    """Transformer block on image tokens, then queries (B, N, C). Half of the tokens are image tokens by default."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = RmsNorm(config)
        self.mlp = _Mlp(config)

    def forward(self, x: Tensor, num_image_tokens: int | None = None) -> Tensor:
        num_image_tokens = x.shape[1] // 2 if num_image_tokens is None else num_image_tokens
        x = x + self.self_attn(self.input_layernorm(x), num_image_tokens)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Attention(nn.Module):
    """Grouped-query attention with rotary position embeddings: several query heads share a key and value head."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.head_width = config.width // config.heads
        self.rope_theta = config.rope_theta
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.key_value_heads * self.head_width)
        self.v_proj = nn.Linear(config.width, config.key_value_heads * self.head_width)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, num_image_tokens: int) -> Tensor:
        q, k, v = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = _rotary_cos_sin(x, self.head_width, self.rope_theta)
        q, k = _apply_rotary(q, cos, sin), _apply_rotary(k, cos, sin)
        groups = q.shape[1] // k.shape[1]
        y = attend(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), num_image_tokens)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """Split the channels (B, N, heads * D) into heads (B, heads, N, D)."""
        return x.reshape(*x.shape[:2], -1, self.head_width).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, num_image_tokens: int) -> Tensor:
    """Attend from image tokens to all image tokens, and from each query also to the queries up to itself.

    Args:
        q: Queries (B, heads, N, D).
        k: Keys, of the same shape.
        v: Values, of the same shape.
        num_image_tokens: The number of image tokens, which come first.
    """
    n, total = num_image_tokens, q.shape[2]
    image_features = F.scaled_dot_product_attention(q[:, :, :n], k[:, :, :n], v[:, :, :n])
    mask = torch.ones(total - n, total, dtype=torch.bool, device=q.device).tril(n)
    return torch.cat([image_features, F.scaled_dot_product_attention(q[:, :, n:], k, v, attn_mask=mask)], dim=2)


def _rotary_cos_sin(x: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines (N, head_width) of rotary position embeddings for x (B, N, C), in the dtype of x.

    As in training, frequencies and angles are computed in float32, or in float64 for float64.
    """
    exponents = torch.arange(0, head_width, 2, dtype=torch.float32, device=x.device) / head_width
    wide = torch.promote_types(x.dtype, torch.float32)
    positions = torch.arange(x.shape[1], dtype=wide, device=x.device)
    angles = (positions[:, None] * (1.0 / theta**exponents).to(wide)).repeat(1, 2)
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def _apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads (B, heads, N, D). Channel i of the first half and channel i of the second half form a pair."""
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
    """RMS norm over the last dimension, computed in float32 or wider."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.width))
        self.eps = config.epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)

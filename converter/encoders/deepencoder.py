"""The DeepEncoder: SAM, the compressor, and CLIP (version 1) or Qwen2 (version 2) on their output."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from converter.encoders.clip import ClipEncoder
from converter.encoders.config import ClipConfig, Qwen2Config, SamConfig
from converter.encoders.qwen2 import Qwen2Encoder
from converter.encoders.sam import SamEncoder


class DeepEncoder(nn.Module):
    """DeepSeek-OCR's vision encoder (Wei et al. 2025): `sam_model`, with the compressor in it, and `vision_model`."""

    def __init__(self, sam: SamConfig | None = None, clip: ClipConfig | None = None) -> None:
        """Create the encoder; ValueError unless the compressor's last width is the width of CLIP."""
        super().__init__()
        sam, clip = sam or SamConfig(), clip or ClipConfig()
        if sam.compressor is None or sam.compressor[-1] != clip.width:
            raise ValueError(f"SAM's compressor {sam.compressor} must end in CLIP's {clip.width} channels")
        self.sam_model = SamEncoder(sam)
        self.vision_model = ClipEncoder(clip)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, 3, H, W) to tokens (B, N, 2 * width), with N = ceil(H/64) * ceil(W/64), row by row.

        The channels of a token are CLIP's, then SAM's. CLIP's class token is not returned. Images of size 512, 640,
        1024 and 1280 give 64, 100, 256 and 400 tokens with 2048 channels.

        Raises:
            ValueError: Height or width is not a multiple of SAM's patch size.
        """
        features: Tensor = self.sam_model(pixels)
        semantic: Tensor = self.vision_model(None, features)
        return torch.cat([semantic[:, 1:], features.flatten(2).transpose(1, 2)], dim=-1)

    def num_tokens(self, side: int) -> int:
        """Return the number of tokens of an image of `side` pixels along each side."""
        return math.ceil(side / (4 * self.sam_model.config.patch)) ** 2


class DeepEncoderV2(nn.Module):
    """DeepSeek-OCR-2's vision encoder (Wei et al. 2026): `sam_model`, with the compressor in it, and `qwen2_model`."""

    def __init__(self, sam: SamConfig | None = None, qwen2: Qwen2Config | None = None) -> None:
        """Create the encoder; ValueError unless the compressor's last width is that of Qwen2, which has queries."""
        super().__init__()
        sam, qwen2 = sam or SamConfig(compressor=(512, 896)), qwen2 or Qwen2Config()
        if sam.compressor is None or sam.compressor[-1] != qwen2.width:
            raise ValueError(f"SAM's compressor {sam.compressor} must end in Qwen2's {qwen2.width} channels")
        if qwen2.queries is None:
            raise ValueError("Qwen2 must have its two tables of queries")
        self.sam_model = SamEncoder(sam)
        self.qwen2_model = Qwen2Encoder(qwen2)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, 3, H, W) to (B, N, width), one token for each query.

        Images of size 768 and 1024 give 144 and 256 tokens with 896 channels. `Qwen2Encoder.forward` says what others
        give.

        Raises:
            ValueError: Height or width is not a multiple of SAM's patch size.
        """
        return self.qwen2_model(self.sam_model(pixels))

    def num_tokens(self, side: int) -> int:
        """Return the number of tokens of an image of `side` pixels along each side."""
        return len(self.qwen2_model.queries(math.ceil(side / (4 * self.sam_model.config.patch)) ** 2))

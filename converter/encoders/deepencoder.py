"""The DeepEncoder: SAM and the compressor, followed by CLIP (version 1) or Qwen2 (version 2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from converter.encoders.clip import ClipEncoder
from converter.encoders.config import ClipConfig, Qwen2Config, SamConfig
from converter.encoders.qwen2 import Qwen2Encoder
from converter.encoders.sam import SamEncoder


class DeepEncoder(nn.Module):
    """DeepSeek-OCR's vision encoder (Wei et al. 2025): `sam_model`, which has the compressor, and `vision_model`."""

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

        The channels of a token are CLIP's, then SAM's. CLIP's class token is dropped. Images of 512, 640, 1024 and
        1280 pixels give 64, 100, 256 and 400 tokens with 2048 channels.

        Raises:
            ValueError: Height or width is not a multiple of SAM's patch size.
        """
        features: Tensor = self.sam_model(pixels)
        clip_tokens: Tensor = self.vision_model(None, features)
        return torch.cat([clip_tokens[:, 1:], features.flatten(2).transpose(1, 2)], dim=-1)

    def num_tokens(self, image_size: int) -> int:
        """Return the number of tokens of a square image, given its height in pixels."""
        return math.ceil(image_size / (4 * self.sam_model.config.patch)) ** 2


class DeepEncoderV2(nn.Module):
    """DeepSeek-OCR-2's vision encoder (Wei et al. 2026): `sam_model`, which has the compressor, and `qwen2_model`."""

    def __init__(self, sam: SamConfig | None = None, qwen2: Qwen2Config | None = None) -> None:
        """Create the encoder; ValueError if the compressor's last width is not Qwen2's, or Qwen2 has no queries."""
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

        Images of 768 and 1024 pixels give 144 and 256 tokens with 896 channels. For others, see `Qwen2Encoder.forward`.

        Raises:
            ValueError: Height or width is not a multiple of SAM's patch size.
        """
        return self.qwen2_model(self.sam_model(pixels))

    def num_tokens(self, image_size: int) -> int:
        """Return the number of tokens of a square image, given its height in pixels."""
        return len(self.qwen2_model.queries(math.ceil(image_size / (4 * self.sam_model.config.patch)) ** 2))

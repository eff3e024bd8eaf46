"""The DeepEncoder: SAM, the compressor, CLIP on their output, and the concatenation of both outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from converter.encoders.clip import ClipEncoder
from converter.encoders.config import ClipConfig, SamConfig
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

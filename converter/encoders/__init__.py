"""DeepSeek-OCR's DeepEncoder in plain torch: SAM, a 16x convolutional compressor, and CLIP on their output.

    import safetensors.torch
    from converter.encoders import DeepEncoder

    encoder = DeepEncoder()
    # No SAM checkpoint contains net_2 and net_3, DeepSeek's compressor. Load or train them.
    encoder.sam_model.load_state_dict(safetensors.torch.load_file("deepencoder-sam.safetensors"), strict=False)
    encoder.vision_model.load_state_dict(safetensors.torch.load_file("deepencoder-clip.safetensors"))
    tokens = encoder(pixels)  # (B, 3, 1024, 1024) -> (B, 256, 2048)

Parameters have the names and shapes of DeepSeek-OCR's own modules. DeepSeek's released checkpoint lacks the constant
`vision_model.embeddings.position_ids`. The defaults of SamConfig and ClipConfig are DeepSeek's sizes; `sam_config_from`
and `clip_config_from` infer other sizes, such as SAM ViT-H, from the shapes of a checkpoint.

`DeepEncoderV2` is DeepSeek-OCR-2's: `qwen2_model` in place of `vision_model`, and (B, 3, 1024, 1024) -> (B, 256, 896).
No Qwen2 checkpoint contains query_768 and query_1024, its queries.

In shapes, B is the batch size, C the number of channels, D the channels per head, H and W the image size in pixels, and
h and w in patches. A module computes in the dtype and on the device of its weights. Only position embeddings are
resampled in float32 or wider. New modules have torch's default weights, and zeros for position embeddings.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from converter.encoders.config import (
    ClipConfig,
    Qwen2Config,
    SamConfig,
    clip_config_from,
    qwen2_config_from,
    sam_config_from,
)

if TYPE_CHECKING:
    from converter.encoders.clip import ClipEncoder
    from converter.encoders.deepencoder import DeepEncoder, DeepEncoderV2
    from converter.encoders.qwen2 import Qwen2Encoder
    from converter.encoders.sam import SamEncoder

__all__ = [
    "ClipConfig",
    "ClipEncoder",
    "DeepEncoder",
    "DeepEncoderV2",
    "Qwen2Config",
    "Qwen2Encoder",
    "SamConfig",
    "SamEncoder",
    "clip_config_from",
    "qwen2_config_from",
    "sam_config_from",
]

_MODULES = {
    "ClipEncoder": "clip",
    "DeepEncoder": "deepencoder",
    "DeepEncoderV2": "deepencoder",
    "Qwen2Encoder": "qwen2",
    "SamEncoder": "sam",
}


def __getattr__(name: str) -> object:
    """Import an encoder on first access, so that a conversion, which only needs the sizes, does not import torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

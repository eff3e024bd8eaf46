"""DeepSeek-OCR's DeepEncoder in plain torch: SAM, a 16x convolutional compressor, then CLIP on SAM's features.

    import safetensors.torch
    from converter.encoders import DeepEncoder

    encoder = DeepEncoder()
    # net_2 and net_3, DeepSeek's compressor, are in no SAM checkpoint: load or train them.
    encoder.sam_model.load_state_dict(safetensors.torch.load_file("deepencoder-sam.safetensors"), strict=False)
    encoder.vision_model.load_state_dict(safetensors.torch.load_file("deepencoder-clip.safetensors"))
    tokens = encoder(pixels)  # (B, 3, 1024, 1024) -> (B, 256, 2048)

Names and shapes of parameters are those of DeepSeek-OCR's own modules. Its released checkpoint lacks
`vision_model.embeddings.position_ids`, a constant. Sizes come from frozen configs whose defaults are DeepSeek's; other
sizes (SAM ViT-H, tiny ones for tests) are read off a checkpoint's shapes.

In shapes, B is the batch, C channels, D the channels of one head, H and W pixels, h and w patches. A module computes in
the dtype and on the device of its weights and casts nothing; position tables alone are resampled in float32 at least.
Fresh weights are torch's defaults with zeros for positions: they are there to be loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from converter.encoders.config import ClipConfig, SamConfig, clip_config_from, sam_config_from

if TYPE_CHECKING:
    from converter.encoders.clip import ClipEncoder
    from converter.encoders.deepencoder import DeepEncoder
    from converter.encoders.sam import SamEncoder

__all__ = ["ClipConfig", "ClipEncoder", "DeepEncoder", "SamConfig", "SamEncoder", "clip_config_from", "sam_config_from"]

_MODULES = {"ClipEncoder": "clip", "DeepEncoder": "deepencoder", "SamEncoder": "sam"}


def __getattr__(name: str) -> object:
    """Import an encoder on first use: a conversion needs only the configs, and no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

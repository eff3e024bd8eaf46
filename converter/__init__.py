"""Converts SAM, CLIP and Qwen2 checkpoints into DeepSeek-OCR's DeepEncoder, and from any layout into any other.

    import converter
    record = converter.convert("sam_vit_b_01ec64.pth", "sam")
    record = converter.encoder(sam="sam_vit_b_01ec64.pth", clip="openai/clip-vit-large-patch14", compressor="random:0")
    tensors = converter.load("openai/clip-vit-large-patch14", "clip", device="cuda")
    inspection = converter.inspect("openai/clip-vit-large-patch14")
    difference = converter.diff("before.safetensors", "after.safetensors")
    result = converter.verify("deepencoder-sam.safetensors", "sam_vit_b_01ec64.pth")

These functions raise the exceptions of `converter.errors`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from converter.api.convert import convert
    from converter.api.derive import derive
    from converter.api.diff import diff
    from converter.api.encoder import encoder
    from converter.api.inspect import inspect
    from converter.api.load import load
    from converter.api.verify import verify

__all__ = ["__version__", "convert", "derive", "diff", "encoder", "inspect", "load", "verify"]


# Functions are imported on first use: a conversion does not need torch, which `verify` imports.


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"converter.api.{name}"), name)

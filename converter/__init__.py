"""Converts SAM and CLIP checkpoints, in any of their layouts, into DeepSeek-OCR's DeepEncoder, and into each other.

    import converter
    card = converter.convert("sam_vit_b_01ec64.pth", "sam")
    card = converter.encoder(sam="sam_vit_b_01ec64.pth", clip="openai/clip-vit-large-patch14", compressor="random:0")
    tensors = converter.load("openai/clip-vit-large-patch14", "clip", device="cuda")
    found = converter.inspect("openai/clip-vit-large-patch14")
    moved = converter.diff("before.safetensors", "after.safetensors")

and `from converter.api.verify import verify`. All raise what is drawn in `converter.errors`.
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

# Imported when they are first asked for: a command pays for its own verb alone.
_VERBS = {
    "convert": "converter.api.convert",
    "derive": "converter.api.derive",
    "diff": "converter.api.diff",
    "encoder": "converter.api.encoder",
    "inspect": "converter.api.inspect",
    "load": "converter.api.load",
    "verify": "converter.api.verify",
}


def __getattr__(name: str) -> object:
    if name not in _VERBS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_VERBS[name]), name)

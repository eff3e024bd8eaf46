"""Converts SAM and CLIP checkpoints, in any of their layouts, into DeepSeek-OCR's DeepEncoder, and into each other.

    import converter
    card = converter.convert("sam_vit_b_01ec64.pth", "sam")
    card = converter.encoder(sam="sam_vit_b_01ec64.pth", clip="openai/clip-vit-large-patch14", compressor="random:0")
    tensors = converter.load("openai/clip-vit-large-patch14", "clip", device="cuda")
    found = converter.inspect("openai/clip-vit-large-patch14")
    moved = converter.diff("before.safetensors", "after.safetensors")

and `from converter.verify import verify`. All raise what is drawn in `converter.errors`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from converter.version import __version__

if TYPE_CHECKING:
    from converter.assemble import encoder
    from converter.comparison import diff
    from converter.derivation import derive
    from converter.inspection import inspect
    from converter.loading import load
    from converter.pipeline import convert

__all__ = ["__version__", "convert", "derive", "diff", "encoder", "inspect", "load"]

# Imported when they are first asked for: a command pays for its own verb alone.
_VERBS = {
    "convert": "converter.pipeline",
    "derive": "converter.derivation",
    "diff": "converter.comparison",
    "encoder": "converter.assemble",
    "inspect": "converter.inspection",
    "load": "converter.loading",
}


def __getattr__(name: str) -> object:
    if name not in _VERBS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_VERBS[name]), name)

"""Converts SAM and CLIP checkpoints, in any of their layouts, into DeepSeek-OCR's DeepEncoder.

    import converter
    card = converter.convert("sam_vit_b_01ec64.pth", "sam")
    found = converter.inspect("openai/clip-vit-large-patch14")

Both return values of `converter.report` and raise what is drawn in `converter.errors`.
"""

from __future__ import annotations

from converter.inspection import inspect
from converter.pipeline import convert
from converter.version import __version__

__all__ = ["__version__", "convert", "inspect"]

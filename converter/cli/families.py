"""`dsocr-convert sam`, `clip` and `qwen2`: convert the encoder of a family."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import converter
from converter.cli.options import Source, WriteOptions, add_options
from converter.cli.run import run_conversion
from converter.options import ConvertOptions, HubOptions

FillFrom = Annotated[
    str | None, typer.Option(metavar="SOURCE", help="Take tensors that SOURCE lacks from this checkpoint.")
]


@add_options(ConvertOptions, WriteOptions, HubOptions)
def sam(source: Source, fill_from: FillFrom = None, **options: Any) -> None:
    """Convert a SAM checkpoint: Meta's, transformers', timm's, or the SAM inside an OCR model."""
    run_conversion(converter.convert, source, "sam", fill_from=fill_from, **options)


@add_options(ConvertOptions, WriteOptions, HubOptions)
def clip(source: Source, fill_from: FillFrom = None, **options: Any) -> None:
    """Convert a CLIP checkpoint: OpenAI's, transformers', open_clip's, timm's, or the CLIP inside an OCR model."""
    run_conversion(converter.convert, source, "clip", fill_from=fill_from, **options)


@add_options(ConvertOptions, WriteOptions, HubOptions)
def qwen2(source: Source, fill_from: FillFrom = None, **options: Any) -> None:
    """Convert a Qwen2 checkpoint for DeepSeek-OCR-2: transformers', or the Qwen2 inside DeepSeek-OCR-2."""
    run_conversion(converter.convert, source, "qwen2", fill_from=fill_from, **options)

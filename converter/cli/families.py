"""`dsocr-convert sam`, `clip` and `qwen2`: convert the encoder of a family. All conversions run and report alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import converter
from converter.cli import console, render
from converter.cli.options import Source, WriteOptions, add_options
from converter.options import ConvertOptions, HubOptions

if TYPE_CHECKING:
    from converter.output.record import ConversionRecord


@add_options(ConvertOptions, WriteOptions, HubOptions)
def sam(source: Source, **options: Any) -> None:
    """Convert a SAM checkpoint: Meta's, transformers', timm's, or the SAM inside an OCR model."""
    run_conversion(converter.convert, source, "sam", **options)


@add_options(ConvertOptions, WriteOptions, HubOptions)
def clip(source: Source, **options: Any) -> None:
    """Convert a CLIP checkpoint: OpenAI's, transformers', open_clip's, timm's, or the CLIP inside an OCR model."""
    run_conversion(converter.convert, source, "clip", **options)


@add_options(ConvertOptions, WriteOptions, HubOptions)
def qwen2(source: Source, **options: Any) -> None:
    """Convert a Qwen2 checkpoint for DeepSeek-OCR-2: transformers', or the Qwen2 inside DeepSeek-OCR-2."""
    run_conversion(converter.convert, source, "qwen2", **options)


def run_conversion(
    convert: Callable[..., ConversionRecord],
    *sources: str | None,
    record: list[Path] | None,
    json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Run a conversion and show its record: the result on stdout, the rest on stderr.

    Args:
        convert: `converter.convert` or `converter.encoder`.
        sources: The positional arguments of `convert`.
        record: Files for the conversion record or a model card.
        json: Whether to print the record as JSON.
        quiet: Whether to print only the result.
        options: The other keyword arguments of `convert`.
    """
    with console.Bar(enabled=not quiet) as bar:
        conversion = convert(*sources, record=record or (), on_progress=bar, **options)
    if not quiet:
        console.say(*render.summary(conversion))
        if record and conversion.written:
            console.say(f"record: {', '.join(map(str, record))}")
    if json:
        console.result_json(conversion.to_json())
    elif conversion.written or conversion.unchanged:
        console.result(conversion.output)
    else:
        console.result(*render.plan(conversion))

"""`dsocr-convert encoder`: writes a whole DeepEncoder, or puts one into another checkpoint."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import converter
from converter.assembly.options import EncoderOptions
from converter.cli.families import run_conversion
from converter.cli.options import WriteOptions, add_options
from converter.options import HubOptions

Source = Annotated[
    str | None,
    typer.Argument(
        metavar="[SOURCE]", help="A checkpoint that holds both encoders, such as DeepSeek-OCR or DeepSeek-OCR-2."
    ),
]


@add_options(EncoderOptions, WriteOptions, HubOptions)
def encoder(source: Source = None, **options: Any) -> None:
    """Write a whole DeepEncoder: extracted from SOURCE, or assembled from --sam and --clip, or --sam and --qwen2."""
    run_conversion(converter.encoder, source, **options)

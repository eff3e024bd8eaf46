"""`dsocr-convert encoder`: writes a whole DeepEncoder, or puts one into another checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import converter
from converter.cli.options import WriteOptions, add_options
from converter.cli.run import run_conversion
from converter.options import ConvertOptions, DtypeName, HubOptions

Source = Annotated[
    str | None,
    typer.Argument(
        metavar="[SOURCE]", help="A checkpoint that holds both encoders, such as DeepSeek-OCR or DeepSeek-OCR-2."
    ),
]


@dataclass(frozen=True)
class EncoderOptions:
    """Options of `converter.encoder`."""

    sam: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Without SOURCE: a SAM checkpoint of any layout.")
    ] = None
    clip: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Without SOURCE: a CLIP checkpoint of any layout.")
    ] = None
    qwen2: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="In place of --clip: a Qwen2 checkpoint, for DeepSeek-OCR-2.")
    ] = None
    compressor: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE|random:SEED", help="Checkpoint with trained net_2 and net_3 weights, or random:SEED."
        ),
    ] = None
    queries: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE|random:SEED", help="With --qwen2: checkpoint with trained queries, or random:SEED."
        ),
    ] = None
    with_projector: Annotated[
        bool, typer.Option("--with-projector", help="Also take projector, view_seperator and any image_newline.")
    ] = False
    add_prefix: Annotated[str, typer.Option(metavar="NAME.", help="Prefix of all tensor names in the output.")] = (
        "model."
    )
    to: Annotated[
        str, typer.Option(metavar="mlx|mmproj", help="Write for mlx-vlm or llama.cpp. [default: DeepSeek-OCR's names]")
    ] = ""
    into: Annotated[
        Path | None,
        typer.Option(metavar="CHECKPOINT", help="Write a copy of this checkpoint with the encoder in it."),
    ] = None
    dtype: Annotated[DtypeName, typer.Option(help="Cast the encoder; with --into, keep means CHECKPOINT's types.")] = (
        "keep"
    )


@add_options(EncoderOptions, (ConvertOptions, ["prefix", "lora", "adapter_name"]), WriteOptions, HubOptions)
def encoder(source: Source = None, **options: Any) -> None:
    """Write a whole DeepEncoder: extracted from SOURCE, or assembled from --sam and --clip, or --sam and --qwen2."""
    run_conversion(converter.encoder, source, **options)

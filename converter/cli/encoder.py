"""`dsocr-convert encoder`: one checkpoint that holds a whole DeepEncoder, or DeepSeek-OCR with another one in it.

Annotations are not postponed here: typer would have to compile each of them again at every start.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from converter.cli import views
from converter.cli.options import CardFile, Download, DryRun, Force, Format, Hub, Json, Quiet, Revision


def encoder(
    source: Annotated[
        str | None, typer.Argument(metavar="[SOURCE]", help="A checkpoint that holds both encoders: DeepSeek-OCR.")
    ] = None,
    sam: Annotated[str | None, typer.Option(metavar="SOURCE", help="Without SOURCE: the SAM, of any layout.")] = None,
    clip: Annotated[str | None, typer.Option(metavar="SOURCE", help="Without SOURCE: the CLIP, of any layout.")] = None,
    compressor: Annotated[
        str | None,
        typer.Option(metavar="SOURCE|random:SEED", help="What was trained with net_2 and net_3, or untrained ones."),
    ] = None,
    with_projector: Annotated[
        bool, typer.Option("--with-projector", help="Take projector, image_newline and view_seperator along.")
    ] = False,
    prefix: Annotated[str, typer.Option("--prefix", metavar="NAME.", help="What all names begin with.")] = "model.",
    into: Annotated[
        Path | None,
        typer.Option(metavar="CHECKPOINT", help="Write a copy of this DeepSeek-OCR with the encoder in it."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="Where to write; a folder if CHECKPOINT is. [default: deepencoder.FORMAT]",
        ),
    ] = None,
    dtype: Annotated[
        Literal["keep", "float32", "float16", "bfloat16"],
        typer.Option(help="Cast the encoder; with --into, keep means CHECKPOINT's types."),
    ] = "keep",
    format: Format = None,
    revision: Revision = None,
    hub: Hub = None,
    download: Download = False,
    force: Force = False,
    dry_run: DryRun = False,
    card: CardFile = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a whole DeepEncoder: taken out of SOURCE, or put together from --sam, --clip and --compressor."""
    options = locals()
    # Not at the top: the other commands do not need it.
    from converter.api.encoder import encoder as convert

    views.show_conversion(convert, **options)

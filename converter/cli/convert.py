"""`dsocr-convert`: SAM and CLIP checkpoints into the DeepEncoder's layout.

Annotations are not postponed here: typer would have to compile each of them again at every start.
"""

from pathlib import Path
from typing import Annotated

import typer

import converter
from converter.cli import console, mapping, views
from converter.cli.diff import diff
from converter.cli.encoder import encoder
from converter.cli.options import (
    PROGRAM,
    CardFile,
    Download,
    DryRun,
    Dtype,
    Force,
    Format,
    Hub,
    Json,
    MappingFile,
    Quiet,
    Revision,
    StateDict,
    Version,
)

app = typer.Typer(no_args_is_help=True, **PROGRAM)
app.add_typer(mapping.app, name="mapping")

Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help="A checkpoint: file, folder, sharded index, or org/name on a hub.")
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="PATH",
        help="Where to write; with --to sam-hf or clip-hf also a folder, for from_pretrained. [default: LAYOUT.FORMAT]",
    ),
]
To = Annotated[
    str,
    typer.Option(
        metavar="LAYOUT",
        autocompletion=mapping.complete_layout,
        show_default=False,
        help="The layout to write, as `mapping list` names it. [default: the DeepEncoder's]",
    ),
]
Whole = Annotated[bool, typer.Option("--whole", help="With --to: what lies beside the encoder, too.")]
FillFrom = Annotated[
    str | None, typer.Option(metavar="SOURCE", help="A checkpoint to take from what LAYOUT has and SOURCE lacks.")
]
ImageSize = Annotated[
    int | None, typer.Option(metavar="PIXELS", min=1, help="Resample the positions for images of this size.")
]


@app.command()
def sam(
    source: Source,
    out: Output = None,
    to: To = "",
    whole: Whole = False,
    fill_from: FillFrom = None,
    mapping: MappingFile = None,
    dtype: Dtype = "keep",
    format: Format = None,
    state_dict: StateDict = None,
    revision: Revision = None,
    hub: Hub = None,
    download: Download = False,
    force: Force = False,
    dry_run: DryRun = False,
    card: CardFile = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a SAM checkpoint: Meta's, transformers', timm's, or the SAM inside an OCR model."""
    views.show_conversion(converter.convert, family="sam", **locals())


@app.command()
def clip(
    source: Source,
    out: Output = None,
    to: To = "",
    whole: Whole = False,
    fill_from: FillFrom = None,
    mapping: MappingFile = None,
    dtype: Dtype = "keep",
    image_size: ImageSize = None,
    format: Format = None,
    state_dict: StateDict = None,
    revision: Revision = None,
    hub: Hub = None,
    download: Download = False,
    force: Force = False,
    dry_run: DryRun = False,
    card: CardFile = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a CLIP checkpoint: OpenAI's, transformers', open_clip's, timm's, or the CLIP inside an OCR model."""
    views.show_conversion(converter.convert, family="clip", **locals())


@app.command()
def inspect(
    source: Source,
    state_dict: StateDict = None,
    revision: Revision = None,
    hub: Hub = None,
    download: Download = False,
    json: Json = False,
) -> None:
    """Show what a checkpoint holds, which layout it is and what would be converted. Reads no weights."""
    found = converter.inspect(source, state_dict=state_dict, revision=revision, hub=hub, download=download)
    if json:
        console.result_json(found.to_json())
    else:
        console.result(*views.inspection(found))


app.command()(encoder)
app.command()(diff)


@app.callback()
def options(version: Version = False) -> None:
    """Convert SAM and CLIP checkpoints into DeepSeek-OCR's DeepEncoder."""

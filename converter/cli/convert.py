"""`dsocr-convert`: converts checkpoints, with one command for each family."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import converter
from converter.checkpoint.file_kinds import list_folder
from converter.cli import console, mapping, render
from converter.cli.diff import diff
from converter.cli.encoder import encoder
from converter.cli.options import PROGRAM, Json, Version, WriteOptions, add_options
from converter.cli.run import run_conversion
from converter.errors import SourceError
from converter.options import ConvertOptions, HubOptions
from converter.output.json_document import as_json

app = typer.Typer(no_args_is_help=True, **PROGRAM)
app.add_typer(mapping.app, name="mapping")

Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help="A checkpoint: file, folder, sharded index, or org/name on a hub.")
]
FillFrom = Annotated[
    str | None, typer.Option(metavar="SOURCE", help="Take tensors that SOURCE lacks from this checkpoint.")
]

Values = Annotated[
    bool, typer.Option("--values", help="Read the weights, and show their minimum, maximum, mean, NaN and infinities.")
]


@app.command()
@add_options(ConvertOptions, WriteOptions, HubOptions)
def sam(source: Source, fill_from: FillFrom = None, **options: Any) -> None:
    """Convert a SAM checkpoint: Meta's, transformers', timm's, or the SAM inside an OCR model."""
    run_conversion(converter.convert, source, "sam", fill_from=fill_from, **options)


@app.command()
@add_options(ConvertOptions, WriteOptions, HubOptions)
def clip(source: Source, fill_from: FillFrom = None, **options: Any) -> None:
    """Convert a CLIP checkpoint: OpenAI's, transformers', open_clip's, timm's, or the CLIP inside an OCR model."""
    run_conversion(converter.convert, source, "clip", fill_from=fill_from, **options)


@app.command()
@add_options(ConvertOptions, WriteOptions, HubOptions)
def qwen2(source: Source, fill_from: FillFrom = None, **options: Any) -> None:
    """Convert a Qwen2 checkpoint for DeepSeek-OCR-2: transformers', or the Qwen2 inside DeepSeek-OCR-2."""
    run_conversion(converter.convert, source, "qwen2", fill_from=fill_from, **options)


@app.command()
@add_options((ConvertOptions, ["state_dict", "prefix"]), HubOptions)
def inspect(source: Source, values: Values = False, json: Json = False, **options: Any) -> None:
    """Show the tensors of a checkpoint, its layout and what a conversion would write. Reads no weights by default."""
    try:
        with console.Bar(values) as bar:
            inspection = converter.inspect(source, values=values, on_progress=bar, **options)
    except SourceError:
        # What the files are helps to choose another one.
        if Path(source).is_dir():
            files = list_folder(Path(source))
            if json:
                console.result_json({"source": source, "folder": as_json(files)})
            else:
                console.result(*render.folder(files))
        raise
    if json:
        console.result_json(inspection.to_json())
    else:
        console.result(*render.inspection(inspection))


app.command()(encoder)
app.command()(diff)


@app.callback()
def program(version: Version = False) -> None:
    """Convert SAM, CLIP and Qwen2 checkpoints into DeepSeek-OCR's DeepEncoder."""

"""`dsocr-convert inspect`: shows what a checkpoint holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import converter
from converter.checkpoint.file_kinds import list_folder
from converter.cli import console, render
from converter.cli.options import Json, Source, add_options
from converter.errors import SourceError
from converter.options import ConvertOptions, HubOptions
from converter.output.json_document import as_json

Values = Annotated[
    bool, typer.Option("--values", help="Read the weights, and show their minimum, maximum, mean, NaN and infinities.")
]


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

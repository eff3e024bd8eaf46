"""`dsocr-convert inspect`: shows what a checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import converter
from converter.checkpoint.file_kinds import list_folder
from converter.cli import console, render
from converter.cli.options import Json, Source, add_options
from converter.errors import SourceError
from converter.options import ConvertOptions, HubOptions, option
from converter.output.json_document import as_json


@dataclass(frozen=True)
class InspectOptions:
    """Options of the command."""

    values: bool = option("Read the weights, and show their minimum, maximum, mean, NaN and infinities.", default=False)
    json: Json = False


@add_options(InspectOptions, (ConvertOptions, ["state_dict", "prefix"]), HubOptions)
def inspect(source: Source, **options: Any) -> None:
    """Show the tensors of a checkpoint, its layout and what a conversion would write. Reads no weights by default."""
    values, json = options.pop("values"), options.pop("json")
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

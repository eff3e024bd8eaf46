"""What both programs have: how they are set up, and options, spelt and explained once."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from converter import __version__
from converter.cli import console

# No rich markup in help texts and no rich tracebacks: importing rich would slow down every start.
PROGRAM: dict[str, Any] = {
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}

MappingFile = Annotated[
    Path | None, typer.Option("--mapping", metavar="FILE.yaml", help="Use this mapping; recognise nothing.")
]
StateDict = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Which state dict, where a file holds several (model, ema; . for the top)."),
]
Dtype = Annotated[Literal["keep", "float32", "float16", "bfloat16"], typer.Option(help="Cast floating-point tensors.")]
Format = Annotated[
    Literal["safetensors", "pth"] | None,
    typer.Option(help="What to write; pth is for torch.load. [default: by the output's ending]"),
]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace an existing output.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan; write nothing.")]
Revision = Annotated[
    str | None, typer.Option(metavar="REV", help="On a hub: the branch, tag or commit. [default: the main branch]")
]
Hub = Annotated[str | None, typer.Option(metavar="hf|modelscope", help="The hub that SOURCE is on.")]
Download = Annotated[bool, typer.Option("--download", help="Fetch whole files into the hub's own cache.")]
Html = Annotated[Path | None, typer.Option(metavar="FILE", help="Write a report to open in a browser.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors alone, and the result.")]


def _version(wanted: bool) -> None:
    if wanted:
        console.result(f"{Path(sys.argv[0]).name} {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
]
CardFile = Annotated[
    list[Path] | None,
    typer.Option("--card", metavar="FILE.json|FILE.md", help="Write the card, or a model card; may be repeated."),
]

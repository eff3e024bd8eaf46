"""`dsocr-convert`: SAM and CLIP checkpoints into the DeepEncoder's layout.

Annotations are not postponed here: typer would have to compile each of them again at every start.
"""

from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from converter import catalogue, inspection, pipeline
from converter.cli import console, views
from converter.cli.options import Download, Hub, Json, MappingFile, Quiet, Revision, StateDict, Version
from converter.report import Card

# No rich markup in help texts and no rich tracebacks: importing rich would slow down every start.
app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
mapping_app = typer.Typer(
    help="List, show and check the mapping files that describe layouts.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(mapping_app, name="mapping")

Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help="A checkpoint: file, folder, sharded index, or org/name on a hub.")
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Where to write. [default: LAYOUT.FORMAT]"),
]


def _complete_layout(incomplete: str) -> list[str]:
    return [name for name in catalogue.names() if name.startswith(incomplete)]


To = Annotated[
    str,
    typer.Option(
        metavar="LAYOUT",
        autocompletion=_complete_layout,
        show_default=False,
        help="The layout to write, as `mapping list` names it. [default: the DeepEncoder's]",
    ),
]
Whole = Annotated[bool, typer.Option("--whole", help="With --to: what lies beside the encoder, too.")]
FillFrom = Annotated[
    str | None, typer.Option(metavar="SOURCE", help="A checkpoint to take from what LAYOUT has and SOURCE lacks.")
]
Dtype = Annotated[Literal["keep", "float32", "float16", "bfloat16"], typer.Option(help="Cast floating-point tensors.")]
Format = Annotated[Literal["safetensors", "pth"], typer.Option(help="What to write; pth is for torch.load.")]
ImageSize = Annotated[
    int | None, typer.Option(metavar="PIXELS", min=1, help="Resample the positions for images of this size.")
]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace an existing output.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan; write nothing.")]


@app.command()
def sam(
    source: Source,
    output: Output = None,
    to: To = "",
    whole: Whole = False,
    fill_from: FillFrom = None,
    mapping: MappingFile = None,
    dtype: Dtype = "keep",
    format: Format = "safetensors",
    state_dict: StateDict = None,
    revision: Revision = None,
    hub: Hub = None,
    download: Download = False,
    force: Force = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a SAM checkpoint: Meta's, transformers', timm's, or the SAM inside an OCR model."""
    with console.Bar(enabled=not quiet) as bar:
        card = pipeline.convert(
            source,
            "sam",
            out=output,
            to=to,
            whole=whole,
            fill_from=fill_from,
            mapping=mapping,
            dtype=dtype,
            format=format,
            state_dict=state_dict,
            force=force,
            dry_run=dry_run,
            revision=revision,
            hub=hub,
            download=download,
            progress=bar,
        )
    _show(card, json, quiet)


@app.command()
def clip(
    source: Source,
    output: Output = None,
    to: To = "",
    whole: Whole = False,
    fill_from: FillFrom = None,
    mapping: MappingFile = None,
    dtype: Dtype = "keep",
    image_size: ImageSize = None,
    format: Format = "safetensors",
    state_dict: StateDict = None,
    revision: Revision = None,
    hub: Hub = None,
    download: Download = False,
    force: Force = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a CLIP checkpoint: OpenAI's, transformers', open_clip's, timm's, or the CLIP inside an OCR model."""
    with console.Bar(enabled=not quiet) as bar:
        card = pipeline.convert(
            source,
            "clip",
            out=output,
            to=to,
            whole=whole,
            fill_from=fill_from,
            mapping=mapping,
            dtype=dtype,
            image_size=image_size,
            format=format,
            state_dict=state_dict,
            force=force,
            dry_run=dry_run,
            revision=revision,
            hub=hub,
            download=download,
            progress=bar,
        )
    _show(card, json, quiet)


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
    found = inspection.inspect(source, state_dict=state_dict, revision=revision, hub=hub, download=download)
    if json:
        console.result_json(found.to_json())
    else:
        console.result("\n".join(views.inspection(found)))


@mapping_app.command("list")
def list_mappings() -> None:
    """List the layouts that are known."""
    width = max(map(len, catalogue.names()))
    for name in catalogue.names():
        console.result(f"{name:{width}}  {catalogue.load(name).description}")


@mapping_app.command("show")
def show_mapping(name: Annotated[str, typer.Argument(metavar="LAYOUT", autocompletion=_complete_layout)]) -> None:
    """Print the mapping file of a layout, to read or to start one's own from."""
    console.result(catalogue.text(name).rstrip())


@mapping_app.command("check")
def check_mapping(
    file: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="A mapping file.")],
    source: Annotated[str | None, typer.Argument(metavar="[SOURCE]", help="A checkpoint to try it on.")] = None,
) -> None:
    """Check a mapping file, and what it would make of a checkpoint."""
    mapping = catalogue.load_file(file)
    lossy = mapping.lossy()
    rules = views.count(len(mapping.rules) + len(mapping.beside), "rule")
    console.result(f"{file}: {mapping.name}, {rules}, valid")
    for rule, why in lossy:
        console.result(f"  {rule.place}: cannot be inverted: {why}")
    if source is not None:
        card = pipeline.convert(source, mapping.family, mapping=file, dry_run=True)
        console.result("\n".join(views.summary(card)))


def _show(card: Card, json: bool, quiet: bool) -> None:
    """The result on stdout, the rest on stderr."""
    if not quiet:
        for line in views.summary(card):
            console.say(line)
    if json:
        console.result_json(card.to_json())
    elif card.written:
        console.result(card.output)
    else:
        console.result("\n".join(views.plan(card)))


@app.callback()
def options(version: Version = False) -> None:
    """Convert SAM and CLIP checkpoints into DeepSeek-OCR's DeepEncoder."""


def main() -> NoReturn:
    """The program."""
    console.leave(console.run(app))

"""`dsocr-convert mapping`: lists, shows, checks and derives mapping files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import converter
from converter.cli import console, render
from converter.cli.options import Json, Quiet, add_options, complete_layout
from converter.errors import SourceError, UsageError
from converter.layouts import registry
from converter.options import ConvertOptions, HubOptions, option
from converter.output.names import fold_names

if TYPE_CHECKING:
    from converter.derivation.mapping import Derived

# Names to print of each list, and of each list after an error; --json prints all.
_MAX_NAMES, _MAX_NAMES_IN_ERROR = 8, 3

NewLayout = Annotated[str, typer.Argument(metavar="SOURCE", help="A checkpoint in a new layout.")]
Target = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        autocompletion=complete_layout,
        help="The same weights in a known layout, or the name of a layout: then only names are compared.",
    ),
]

MappingFiles = Annotated[
    list[Path],
    typer.Argument(
        metavar="FILE.yaml... [SOURCE]", help="Mapping files; after a single one, a checkpoint to try it on."
    ),
]

app = typer.Typer(
    help="List, show, check and derive the mapping files that describe layouts.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


@app.command("list")
def list_mappings() -> None:
    """List the known layouts."""
    width = max(map(len, registry.layout_names()))
    for name in registry.layout_names():
        console.result(f"{name:{width}}  {registry.load(name).description}")


@app.command("show")
def show_mapping(name: Annotated[str, typer.Argument(metavar="LAYOUT", autocompletion=complete_layout)]) -> None:
    """Print the mapping file of a layout, for example as a start for your own."""
    console.result(*registry.yaml_text(name).rstrip().split("\n"))


@app.command("schema")
def mapping_schema() -> None:
    """Print the JSON Schema of mapping files, for editors."""
    console.result(*registry.schema().splitlines())


@app.command("check")
@add_options(HubOptions)
def check_mapping(paths: MappingFiles, **options: Any) -> None:
    """Check mapping files, and try one on a checkpoint."""
    first, *others = paths
    files = [first, *(path for path in others if path.suffix in (".yaml", ".yml"))]
    sources = [str(path) for path in others if path.suffix not in (".yaml", ".yml")]
    if len(sources) > 1 or (sources and len(files) > 1):
        raise UsageError(f"{sources[-1]}: expected mapping files, or one mapping file and one checkpoint")
    codes = [console.run(partial(_check, file)) for file in files]
    if any(codes):
        raise typer.Exit(max(codes))
    if sources:
        record = converter.convert(
            sources[0], registry.load_mapping_file(first).family, mapping=first, dry_run=True, **options
        )
        console.result(*render.summary(record))


def _check(file: Path) -> None:
    spec = registry.read_layout_file(file)
    if spec.is_canonical:
        console.result(f"{file}: {spec.name}, a canonical layout, valid")
        return
    mapping = spec.mapping
    rules = [*mapping.rules, *mapping.other_rules]
    lines = [f"{file}: {mapping.name}, {render.count(len(rules), 'rule')}, valid"]
    lines += [f"  {rule.location}: not reversible, drops tensors ({rule.reason})" for rule in rules if not rule.targets]
    # A drop of several names is parsed into several rules with the same line number.
    console.result(*dict.fromkeys(lines))


@dataclass(frozen=True)
class DeriveOptions:
    """Options of the command: keyword arguments of `converter.derive`, and how to print the result."""

    out: Path = option("Where to write the mapping file.", "FILE.yaml", "--output", "-o", default=Path("my.yaml"))
    name: str = option("Name of the layout. [default: FILE]", "NAME", default="")
    family: str = option("The encoder, if TARGET holds several.", "FAMILY", default="")
    allow_partial: bool = option(
        "Write the file even if tensors of TARGET have no match.", None, "--partial", default=False
    )
    force: bool = option("Replace an existing file.", None, "--force", "-f", default=False)
    json: Json = False
    quiet: Quiet = False


@app.command("derive")
@add_options(DeriveOptions, (ConvertOptions, ["state_dict", "prefix"]), HubOptions)
def derive_mapping(source: NewLayout, target: Target, **options: Any) -> None:
    """Write a mapping file for the layout of SOURCE by comparing its tensors with those of TARGET."""
    json, quiet = options.pop("json"), options.pop("quiet")
    with console.Bar(enabled=not quiet) as bar:
        derived = converter.derive(source, target, on_progress=bar, **options)
    if not quiet or not derived.complete:
        console.say(*_summary(derived))
    if json:
        console.result_json(derived.to_json())
    elif derived.written:
        console.result(derived.output)
    if not derived.complete:
        raise typer.Exit(SourceError.exit_code)


def _summary(derived: Derived) -> list[str]:
    num_matched, num_rules = derived.num_matched, render.count(derived.num_rules, "rule")
    num_tensors = num_matched + len(derived.unmatched)
    lines = [f"{derived.layout}: matched {num_matched} of {num_tensors} tensors of {derived.target} with {num_rules}"]
    lines.append(f"  {num_matched:4} matched by {derived.method}")
    max_names = _MAX_NAMES if derived.complete else _MAX_NAMES_IN_ERROR
    if derived.dropped:
        lines += ["  source tensors not used (dropped):", *_name_lines(derived.dropped, max_names)]
    if derived.unmatched:
        hint = "the file lacks rules for them" if derived.written else "use --partial to write the rules found"
        lines += [f"error: no match for {render.count(len(derived.unmatched), 'tensor')} of {derived.target}; {hint}:"]
        lines += _name_lines(derived.unmatched, max_names)
    return lines


def _name_lines(names: list[str], max_names: int) -> list[str]:
    folded = fold_names(names)
    more = [f"    and {len(folded) - max_names} more"] if len(folded) > max_names else []
    return [*(f"    {name}" for name in folded[:max_names]), *more]

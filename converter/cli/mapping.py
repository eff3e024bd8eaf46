"""`dsocr-convert mapping`: the files that describe layouts, listed, shown, checked and derived.

Annotations are not postponed here: typer would have to compile each of them again at every start.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

import converter
from converter.cli import console, render
from converter.cli.options import Json, Quiet, StateDict, complete_layout
from converter.errors import UsageError
from converter.layouts import registry
from converter.output.names import fold_names

if TYPE_CHECKING:
    from converter.api.derive import Derived

# What of a long list is told; --json has all of it.
_SHOWN = 8

app = typer.Typer(
    help="List, show, check and derive the mapping files that describe layouts.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("list")
def list_mappings() -> None:
    """List the layouts that are known."""
    width = max(map(len, registry.layout_names()))
    for name in registry.layout_names():
        console.result(f"{name:{width}}  {registry.load(name).description}")


@app.command("show")
def show_mapping(name: Annotated[str, typer.Argument(metavar="LAYOUT", autocompletion=complete_layout)]) -> None:
    """Print the mapping file of a layout, to read or to start one's own from."""
    console.result(*registry.text(name).rstrip().split("\n"))


@app.command("schema")
def mapping_schema() -> None:
    """Print the JSON Schema of mapping files, for editors."""
    console.result(*registry.schema().splitlines())


@app.command("check")
def check_mapping(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE.yaml... [SOURCE]", help="Mapping files; behind one alone, a checkpoint to try it on."
        ),
    ],
) -> None:
    """Check mapping files, and what one would make of a checkpoint."""
    first, *others = paths
    files = [first, *(path for path in others if path.suffix in (".yaml", ".yml"))]
    sources = [str(path) for path in others if path.suffix not in (".yaml", ".yml")]
    if len(sources) > 1 or (sources and len(files) > 1):
        raise UsageError(f"{sources[-1]}: expected mapping files, or one mapping file and one checkpoint")
    codes = [console.run(partial(_check, file)) for file in files]
    if any(codes):
        raise typer.Exit(max(codes))
    if sources:
        card = converter.convert(sources[0], registry.load_file(first).family, mapping=first, dry_run=True)
        console.result(*render.summary(card))


def _check(file: Path) -> None:
    spec = registry.read_file(file)
    if spec.is_canonical:
        console.result(f"{file}: {spec.name}, a canonical layout, valid")
        return
    mapping = spec.mapping
    rules = render.count(len(mapping.rules) + len(mapping.other_rules), "rule")
    console.result(f"{file}: {mapping.name}, {rules}, valid")
    dropped = [rule for rule in (*mapping.rules, *mapping.other_rules) if not rule.targets]
    # One line per list item: a drop of several names is as many rules.
    for line in dict.fromkeys(f"  {rule.place}: cannot be inverted: dropped: {rule.reason}" for rule in dropped):
        console.result(line)


@app.command("derive")
def derive_mapping(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A checkpoint in a layout of its own.")],
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            autocompletion=complete_layout,
            help="The same weights in a layout that is known; or the name of a layout, to go by names and shapes.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE.yaml", help="Where to write the mapping file.")
    ] = Path("my.yaml"),
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="What to call the layout. [default: FILE]")] = "",
    family: Annotated[
        Literal["sam", "clip"] | None, typer.Option(help="Which encoder of a TARGET that holds both.")
    ] = None,
    state_dict: StateDict = None,
    partly: Annotated[
        bool,
        typer.Option("--partial", help="Write the file even if something of TARGET was not found."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an existing file.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a mapping file for the layout of SOURCE, by comparing its tensors with those of TARGET."""
    # Imported here: values are compared with torch.
    from converter.api.derive import derive

    with console.Bar(enabled=not quiet) as bar:
        found = derive(
            source,
            target,
            out=output,
            name=name,
            family=family or "",
            state_dict=state_dict,
            force=force,
            partial=partly,
            on_progress=bar,
        )
    if not quiet or not found.complete:
        console.say(*_summary(found))
    if json:
        console.result_json(found.to_json())
    elif found.written:
        console.result(found.output)
    if not found.complete:
        raise typer.Exit(3)


def _summary(found: "Derived") -> list[str]:
    """What was found how, how sure it is, and what is left, for people."""
    total = sum(found.found.values())
    rules = render.count(found.rules, "rule")
    lines = [f"{found.layout}: {total} of {found.tensors} tensors of {found.target}, in {rules}"]
    lines += [f"  {count:4} by {how} ({_CONFIDENCE[how]})" for how, count in found.found.items()]
    lines += _listing("others would have done as well for", [name for name, rivals in found.guessed.items() if rivals])
    lines += _listing("leads nowhere, and is dropped", found.dropped)
    lines += [f"  {note}" for note in found.notes]
    if found.known:
        lines.append(f"  SOURCE is of the layout {', '.join(found.known)}, which needs no file of its own")
    if found.unmatched:
        written = f"{found.output} lacks them" if found.written else "nothing was written; --partial writes the rest"
        lacking = render.count(len(found.unmatched), "tensor")
        lines += _listing(f"error: nothing makes {lacking} of {found.target} ({written})", found.unmatched)
    return lines


_CONFIDENCE = {
    "values": "certain",
    "values that several tensors have, and name": "the same bytes whichever it is; the names a guess",
    "shape and name": "guessed: try it on a checkpoint",
}


def _listing(what: str, names: list[str]) -> list[str]:
    """A heading and names, those of layers folded, if there are any."""
    folded = fold_names(names)
    more = [f"    and {len(folded) - _SHOWN} more"] if len(folded) > _SHOWN else []
    heading = what if what.startswith("error") else f"  {what}"
    return [f"{heading}:", *(f"    {name}" for name in folded[:_SHOWN]), *more] if names else []

"""`dsocr-convert diff`: what differs between two checkpoints, and how far each block moved.

Annotations are not postponed here: typer would have to compile each of them again at every start.
"""

import math
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

import converter
from converter.cli import console
from converter.cli.options import Html, Json, Quiet
from converter.cli.render import count
from converter.output.names import shorten
from converter.storage.progress import OnProgress

if TYPE_CHECKING:
    from converter.comparison.difference import Block, Change, Difference

_NAMES_SHOWN = 3
_MOVED_SHOWN = 12
_LONGEST_BAR, _SHORTEST_BAR = 60, 10
_EIGHTHS = " ▏▎▍▌▋▊▉█"

StateDict = Annotated[
    str | None,
    typer.Option(metavar="NAME[,NAME]", help="Which state dict, where a file holds several; A's and B's apart."),
]


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint: file, folder, sharded index, or org/name.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one, of any layout.")],
    state_dict: StateDict = None,
    html: Html = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what differs between two checkpoints, and how far each block moved. Exits with 1 if anything does.

    Formats and layouts do not matter: both are compared under the DeepEncoder's names where they can be. On a hub,
    hf://org/name@REVISION names a revision.
    """
    if html is not None:
        from converter.reports import check_files

        check_files(html)
    with ExitStack() as bars:
        found = converter.diff(a, b, state_dict=state_dict, on_progress=_one_each(bars, not quiet))
    if not quiet:
        console.say(*table(found, shutil.get_terminal_size().columns, _blocks_print(sys.stderr.encoding)))
    if html is not None:
        from converter.reports import write
        from converter.reports.movement import page

        facts = [in_both(found), *names(found)]
        write(html, page(found, facts, shlex.join(["dsocr-convert", *sys.argv[1:]])))
    if json:
        console.result_json(found.to_json())
    else:
        console.result("equal" if found.equal else "different")
    raise typer.Exit(0 if found.equal else 1)


def _one_each(bars: ExitStack, enabled: bool) -> OnProgress:
    """A progress bar for each thing that is done: fetching, comparing, measuring."""
    made: dict[str, console.Bar] = {}

    def on_progress(what: str, done: int, total: int) -> None:
        kind = what.partition(" ")[0]
        if kind not in made:
            made[kind] = bars.enter_context(console.Bar(enabled))
        made[kind](what, done, total)

    return on_progress


def _blocks_print(encoding: str | None) -> bool:
    """Whether a stream can print parts of blocks."""
    try:
        _EIGHTHS.encode(encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return False
    return True


def table(found: "Difference", width: int, fine: bool) -> Iterable[str]:
    """The difference for a terminal of `width` columns; its bars are of ASCII unless `fine`."""
    for side, name, kinds, layouts in zip("AB", (found.a, found.b), found.containers, found.layouts, strict=True):
        known = f"layout {' and '.join(layouts)}" if layouts else "no known layout"
        yield f"{side}  {name}: {', '.join(kinds)}, {known}"
    yield (
        f"compared under the names of {' and '.join(found.names)}" if found.names else "compared under their own names"
    )
    yield from (f"  {note}" for note in found.notes)
    yield in_both(found)
    yield from names(found)
    if found.moved:
        yield ""
        yield from _bars(found.blocks, width, fine)
        yield ""
        yield from _furthest(found.moved)


def in_both(found: "Difference") -> str:
    """How many tensors both have, and how many of them are equal."""
    both = len(found.same) + len(found.changed)
    if not found.changed:
        return f"{count(both, 'tensor')} in both, equal in every bit" if both else "no tensor is in both"
    return f"{count(both, 'tensor')} in both: {len(found.same)} equal in every bit, {len(found.changed)} not"


def names(found: "Difference") -> Iterable[str]:
    """Names, types and shapes that differ."""
    for side, names in (("A", found.removed), ("B", found.added)):
        if names:
            yield f"only in {side}: {count(len(names), 'tensor')}: {_some(names)}"
    if found.renamed:
        pairs = [f"{old} -> {new}" for old, new in found.renamed.items()]
        yield f"renamed: {count(len(pairs), 'tensor')}, equal in every bit"
        yield from (f"  {pair}" for pair in pairs[:_MOVED_SHOWN])
        if len(pairs) > _MOVED_SHOWN:
            yield f"  and {len(pairs) - _MOVED_SHOWN} more"
    for change in found.reshaped:
        yield f"shape of {change.name}: {change.shapes[0]} in A, {change.shapes[1]} in B"
    kinds = [tuple(change.dtypes) for change in found.changed if change.dtypes[0] != change.dtypes[1]]
    for kind in dict.fromkeys(kinds):
        same = sum(tuple(change.dtypes) == kind and change.differing == 0 for change in found.changed)
        yield f"type: {count(kinds.count(kind), 'tensor')} {kind[0]} in A, {kind[1]} in B; {same} equal in value"


def _some(names: Sequence[str]) -> str:
    """A few names, or what modules they are of."""
    if len(names) <= _NAMES_SHOWN:
        return shorten(names)
    modules = Counter(name.partition(".")[0] for name in names)
    return shorten([f"{module} ({number})" for module, number in modules.most_common()])


def _bars(blocks: "list[Block]", width: int, fine: bool) -> Iterable[str]:
    """How far each block moved, as a figure and as a bar."""
    longest = max(len("block"), *(len(block.name) for block in blocks))
    room = min(max(width - longest - len("  differ    moved  |"), _SHORTEST_BAR), _LONGEST_BAR)
    furthest = max((block.relative for block in blocks if math.isfinite(block.relative)), default=0.0)
    yield "how far each block moved: the norm of B - A, relative to A's"
    yield f"{'block':{longest}}  differ    moved"
    for block in blocks:
        differ = f"{block.differing}/{block.tensors}"
        share = block.relative / furthest if furthest and math.isfinite(block.relative) else block.relative == math.inf
        line = f"{block.name:{longest}}  {differ:>6}  {_figure(block.relative):>7}  {_bar(share * room, fine)}"
        yield line.rstrip()


def _bar(length: float, fine: bool) -> str:
    if not fine:
        return "#" * max(round(length), length > 0)
    # What moved at all is seen.
    eighths = max(round(length * 8), length > 0)
    return _EIGHTHS[8] * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _furthest(moved: "list[Change]") -> Iterable[str]:
    """The tensors that moved furthest; names last, for they are of any length."""
    yield "  moved  largest    cosine    differing  tensor"
    for change in moved[:_MOVED_SHOWN]:
        figures = f"{_figure(change.relative):>7}  {_figure(change.maximum):>7}  {change.cosine or 0.0:8.6f}"
        yield f"{figures}  {change.differing or 0:>11,}  {change.name}"
    if len(moved) > _MOVED_SHOWN:
        yield f"and {len(moved) - _MOVED_SHOWN} more (--json lists all)"


def _figure(value: float | None) -> str:
    return f"{value:.1e}" if value else "0"

"""`dsocr-convert diff`: compares two checkpoints and shows the differences."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any

import typer

import converter
from converter import reports
from converter.cli import console
from converter.cli.options import Html, Json, Quiet, add_options
from converter.cli.render import count
from converter.comparison.difference import Block, Change, Difference, summarize
from converter.errors import first_names
from converter.options import HubOptions, option
from converter.storage.progress import OnProgress

_MAX_NAMES = 3  # per line
_MAX_TENSORS = 12  # lines of a list
_MIN_BAR_WIDTH, _MAX_BAR_WIDTH = 10, 60  # terminal columns
_EIGHTHS = " ▏▎▍▌▋▊▉█"

A = Annotated[str, typer.Argument(metavar="A", help="A checkpoint: file, folder, sharded index, or org/name.")]
B = Annotated[str, typer.Argument(metavar="B", help="Another checkpoint, of any layout.")]


@dataclass(frozen=True)
class DiffOptions:
    """Options of the command."""

    state_dict: str | None = option("State dict of files with several; with a comma, A's and B's.", "NAME[,NAME]")
    prefix: str | None = option(
        "Prefix of the encoders to compare (. for none); with a comma, A's and B's.", "PREFIX[,PREFIX]"
    )
    html: Html = None
    json: Json = False
    quiet: Quiet = False


@add_options(DiffOptions, HubOptions)
def diff(a: A, b: B, **options: Any) -> None:
    """Compare two checkpoints and show how far each block moved. The exit code is 1 unless all are equal.

    Formats and layouts may differ: both are compared under the DeepEncoder's names if possible. For two revisions on a
    hub, write hf://org/name@REVISION.
    """
    html, json, quiet = (options.pop(name) for name in ("html", "json", "quiet"))
    if html is not None:
        reports.check_files(html)
    with ExitStack() as bars:
        difference = converter.diff(a, b, on_progress=_bar_per_task(bars, not quiet), **options)
    if not quiet:
        console.say(*table(difference, shutil.get_terminal_size().columns, _can_encode_bar(sys.stderr.encoding)))
    if html is not None:
        from converter.reports.html import difference_page

        facts = [summarize(difference), in_both(difference), *names(difference)]
        reports.write(html, difference_page(difference, facts, shlex.join(["dsocr-convert", *sys.argv[1:]])))
    if json:
        console.result_json({"summary": summarize(difference), **difference.to_json()})
    else:
        console.result(difference.verdict)
    raise typer.Exit(0 if difference.equal else 1)


def _bar_per_task(stack: ExitStack, enabled: bool) -> OnProgress:
    """Make a callback that shows a progress bar for each task: fetching, comparing, measuring."""
    bars = defaultdict[str, console.Bar](lambda: stack.enter_context(console.Bar(enabled)))

    def on_progress(what: str, done: int, total: int) -> None:
        task = what.partition(" ")[0]
        bars[task](what, done, total)

    return on_progress


def _can_encode_bar(encoding: str | None) -> bool:
    try:
        _EIGHTHS.encode(encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return False
    return True


def table(difference: Difference, width: int, use_unicode: bool) -> Iterable[str]:
    """Describe a difference in lines of text.

    Args:
        difference: The result of the comparison.
        width: The number of columns of the terminal.
        use_unicode: Whether to draw bars with block characters instead of ASCII.
    """
    yield summarize(difference)
    sides = zip("AB", (difference.a, difference.b), difference.containers, difference.layouts, strict=True)
    for side, name, containers, layouts in sides:
        layout = f"layout {' and '.join(layouts)}" if layouts else "no known layout"
        yield f"{side}  {name}: {', '.join(containers)}, {layout}"
    common = f"the names of {' and '.join(difference.names)}" if difference.names else "their own names"
    yield f"compared under {common}"
    yield from (f"  {note}" for note in difference.notes)
    yield in_both(difference)
    yield from names(difference)
    if difference.moved:
        yield ""
        yield from _bars(difference.blocks, width, use_unicode)
        yield ""
        yield from _moved_tensors(difference.moved)


def in_both(difference: Difference) -> str:
    """Return the number of tensors in both checkpoints, and how many of these tensors are equal."""
    same, changed = len(difference.same), len(difference.changed)
    if not changed:
        return f"{count(same, 'tensor')} in both, equal in every bit" if same else "no tensor is in both"
    return f"{count(same + changed, 'tensor')} in both: {same} equal in every bit, {changed} not"


def names(difference: Difference) -> Iterable[str]:
    """List the names, types and shapes that differ, and the tensors that were not compared."""
    if difference.uncompared:
        kinds = ", ".join(dict.fromkeys(difference.uncompared.values()))
        num_tensors = count(len(difference.uncompared), "tensor")
        yield f"not compared: {num_tensors} ({kinds}): {_shorten(list(difference.uncompared))}"
    for side, names in (("A", difference.removed), ("B", difference.added)):
        if names:
            yield f"only in {side}: {count(len(names), 'tensor')}: {_shorten(names)}"
    if difference.renamed:
        pairs = [f"  {old} -> {new}" for old, new in difference.renamed.items()]
        yield f"renamed: {count(len(pairs), 'tensor')}, equal in every bit"
        yield from pairs[:_MAX_TENSORS]
        if len(pairs) > _MAX_TENSORS:
            yield f"  and {len(pairs) - _MAX_TENSORS} more"
    if ranks := difference.low_ranks:
        rank = str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
        yield f"low rank: B - A has rank {rank} in {count(len(ranks), 'tensor')}, as after a merge of LoRA"
    for change in difference.reshaped:
        yield f"shape of {change.name}: {change.shapes[0]} in A, {change.shapes[1]} in B"
    if difference.unmeasured:
        tensors = _shorten([change.name for change in difference.unmeasured])
        yield f"not equal, by how much is not measured: {count(len(difference.unmeasured), 'tensor')}: {tensors}"
    casts = defaultdict[tuple[str, ...], list[Change]](list)
    for change in difference.changed:
        if change.dtypes[0] != change.dtypes[1]:
            casts[tuple(change.dtypes)].append(change)
    for (old_dtype, new_dtype), changes in casts.items():
        num_equal = sum(change.differing == 0 for change in changes)
        yield f"type: {count(len(changes), 'tensor')} {old_dtype} in A, {new_dtype} in B; {num_equal} equal in value"


def _shorten(names: Sequence[str]) -> str:
    """Return the names, or if there are many, the modules that contain them."""
    if len(names) <= _MAX_NAMES:
        return first_names(names)
    num_by_module = Counter(name.partition(".")[0] for name in names)
    return first_names([f"{module} ({number})" for module, number in num_by_module.most_common()])


def _bars(blocks: list[Block], width: int, use_unicode: bool) -> Iterable[str]:
    """Yield a table of the blocks, with a bar for the relative change of each one."""
    name_width = max(len("block"), *(len(block.name) for block in blocks))
    bar_width = min(max(width - name_width - len("  differ    moved  |"), _MIN_BAR_WIDTH), _MAX_BAR_WIDTH)
    largest = max((block.relative for block in blocks if math.isfinite(block.relative)), default=0.0)
    yield "how far each block moved: the norm of B - A, relative to A's"
    yield f"{'block':{name_width}}  differ    moved"
    for block in blocks:
        differ = f"{block.differing}/{block.num_tensors}"
        bar = _bar(_bar_fraction(block.relative, largest) * bar_width, use_unicode)
        yield f"{block.name:{name_width}}  {differ:>6}  {_number(block.relative):>7}  {bar}".rstrip()


def _bar_fraction(value: float, largest: float) -> float:
    """Return the length of a bar from 0 to 1; infinity gives a full bar, and NaN an empty one."""
    if math.isfinite(value):
        return value / largest if largest else 0.0
    return float(value == math.inf)


def _bar(length: float, use_unicode: bool) -> str:
    """Draw a bar; `length` is in columns."""
    if not use_unicode:
        return "#" * max(round(length), length > 0)
    # At least one eighth, so that every movement is visible.
    eighths = max(round(length * 8), length > 0)
    return _EIGHTHS[8] * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _moved_tensors(moved: list[Change]) -> Iterable[str]:
    """List the tensors that changed most; names come last as they may be long."""
    has_rank = any(change.rank is not None for change in moved)
    yield f"  moved  largest    cosine    differing  {'rank  ' * has_rank}tensor"
    for change in moved[:_MAX_TENSORS]:
        numbers = f"{_number(change.relative):>7}  {_number(change.maximum):>7}  {change.cosine or 0.0:8.6f}"
        rank = f"{change.rank or '-':>4}  " if has_rank else ""
        yield f"{numbers}  {change.differing or 0:>11,}  {rank}{change.name}"
    if len(moved) > _MAX_TENSORS:
        yield f"and {len(moved) - _MAX_TENSORS} more (--json lists all)"


def _number(value: float | None) -> str:
    return f"{value:.1e}" if value else "0"

"""Cards and inspections as plain text: importing rich would take longer than most plans."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from converter.api.inspect import FittingLayout, Group, Inspection
from converter.cli import console
from converter.output.names import fold_key_map, group_by_reason, shorten
from converter.output.record import ConversionRecord

# Characters of a column: one name of a megabyte would pad all other lines to that.
_WIDEST = 100
_UNITS = ("B", "kB", "MB", "GB", "TB")


def size(nbytes: int) -> str:
    """Bytes in the unit that leaves one to three digits before the point, as `ls -h --si` and the hubs count."""
    thousands = min((len(str(nbytes)) - 1) // 3, len(_UNITS) - 1)
    return f"{nbytes / 1000**thousands:.1f} {_UNITS[thousands]}" if thousands else f"{nbytes} B"


def summary(card: ConversionRecord) -> Iterable[str]:
    """What was converted into what, and everything a user should know of it."""
    layout = f"{', '.join(card.containers)}, layout {card.mapping}"
    if card.wrapper:
        layout += f", prefix {card.wrapper} removed"
    yield f"{card.source}: {layout}"
    dtypes = " and ".join(f"{count} {name}" for name, count in card.dtypes.items())
    verb = "wrote" if card.written else "would write"
    yield f"{verb} {card.output}: {card.tensors} tensors ({dtypes}), {size(card.nbytes)}"
    yield from transfers(card)
    yield from remarks(card)


def transfers(card: ConversionRecord) -> Iterable[str]:
    """What came from a hub, and what of it could be checked."""
    yield from (f"  {note}" for note in card.notes)
    if card.commit:
        yield f"  commit {card.commit}"
    if card.fetched:
        whole = sum(card.files.values())
        fetched = sum(card.fetched.values())
        yield f"  fetched {size(fetched)} of {size(whole)}, {fetched / whole:.1%}"
        if "safetensors" in card.containers:
            yield "  checked: sizes, ranges, ETags; safetensors has no checksums, the hub's SHA-256 is of whole files"
        else:
            yield "  checked: sizes, ranges, ETags, and the CRC-32 of every tensor"


def remarks(card: ConversionRecord) -> Iterable[str]:
    """Lists tensors that are missing, generated or dropped, and unusual sizes."""
    if card.unusual:
        found = ", ".join(f"{name} {pair[0]} (not {pair[1]})" for name, pair in card.unusual.items())
        yield f"  not the DeepEncoder's size: {found}"
    for reason, names in group_by_reason(card.missing).items():
        yield f"  missing {', '.join(names)}: {reason}"
    for name, how in card.generated.items():
        yield f"  generated {name}: {how}"
    for reason, names in group_by_reason(card.dropped).items():
        yield f"  dropped {shorten(names, shown=1)}: {reason}"


def plan(card: ConversionRecord) -> Iterable[str]:
    """Every output tensor and what it is made of, layers folded."""
    rows = []
    for name, sources, members in fold_key_map(card.converted):
        made_of = " + ".join(sources) or f"generated: {card.generated[members[0]]}"
        rows.append((f"{name} (x {len(members)})" if len(members) > 1 else name, made_of))
    width = min(max((len(name) for name, _ in rows), default=0), _WIDEST)
    for name, made_of in rows:
        yield f"{name:{width}}  <- {made_of}"


def inspection(found: Inspection) -> Iterable[str]:
    """What a checkpoint holds, at a glance."""
    total = sum(found.files.values())
    yield f"{found.source}: {', '.join(found.containers)}, {count(len(found.files), 'file')}, {size(total)}"
    if len(found.state_dicts) > 1 or "." not in found.state_dicts:
        yield "state dicts: " + ", ".join(f"{path} ({count} tensors)" for path, count in found.state_dicts.items())
    dtypes = ", ".join(f"{count} {name}" for name, count in found.dtypes.items())
    yield f"{found.tensors} tensors, {size(found.nbytes)}: {dtypes}"
    yield ""
    yield from _table(found.groups)
    for recognised in found.recognised:
        yield ""
        yield from _recognised(recognised)
    if not found.recognised:
        yield ""
        yield "no known layout fits"
        yield from found.nearest


def count(number: int, noun: str) -> str:
    """The number and its noun, in the plural where it takes one."""
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _table(groups: list[Group]) -> Iterable[str]:
    rows = [("tensor", "layers", "type", "shape", "size")]
    for group, partner in _paired(groups):
        name, shapes, nbytes = group.name, _shapes(group), group.nbytes
        if partner is not None:
            name = f"{name.removesuffix('weight')}{{weight,bias}}"
            shapes, nbytes = f"{shapes}, {_shapes(partner)}", nbytes + partner.nbytes
        rows.append((name, group.layers, "/".join(group.dtypes), shapes, size(nbytes)))
    widths = [min(max(len(row[column]) for row in rows), _WIDEST) for column in range(4)]
    for row in rows:
        yield "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)) + f"  {row[4]:>9}"


def _paired(groups: list[Group]) -> Iterable[tuple[Group, Group | None]]:
    """The groups, each weight with its bias where it has one: a module a line."""
    by_name = {(group.name, group.layers, *group.dtypes): group for group in groups}
    for group in groups:
        module, _, kind = group.name.rpartition(".")
        other = {"weight": "bias", "bias": "weight"}.get(kind, "")
        partner = by_name.get((f"{module}.{other}", group.layers, *group.dtypes))
        if partner is None or kind == "weight":
            yield group, partner


def _shapes(group: Group) -> str:
    return " or ".join(str(shape) for shape in group.shapes)


def _recognised(found: FittingLayout) -> Iterable[str]:
    yield f"{found.family}: layout {found.layout}, {found.description}"
    yield f"  known by {', '.join(found.evidence)}"
    if len(found.state_dicts) > 1:
        yield f"  choose one with --state-dict: {', '.join(found.state_dicts)}"
    if found.card is None:
        yield from (f"  {line}" for line in found.problem.split("\n"))
        return
    card = found.card
    yield f"  `dsocr-convert {card.family}` would write {card.tensors} tensors, {size(card.nbytes)}"
    yield from remarks(card)


def show_conversion(
    convert: Callable[..., ConversionRecord],
    *sources: str | None,
    record: list[Path] | None,
    json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Run a conversion and show its record: the result on stdout, the rest on stderr.

    Args:
        convert: `converter.convert` or `converter.encoder`.
        sources: Its positional arguments.
        record: Files for the conversion record or a model card.
        json: Print the record as JSON.
        quiet: Print only the result.
        options: Its other keyword arguments.
    """
    with console.Bar(enabled=not quiet) as bar:
        made = convert(*sources, record=record or (), on_progress=bar, **options)
    if not quiet:
        console.say(*summary(made))
        if record and made.written:
            console.say(f"record: {', '.join(map(str, record))}")
    if json:
        console.result_json(made.to_json())
    elif made.written:
        console.result(made.output)
    else:
        console.result(*plan(made))

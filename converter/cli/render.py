"""Conversion records and inspections as plain text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from converter.errors import first_names
from converter.output.names import fold_key_map, fold_layers, group_by_reason, overflow_warning

if TYPE_CHECKING:
    from converter.api.inspect import Group, Inspection, MatchedLayout
    from converter.checkpoint.file_kinds import FolderFiles
    from converter.output.record import ConversionRecord, RecordedSource

# Characters of a column, as tensor names in a file may have megabytes.
_MAX_COLUMN_WIDTH = 100
# Columns of the values of tensors.
_VALUES = ("minimum", "mean", "maximum", "NaN, inf")
_UNITS = ("B", "kB", "MB", "GB", "TB")


def size(nbytes: int) -> str:
    """Format a number of bytes with a decimal unit, as the hubs do."""
    thousands = min((len(str(nbytes)) - 1) // 3, len(_UNITS) - 1)
    return f"{nbytes / 1000**thousands:.1f} {_UNITS[thousands]}" if thousands else f"{nbytes} B"


def summary(record: ConversionRecord) -> Iterable[str]:
    """Describe a conversion: sources, output, notes, transfers, and what deviates from a whole DeepEncoder."""
    yield from map(_source, record.sources)
    dtypes = " and ".join(f"{number} {name}" for name, number in record.dtypes.items())
    if record.unchanged:
        yield f"nothing to do: it has the layout {record.target}, these types and this format already"
        return
    verb = "wrote" if record.written else "would write"
    yield f"{verb} {record.output}: {record.num_tensors} tensors ({dtypes}), {size(record.nbytes)}"
    if record.overflows:
        yield f"  {overflow_warning(record.overflows)}"
    yield from (f"  {note}" for note in record.notes)
    yield from transfers(record)
    yield from deviations(record)


def _source(source: RecordedSource) -> str:
    facts = list(source.containers)
    if source.mappings:
        facts.append(f"layout {' + '.join(mapping.name for mapping in source.mappings)}")
    prefixes = dict.fromkeys(mapping.prefix for mapping in source.mappings)
    facts += [f"prefix {prefix}" for prefix in prefixes if prefix]
    if source.commit:
        facts.append(f"commit {source.commit}")
    return f"{source.name}: {', '.join(facts)}"


def transfers(record: ConversionRecord) -> Iterable[str]:
    """Describe what was fetched from a hub, and how it was checked; nothing for local sources."""
    remote = [source for source in record.sources if source.files.keys() & record.fetched.keys()]
    if not remote:
        return
    total = sum(sum(source.files.values()) for source in remote)
    fetched = sum(record.fetched.values())
    yield f"  fetched {size(fetched)} of {size(total)}, {fetched / total:.1%}"
    for container in sorted({container for source in remote for container in source.containers}):
        yield f"  checked: sizes, ranges, ETags; {_data_check(container)}"


def _data_check(container: str) -> str:
    from converter.formats import dcp_files, torch_zip, torchscript

    if container in (torch_zip.CONTAINER, torchscript.CONTAINER, dcp_files.CONTAINER):
        return f"{container}: the CRC-32 of every tensor"
    return f"{container} has no checksums: to check the data too, use --download"


def deviations(record: ConversionRecord) -> Iterable[str]:
    """List unusual sizes, and tensors that are missing, generated or dropped."""
    if record.unusual:
        sizes = ", ".join(f"{name} {pair[0]} (not {pair[1]})" for name, pair in record.unusual.items())
        yield f"  not the DeepEncoder's size: {sizes}"
    for reason, names in group_by_reason(record.missing).items():
        yield f"  missing {', '.join(names)}: {reason}"
    for name, how in record.generated.items():
        yield f"  generated {name}: {how}"
    for reason, names in group_by_reason(record.dropped).items():
        yield f"  dropped {first_names(names, shown=1)}: {reason}"


def plan(record: ConversionRecord) -> Iterable[str]:
    """List every output tensor and its sources, repeated layers folded."""
    rows = []
    for name, sources, members in fold_key_map(record.converted):
        origin = " + ".join(sources) or f"generated: {record.generated[members[0]]}"
        rows.append((f"{name} (x {len(members)})" if len(members) > 1 else name, origin))
    width = min(max((len(name) for name, _ in rows), default=0), _MAX_COLUMN_WIDTH)
    for name, origin in rows:
        yield f"{name:{width}}  <- {origin}"


def inspection(result: Inspection) -> Iterable[str]:
    """Describe the contents of a checkpoint."""
    total = sum(result.files.values())
    yield f"{result.source}: {', '.join(result.containers)}, {count(len(result.files), 'file')}, {size(total)}"
    if len(result.state_dicts) > 1 or "." not in result.state_dicts:
        # The states of an optimizer are a dict for each tensor.
        found = fold_layers(result.state_dicts).items()
        numbers = {name: sum(result.state_dicts[path] for path in paths) for name, paths in found}
        yield "state dicts: " + ", ".join(f"{name} ({number} tensors)" for name, number in numbers.items())
    dtypes = ", ".join(f"{number} {name}" for name, number in result.dtypes.items())
    yield f"{result.num_tensors} tensors, {size(result.nbytes)}: {dtypes}"
    if result.folder:
        yield ""
        yield from folder(result.folder)
    if result.ignored:
        yield f"not imported or run, objects of them ignored: {', '.join(result.ignored)}"
    yield ""
    yield from _table(result.groups)
    if non_finite := [f"{name} ({each.non_finite})" for name, each in result.values.items() if each.non_finite]:
        yield ""
        yield f"NaN or infinity in {count(len(non_finite), 'tensor')}: {first_names(non_finite)}"
    for layout in result.layouts:
        yield ""
        yield from _matched_layout(layout)
    if not result.layouts:
        yield ""
        yield "no known layout fits"
        yield from result.nearest


def folder(files: Sequence[FolderFiles]) -> Iterable[str]:
    """List the files of a folder, with what they are; those that are read are marked."""
    rows = [(f"{each.name} (x {each.count})" if each.count > 1 else each.name, each) for each in files]
    width = min(max((len(name) for name, _ in rows), default=0), _MAX_COLUMN_WIDTH)
    for name, each in rows:
        yield f"{'>' if each.is_read else ' '} {name:{width}}  {size(each.nbytes):>9}  {each.what}".rstrip()


def count(number: int, noun: str) -> str:
    """Format a number with its noun, in the plural if needed."""
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _table(groups: list[Group]) -> Iterable[str]:
    with_values = any(group.values for group in groups)
    rows = [("tensor", "layers", "type", "shape", *(_VALUES if with_values else ()), "size")]
    # A line has the values of one kind of tensors.
    for group, partner in ((group, None) for group in groups) if with_values else _paired(groups):
        name, shapes, nbytes = group.name, _shapes(group), group.nbytes
        if partner is not None:
            name = f"{name.removesuffix('weight')}{{weight,bias}}"
            shapes, nbytes = f"{shapes}, {_shapes(partner)}", nbytes + partner.nbytes
        values = _values(group) if with_values else ()
        rows.append((name, group.layers, "/".join(group.dtypes), shapes, *values, size(nbytes)))
    widths = [min(max(len(row[column]) for row in rows), _MAX_COLUMN_WIDTH) for column in range(4)]
    for row in rows:
        left = [f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)]
        yield "  ".join([*left, *(f"{cell:>9}" for cell in row[4:])])


def _values(group: Group) -> tuple[str, ...]:
    """Format the values of a group in the columns `_VALUES`; empty for tensors of other types."""
    values = group.values
    if values is None:
        return ("",) * len(_VALUES)
    numbers = [f"{number:.3g}" for number in (values.minimum, values.mean, values.maximum)]
    return *(numbers if values.finite else ("", "", "")), str(values.non_finite)


def _paired(groups: list[Group]) -> Iterable[tuple[Group, Group | None]]:
    """Pair each weight with its bias, so that a module takes one line."""
    by_name = {(group.name, group.layers, *group.dtypes): group for group in groups}
    for group in groups:
        module, _, kind = group.name.rpartition(".")
        other = {"weight": "bias", "bias": "weight"}.get(kind, "")
        partner = by_name.get((f"{module}.{other}", group.layers, *group.dtypes))
        if partner is None or kind == "weight":
            yield group, partner


def _shapes(group: Group) -> str:
    return " or ".join(str(shape) for shape in group.shapes)


def _matched_layout(layout: MatchedLayout) -> Iterable[str]:
    yield f"{layout.family}: layout {layout.layout}, {layout.description}"
    if layout.prefix:
        yield f"  prefix {layout.prefix}"
    yield f"  detected by {', '.join(layout.evidence)}"
    if len(layout.state_dicts) > 1:
        yield f"  choose one with --state-dict: {', '.join(layout.state_dicts)}"
    record = layout.record
    if record is None:
        yield from (f"  {line}" for line in layout.problem.split("\n"))
    elif record.unchanged:
        yield "  converted already: nothing to do"
    else:
        yield f"  `dsocr-convert {record.family}` would write {record.num_tensors} tensors, {size(record.nbytes)}"
        yield from deviations(record)

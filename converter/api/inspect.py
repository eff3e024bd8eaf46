"""Inspects a checkpoint: contents, layouts, and what a conversion would write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from converter.checkpoint.open import Checkpoint, check_hub_options, open_checkpoint
from converter.checkpoint.state_dict import StateDict
from converter.errors import DsocrError
from converter.layouts import registry
from converter.layouts.detect import detect_layouts, nearest_layout, select_state_dicts
from converter.options import ConvertOptions, HubOptions
from converter.output.json_document import as_json
from converter.output.names import fold
from converter.output.record import ConversionRecord, count_dtypes, make_record
from converter.plan.planner import ResolvedPlan, check_not_converted, plan_to_canonical
from converter.tensors.lazy_tensor import lazy_read
from converter.tensors.tensor_info import TensorInfo


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors whose names differ only in layer indices.

    Attributes:
        name: Their name, with `{}` for each index.
        layers: The indices, such as `0..23`.
        tensors: How many there are.
        dtypes: Their types.
        shapes: Their shapes, most frequent first.
        nbytes: Their bytes in total.
    """

    name: str
    layers: str
    tensors: int
    dtypes: list[str]
    shapes: list[list[int]]
    nbytes: int


@dataclass(frozen=True, slots=True)
class FittingLayout:
    """A layout that a checkpoint fits.

    Attributes:
        family: "sam" or "clip".
        layout: The name of the layout.
        description: Which checkpoints have it.
        prefix: The prefix of the encoder's names.
        state_dicts: The state dicts of the file that fit; `.` for the top.
        evidence: The tensors by which it was recognised.
        record: The record that a conversion would have; None if a conversion is not possible.
        problem: Why it is not possible.
    """

    family: str
    layout: str
    description: str
    prefix: str
    state_dicts: list[str]
    evidence: list[str]
    record: ConversionRecord | None
    problem: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """The contents of a checkpoint.

    Attributes:
        source: Its name.
        files: Its files, and their sizes in bytes.
        containers: Its container formats.
        state_dicts: Its state dicts and how many tensors each has. All other counts are of the largest one.
        tensors: The number of tensors.
        nbytes: Their bytes in total.
        dtypes: The number of tensors of each type.
        groups: The tensors, repeated layers folded.
        layouts: The layouts that it fits.
        nearest: If it fits none, how it differs from the nearest one, for people.
    """

    source: str
    files: dict[str, int]
    containers: list[str]
    state_dicts: dict[str, int]
    tensors: int
    nbytes: int
    dtypes: dict[str, int]
    groups: list[Group]
    layouts: list[FittingLayout]
    nearest: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return the document that `--json` prints."""
        return cast("dict[str, Any]", as_json(self))


def inspect(source: str | Path, *, state_dict: str | None = None, **hub_options: Any) -> Inspection:
    """Report what a checkpoint holds, which layouts it fits and what a conversion would do; reads no weights.

    Args:
        source: A checkpoint, as in `convert`.
        state_dict: Which state dict of a file with several (model, ema; `.` for the top).
        **hub_options: The fields of `converter.options.HubOptions`: revision, hub, download.

    Raises:
        DsocrError: The source cannot be read or holds no tensors. An unknown layout is no error.
    """
    options = HubOptions(**hub_options)
    with closing(open_checkpoint(source, options)) as opened:
        check_hub_options(options, [opened])
        return _inspect(opened, state_dict)


def _inspect(opened: Checkpoint, state_dict: str | None) -> Inspection:
    entries = select_state_dicts(opened, state_dict)
    largest = max(entries, key=lambda entry: len(entry.tensors))
    layouts = [layout for family in registry.families() if (layout := _fitting_layout(opened, family, entries))]
    mappings = [mapping for family in registry.families() for mapping in registry.mappings(family)]
    return Inspection(
        source=opened.name,
        files={file.name: file.size for file in opened.files},
        containers=sorted(set(opened.containers)),
        state_dicts={entry.path or ".": len(entry.tensors) for entry in entries},
        tensors=len(largest.tensors),
        nbytes=sum(tensor.nbytes for tensor in largest.tensors.values()),
        dtypes=count_dtypes([lazy_read(tensor) for tensor in largest.tensors.values()]),
        groups=group_layers(largest.tensors),
        layouts=layouts,
        nearest=[] if layouts else nearest_layout(opened, largest, mappings),
    )


def _fitting_layout(opened: Checkpoint, family: str, entries: list[StateDict]) -> FittingLayout | None:
    """Detect a family's layout and plan its conversion; None if no layout of the family fits."""
    detected = detect_layouts(opened, registry.entries(family), entries)
    if not detected:
        return None
    first, options = detected[0], ConvertOptions(family)
    layout = first.match.layout
    record, problem = None, ""
    try:
        check_not_converted(opened, first)
        plan = plan_to_canonical(opened, first, options)
        record = make_record(
            [opened],
            {family: ResolvedPlan(first, plan)},
            plan.outputs,
            target=plan.layout,
            output=None,
            generated=plan.generated,
            missing=plan.missing,
            dropped=plan.dropped,
        )
    except DsocrError as error:
        problem = str(error)
    return FittingLayout(
        family=family,
        layout=layout.name,
        description=layout.description,
        prefix=first.wrapper + first.match.prefix,
        state_dicts=[entry.state_dict.path or "." for entry in detected],
        evidence=first.match.evidence,
        record=record,
        problem=problem,
    )


def group_layers(tensors: Mapping[str, TensorInfo]) -> list[Group]:
    """Fold repeated layers into groups, in the order of the tensors."""
    members: dict[tuple[str, int], list[str]] = {}
    for name, tensor in tensors.items():
        # Tensors of different rank are not layers of one kind, whatever their names.
        members.setdefault((fold(name), len(tensor.shape)), []).append(name)
    groups = []
    for (pattern, _), names in members.items():
        parts = [tensors[name] for name in names]
        shapes = Counter(tensor.shape for tensor in parts)
        groups.append(
            Group(
                name=pattern if len(names) > 1 else names[0],
                layers=_ranges(pattern, names) if len(names) > 1 else "",
                tensors=len(names),
                dtypes=sorted({tensor.dtype.name for tensor in parts}),
                shapes=[list(shape) for shape, _ in shapes.most_common()],
                nbytes=sum(tensor.nbytes for tensor in parts),
            )
        )
    return groups


def _ranges(pattern: str, names: list[str]) -> str:
    """Return the indices that a pattern's `{}` replace, such as `0..23`."""
    places = [i for i, segment in enumerate(pattern.split(".")) if segment == "{}"]
    columns = [sorted({int(name.split(".")[place]) for name in names}) for place in places]
    return ", ".join(_range(column) for column in columns)


def _range(numbers: list[int]) -> str:
    # `numbers` are sorted and distinct.
    if len(numbers) > 1 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}..{numbers[-1]}"
    return " ".join(map(str, numbers))

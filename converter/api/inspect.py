"""Inspects a checkpoint: contents, layouts, and what a conversion would write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, cast

from converter.checkpoint.open import Checkpoint, check_hub_options, open_checkpoint
from converter.checkpoint.state_dict import StateDict
from converter.errors import DsocrError
from converter.layouts import registry
from converter.layouts.detect import detect_layouts, nearest_layout, select_state_dicts
from converter.options import ConvertOptions, HubOptions
from converter.output.json_document import as_json
from converter.output.names import fold
from converter.output.record import ConversionRecord
from converter.output.record_document import count_dtypes, make_record
from converter.plan.planner import ResolvedPlan, check_not_converted, plan_to_canonical
from converter.tensors.lazy_tensor import lazy_read
from converter.tensors.tensor_info import TensorInfo


class Group(NamedTuple):
    """Tensors that differ by their layer alone: `name` has `{}` where their indices were, of which `layers` says which.

    `shapes` lists what shapes they have, most frequent first.
    """

    name: str
    layers: str
    tensors: int
    dtypes: list[str]
    shapes: list[list[int]]
    nbytes: int


class FittingLayout(NamedTuple):
    """A layout that a checkpoint fits, the names it was known by, and the card that a conversion would have.

    `card` is None where a conversion is not possible; `problem` says why.
    """

    family: str
    layout: str
    description: str
    prefix: str
    state_dicts: list[str]
    evidence: list[str]
    card: ConversionRecord | None
    problem: str


class Inspection(NamedTuple):
    """What a checkpoint holds. Counts are of the state dict with most tensors; `state_dicts` counts them all."""

    source: str
    files: dict[str, int]
    containers: list[str]
    state_dicts: dict[str, int]
    tensors: int
    nbytes: int
    dtypes: dict[str, int]
    groups: list[Group]
    recognised: list[FittingLayout]
    nearest: list[str]

    def to_json(self) -> dict[str, Any]:
        """The document that `--json` prints."""
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
    recognised = [found for family in registry.families() if (found := _recognised(opened, family, entries))]
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
        recognised=recognised,
        nearest=[] if recognised else nearest_layout(opened, largest, mappings),
    )


def _recognised(opened: Checkpoint, family: str, entries: list[StateDict]) -> FittingLayout | None:
    """What `convert` would make of a source, or None where it is not of this family."""
    found = detect_layouts(opened, registry.entries(family), entries)
    if not found:
        return None
    layout = found[0].match.layout
    try:
        check_not_converted(opened, found[0])
        plan = plan_to_canonical(opened, found[0], ConvertOptions(family))
        card, problem = (
            make_record(opened, ResolvedPlan(found[0], plan), ConvertOptions(family), None, "safetensors"),
            "",
        )
    except DsocrError as error:
        card, problem = None, str(error)
    return FittingLayout(
        family=family,
        layout=layout.name,
        description=layout.description,
        prefix=found[0].wrapper + found[0].match.prefix,
        state_dicts=[hit.state_dict.path or "." for hit in found],
        evidence=found[0].match.evidence,
        card=card,
        problem=problem,
    )


def group_layers(tensors: Mapping[str, TensorInfo]) -> list[Group]:
    """The tensors with repeated layers folded into one group, in the order they were first met."""
    members: dict[tuple[str, int], list[str]] = {}
    for name, tensor in tensors.items():
        # Layers have tensors of one rank; the numbered stages of a sequence may not.
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
    """The indices that stand in a pattern's places, such as `0..23`."""
    places = [i for i, segment in enumerate(pattern.split(".")) if segment == "{}"]
    columns = [sorted({int(name.split(".")[place]) for name in names}) for place in places]
    return ", ".join(_range(column) for column in columns)


def _range(numbers: list[int]) -> str:
    # Sorted, and none twice.
    if len(numbers) > 1 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}..{numbers[-1]}"
    return " ".join(map(str, numbers))

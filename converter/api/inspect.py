"""Inspects a checkpoint: contents, layouts, and what a conversion would write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from converter.checkpoint.file_kinds import FolderFiles, list_folder
from converter.checkpoint.open import Checkpoint, open_checkpoints
from converter.checkpoint.state_dict import StateDict
from converter.errors import DsocrError
from converter.layouts import registry
from converter.layouts.detect import DetectedLayout, detect_layouts, select_state_dicts
from converter.layouts.explain import nearest_layout
from converter.options import ConvertOptions, HubOptions
from converter.output.json_document import as_json
from converter.output.names import fold, format_indices, layer_indices
from converter.output.record import ConversionRecord, count_dtypes, make_plan_record
from converter.output.write import FORMATS, is_unchanged
from converter.plan.planner import ResolvedPlan, plan_to_canonical
from converter.storage.progress import OnProgress, progress_counter
from converter.tensors.dtypes import BY_NAME
from converter.tensors.lazy_tensor import lazy_read
from converter.tensors.tensor_info import TensorInfo

if TYPE_CHECKING:
    from converter.comparison.values import Values


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors whose names differ only in layer indices.

    Attributes:
        name: The name of the tensors, with `{}` for each layer index.
        layers: The layer indices, such as `0..23`.
        num_tensors: The number of tensors.
        dtypes: The types of the tensors.
        shapes: The shapes of the tensors, most frequent first.
        nbytes: The size of all tensors in bytes.
        values: The range of the values of all tensors; None if they were not read.
    """

    name: str
    layers: str
    num_tensors: int
    dtypes: list[str]
    shapes: list[list[int]]
    nbytes: int
    values: Values | None


@dataclass(frozen=True, slots=True)
class MatchedLayout:
    """A layout that the tensors of a checkpoint match.

    Attributes:
        family: "sam", "clip" or "qwen2".
        layout: The name of the layout.
        description: Which checkpoints have it.
        prefix: The prefix of the encoder's tensor names.
        state_dicts: The paths of the state dicts that match; `.` for the top.
        evidence: The names of the tensors by which the layout was detected.
        record: The record that a conversion would have; None if a conversion is not possible.
        problem: The reason why a conversion is not possible; empty if it is.
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

    `num_tensors`, `nbytes`, `dtypes`, `groups` and `nearest` describe the state dict with the most tensors.

    Attributes:
        source: The path or address of the checkpoint.
        files: The size of each file in bytes.
        containers: The container formats of the files.
        state_dicts: The number of tensors of each state dict.
        num_tensors: The number of tensors.
        nbytes: The size of all tensors in bytes.
        dtypes: The number of tensors of each type.
        groups: The tensors, with repeated layers folded.
        values: The range of the values of each tensor of real numbers; empty if they were not read.
        layouts: The layouts that match.
        nearest: If no layout matches, lines of text that say how the tensors differ from the nearest layout.
        ignored: Classes and functions in a pickle that were not imported; objects of them are ignored.
        folder: The files in the folder, if the source is one on this machine.
    """

    source: str
    files: dict[str, int]
    containers: list[str]
    state_dicts: dict[str, int]
    num_tensors: int
    nbytes: int
    dtypes: dict[str, int]
    groups: list[Group]
    values: dict[str, Values]
    layouts: list[MatchedLayout]
    nearest: list[str]
    ignored: list[str]
    folder: list[FolderFiles]

    def to_json(self) -> dict[str, Any]:
        """Return the document that `--json` prints."""
        return cast("dict[str, Any]", as_json(self))


def inspect(
    source: str | Path,
    *,
    state_dict: str | None = None,
    prefix: str | None = None,
    values: bool = False,
    on_progress: OnProgress = lambda what, done, total: None,
    **hub_options: Any,
) -> Inspection:
    """Report what a checkpoint holds, which layouts it fits and what a conversion would do.

    No weights are read, unless their values are requested.

    Args:
        source: A checkpoint, as in `convert`.
        state_dict: Which state dict of a file with several (model, ema; `.` for the top).
        prefix: The prefix of the tensor names to report.
        values: Read the weights, and report minimum, maximum, mean and the number of NaN and infinities.
        on_progress: Called as weights are read.
        **hub_options: The fields of `converter.options.HubOptions`: revision, hub, download.

    Raises:
        DsocrError: The source cannot be read or has no tensors. An unknown layout is not an error.
    """
    with open_checkpoints([source], HubOptions(**hub_options)) as [opened]:
        state_dicts = select_state_dicts(opened, state_dict, prefix)
        largest = max(state_dicts, key=lambda candidate: len(candidate.tensors))
        found = _measure(opened, largest.tensors, on_progress) if values else {}
        files = list_folder(Path(source), [file.path for file in opened.files]) if Path(source).is_dir() else []
        return replace(_inspect(opened, state_dicts, largest, found), folder=files)


def _measure(opened: Checkpoint, tensors: Mapping[str, TensorInfo], on_progress: OnProgress) -> dict[str, Values]:
    # Imports torch, which takes two seconds.
    from converter.comparison.values import measure_values

    readable = {name: tensor for name, tensor in tensors.items() if tensor.dtype.name in BY_NAME}
    opened.prefetch(readable.values(), on_progress)
    count = progress_counter(on_progress, "reading", sum(tensor.nbytes for tensor in readable.values()))
    return measure_values({name: lazy_read(tensor) for name, tensor in readable.items()}, count)


def _inspect(
    opened: Checkpoint, state_dicts: list[StateDict], largest: StateDict, values: dict[str, Values]
) -> Inspection:
    layouts = [layout for family in registry.families() for layout in _matched_layouts(opened, family, state_dicts)]
    mappings = [mapping for family in registry.families() for mapping in registry.mappings(family)]
    return Inspection(
        source=opened.name,
        files={file.name: file.size for file in opened.files},
        containers=sorted(set(opened.containers)),
        state_dicts={candidate.path or ".": len(candidate.tensors) for candidate in state_dicts},
        num_tensors=len(largest.tensors),
        nbytes=sum(tensor.nbytes for tensor in largest.tensors.values()),
        dtypes=count_dtypes(tensor.dtype for tensor in largest.tensors.values()),
        groups=group_layers(largest.tensors, values),
        values=values,
        layouts=layouts,
        nearest=[] if layouts else nearest_layout(opened, largest, mappings),
        ignored=list(opened.ignored),
        folder=[],
    )


def _matched_layouts(opened: Checkpoint, family: str, state_dicts: list[StateDict]) -> list[MatchedLayout]:
    """Detect the encoders of a family, and plan the conversion of each."""
    by_prefix: dict[str, list[DetectedLayout]] = {}
    for detected in detect_layouts(opened, registry.layouts(family), state_dicts):
        by_prefix.setdefault(detected.match.full_prefix, []).append(detected)
    return [_matched_layout(opened, family, found) for found in by_prefix.values()]


def _matched_layout(opened: Checkpoint, family: str, detected: list[DetectedLayout]) -> MatchedLayout:
    """Plan the conversion of an encoder that the state dicts have under the same prefix."""
    first = detected[0]
    layout = first.match.layout
    record, problem = None, ""
    try:
        plan = plan_to_canonical(opened, first, ConvertOptions(family))
        unchanged = any(is_unchanged(opened, plan.outputs, format) for format in FORMATS)
        record = replace(make_plan_record([opened], ResolvedPlan(first, plan)), unchanged=unchanged)
    except DsocrError as error:
        problem = str(error)
    return MatchedLayout(
        family=family,
        layout=layout.name,
        description=layout.description,
        prefix=first.match.full_prefix,
        state_dicts=[each.state_dict.path or "." for each in detected],
        evidence=first.match.evidence,
        record=record,
        problem=problem,
    )


def group_layers(tensors: Mapping[str, TensorInfo], values: Mapping[str, Values]) -> list[Group]:
    """Fold repeated layers into groups, in the order of the tensors; `values` are of those that were read."""
    members: dict[tuple[str, int, int], list[str]] = {}
    for name, tensor in tensors.items():
        # Tensors with another number of dimensions, or with a literal `{}` in the name, are not layers of one kind.
        members.setdefault((fold(name), len(layer_indices(name)), len(tensor.shape)), []).append(name)
    groups = []
    for (pattern, _, _), names in members.items():
        grouped = [tensors[name] for name in names]
        shapes = Counter(tensor.shape for tensor in grouped)
        measured = [values[name] for name in names if name in values]
        groups.append(
            Group(
                name=pattern if len(names) > 1 else names[0],
                layers=_format_layers(names) if len(names) > 1 else "",
                num_tensors=len(names),
                dtypes=sorted({tensor.dtype.name for tensor in grouped}),
                shapes=[list(shape) for shape, _ in shapes.most_common()],
                nbytes=sum(tensor.nbytes for tensor in grouped),
                values=reduce(lambda a, b: a.plus(b), measured) if measured else None,
            )
        )
    return groups


def _format_layers(names: list[str]) -> str:
    """Format the layer indices of names that differ in nothing else, such as `0..23`."""
    columns = zip(*map(layer_indices, names), strict=True)
    return ", ".join(format_indices(sorted(set(column))) for column in columns)

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
from converter.output.names import fold, grouped, layer_indices, same_layer_key
from converter.output.record import ConversionRecord, count_dtypes, make_plan_record
from converter.output.write import FORMATS, is_unchanged
from converter.plan.planner import ResolvedPlan, plan_to_canonical
from converter.storage.progress import OnProgress, progress_counter
from converter.tensors.dtypes import BY_NAME
from converter.tensors.lazy_tensor import lazy_read
from converter.tensors.tensor_info import TensorInfo

if TYPE_CHECKING:
    from converter.comparison.measure import Values


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors whose names differ only in layer indices."""

    name: str  #: The name of the tensors, with `{}` for each layer index
    layers: str  #: The layer indices, such as `0..23`
    num_tensors: int  #: The number of tensors
    dtypes: list[str]  #: The types of the tensors
    shapes: list[list[int]]  #: The shapes of the tensors, most frequent first
    nbytes: int  #: The size of all tensors in bytes
    values: Values | None  #: The range of the values of all tensors; None if they were not read


@dataclass(frozen=True, slots=True)
class MatchedLayout:
    """A layout that the tensors of a checkpoint match."""

    family: str  #: "sam", "clip" or "qwen2"
    layout: str  #: The name of the layout
    description: str  #: Which checkpoints have it
    prefix: str  #: The prefix of the encoder's tensor names
    state_dicts: list[str]  #: The paths of the state dicts that match; `.` for the top
    evidence: list[str]  #: The names of the tensors by which the layout was detected
    record: ConversionRecord | None  #: The record that a conversion would have; None if a conversion is not possible
    problem: str  #: The reason why a conversion is not possible; empty if it is


@dataclass(frozen=True, slots=True)
class Inspection:
    """The contents of a checkpoint.

    `num_tensors`, `nbytes`, `dtypes`, `groups` and `nearest` describe the state dict with the most tensors.
    """

    source: str  #: The path or address of the checkpoint
    files: dict[str, int]  #: The size of each file in bytes
    containers: list[str]  #: The container formats of the files
    state_dicts: dict[str, int]  #: The number of tensors of each state dict
    num_tensors: int  #: The number of tensors
    nbytes: int  #: The size of all tensors in bytes
    dtypes: dict[str, int]  #: The number of tensors of each type
    groups: list[Group]  #: The tensors, with repeated layers folded
    values: dict[str, Values]  #: The range of the values of each tensor of real numbers; empty if they were not read
    layouts: list[MatchedLayout]  #: The layouts that match
    nearest: list[str]  #: If no layout matches, lines of text that say how the tensors differ from the nearest layout
    ignored: list[str]  #: Classes and functions in a pickle that were not imported; objects of them are ignored
    folder: list[FolderFiles]  #: The files in the folder, if the source is one on this machine

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

    No weights are read, unless their values are requested. An unknown layout is not an error.

    Args:
        source: A checkpoint, as in `convert`.
        state_dict: Which state dict of a file with several (model, ema; `.` for the top).
        prefix: The prefix of the tensor names to report.
        values: Read the weights, and report minimum, maximum, mean and the number of NaN and infinities.
        on_progress: Called as weights are read.
        **hub_options: The fields of `converter.options.HubOptions`: revision, hub, download.
    """
    with open_checkpoints([source], HubOptions(**hub_options)) as [opened]:
        state_dicts = select_state_dicts(opened, state_dict, prefix)
        largest = max(state_dicts, key=lambda candidate: len(candidate.tensors))
        measured = _measure(opened, largest.tensors, on_progress) if values else {}
        files = list_folder(Path(source), [file.path for file in opened.files]) if Path(source).is_dir() else []
        return replace(_inspect(opened, state_dicts, largest, measured), folder=files)


def _measure(opened: Checkpoint, tensors: Mapping[str, TensorInfo], on_progress: OnProgress) -> dict[str, Values]:
    # Imports torch, which takes two seconds.
    from converter.comparison.measure import measure_values

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
    by_prefix: dict[str, list[DetectedLayout]] = {}
    for detected in detect_layouts(opened, registry.layouts(family), state_dicts):
        by_prefix.setdefault(detected.match.full_prefix, []).append(detected)
    return [_matched_layout(opened, family, detected) for detected in by_prefix.values()]


def _matched_layout(opened: Checkpoint, family: str, detected: list[DetectedLayout]) -> MatchedLayout:
    """Describe an encoder that one or more state dicts have under one prefix; plan the conversion of the first."""
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
        state_dicts=[encoder.state_dict.path or "." for encoder in detected],
        evidence=first.match.evidence,
        record=record,
        problem=problem,
    )


def group_layers(tensors: Mapping[str, TensorInfo], values: Mapping[str, Values]) -> list[Group]:
    """Fold repeated layers into groups, in the order of the tensors; `values` has the ranges of those read."""
    # The tensors of a group have the same number of dimensions.
    groups = grouped(((*same_layer_key(name), len(tensor.shape)), name) for name, tensor in tensors.items())
    return [_group(names, [tensors[name] for name in names], values) for names in groups.values()]


def _group(names: list[str], tensors: list[TensorInfo], values: Mapping[str, Values]) -> Group:
    measured = [values[name] for name in names if name in values]
    return Group(
        name=fold(names[0]) if len(names) > 1 else names[0],
        layers=", ".join(layer_indices(names)) if len(names) > 1 else "",
        num_tensors=len(names),
        dtypes=sorted({tensor.dtype.name for tensor in tensors}),
        shapes=[list(shape) for shape, _ in Counter(tensor.shape for tensor in tensors).most_common()],
        nbytes=sum(tensor.nbytes for tensor in tensors),
        values=reduce(lambda a, b: a.plus(b), measured) if measured else None,
    )

"""Renames the tensors of two checkpoints so that equal names mean the same tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from converter.checkpoint.open import Checkpoint
from converter.checkpoint.state_dict import StateDict, largest_state_dict, unwrapped_names, without_common_prefixes
from converter.errors import MappingError
from converter.layouts import registry
from converter.layouts.detect import DetectedLayout, detect_layouts, select_state_dicts
from converter.layouts.template import any_match
from converter.options import ConvertOptions
from converter.plan.apply import outside_predicate
from converter.plan.planner import ResolvedPlan, plan_to_canonical
from converter.plan.projector import as_vector, find_projector
from converter.tensors.lazy_tensor import LazyTensor, lazy_read, source_tensors
from converter.tensors.tensor_info import TensorInfo

NamedTensors = dict[str, LazyTensor]
# A prefix, and tensors under their names without it.
_Unprefixed = tuple[str, Mapping[str, TensorInfo]]


class Side(NamedTuple):
    """One of the two checkpoints: the state dict to compare, and the detected layout of each family."""

    opened: Checkpoint
    state_dict: StateDict
    detected: dict[str, DetectedLayout]


class AlignedTensors(NamedTuple):
    """The tensors of A and B, under names that can be compared."""

    a: NamedTensors
    b: NamedTensors
    layouts: list[str]  # The canonical layouts whose names are used; empty for the names in the files
    notes: list[str]  # Messages for the user
    encoders: dict[str, set[str]]  # The tensor names of each encoder that both have, by family


def select_side(opened: Checkpoint, path: str | None, prefix: str | None) -> Side:
    """Select the state dict to compare, and detect its layouts.

    Args:
        opened: The checkpoint.
        path: The path of the state dict in the checkpoint, or None for the largest one.
        prefix: The prefix of the names to compare, or None for all names.

    Raises:
        LayoutError: Several state dicts are the largest.
        UsageError: There is no such state dict, or no name with the prefix.
    """
    # With one state dict there is nothing to select: `path` may then exist in the other checkpoint only.
    if len(select_state_dicts(opened, None)) == 1:
        path = None
    selected = largest_state_dict(select_state_dicts(opened, path, prefix), opened.name)
    found = {family: detect_layouts(opened, registry.layouts(family), [selected]) for family in registry.families()}
    # If there are several encoders of a family, their tensors are compared under their names in the file.
    return Side(opened, selected, {family: layouts[0] for family, layouts in found.items() if len(layouts) == 1})


def align(a: Side, b: Side) -> AlignedTensors:
    """Return the tensors under canonical names if both sides share a family, else under their names in the files."""
    families = [family for family in a.detected if family in b.detected]
    notes = [note for side in (a, b) for note in _selection_notes(side)]
    if families:
        try:
            left, right = _canonical_tensors(a, families), _canonical_tensors(b, families)
        except MappingError as error:
            notes.append(f"compared under their own names: {'; '.join(error.message.splitlines())}")
        else:
            _rename_projector(left, right)
            notes += _drop_generated(left, right)
            layouts = [registry.canonical(family).name for family in families]
            return AlignedTensors(left.tensors, right.tensors, layouts, notes, left.encoders)
    # max() returns the first maximum, which removes the shortest prefixes.
    (prefix_a, tensors_a), (prefix_b, tensors_b) = max(product(_unprefixed(a), _unprefixed(b)), key=_num_common_names)
    for name, prefix in (("A", prefix_a), ("B", prefix_b)):
        if prefix:
            notes.append(f"compared without the prefix {prefix} of {name}'s names")
    return AlignedTensors(_lazy_reads(tensors_a), _lazy_reads(tensors_b), [], notes, {})


def _lazy_reads(tensors: Mapping[str, TensorInfo]) -> NamedTensors:
    return {name: lazy_read(tensor) for name, tensor in tensors.items()}


def _unprefixed(side: Side) -> Iterator[_Unprefixed]:
    """Yield each prefix that all names share, shortest first, with the tensors under names without it."""
    return without_common_prefixes(unwrapped_names(side.state_dict.tensors, side.opened.name), side.opened.name)


def _num_common_names(sides: tuple[_Unprefixed, _Unprefixed]) -> int:
    (_, tensors_a), (_, tensors_b) = sides
    return len(tensors_a.keys() & tensors_b.keys())


def _selection_notes(side: Side) -> Iterator[str]:
    """Yield notes if the checkpoint has other state dicts, or if a prefix was selected."""
    prefix = side.state_dict.prefix
    if prefix is not None:
        what = "encoder" if side.detected else "tensors"
        yield f"{side.opened.name}: only the {what} under the prefix {prefix or '.'} is compared"
    others = [entry for entry in select_state_dicts(side.opened, None) if entry.path != side.state_dict.path]
    if others:
        rest = f"{len(others)} more, such as {others[0].path or '.'}"
        yield f"{side.opened.name}: state dict {side.state_dict.path or '.'} is compared, not {rest}"


class _CanonicalTensors(NamedTuple):
    """The tensors of one side, those of its encoders under canonical names."""

    tensors: NamedTensors
    encoders: dict[str, set[str]]  # The names of each encoder's tensors, by family
    generated: set[str]  # The names of tensors that the checkpoint lacks
    projector: dict[str, str]  # The names of the projector's tensors, by their names in DeepSeek-OCR


def _canonical_tensors(side: Side, families: list[str]) -> _CanonicalTensors:
    """Return the encoders of some families under canonical names, and other tensors under their names in the file."""
    result: NamedTensors = {}
    generated: set[str] = set()
    projector: dict[str, TensorInfo | None] = {}
    encoders: dict[str, set[str]] = {}
    for family in families:
        plan = plan_to_canonical(side.opened, _only_layout(side.detected[family]), ConvertOptions(family))
        # Two families may use the same names.
        prefix = registry.encoder_prefix(family) if len(families) > 1 else ""
        result.update((prefix + name, value) for name, value in {**plan.outputs, **plan.extra_tensors}.items())
        generated.update(prefix + name for name in plan.generated)
        projector = projector or find_projector(ResolvedPlan(side.detected[family], plan))
        encoders[family] = {prefix + name for name in plan.outputs if name not in plan.generated}
    renamed_keys = {tensor.key for value in result.values() for tensor in source_tensors(value)}
    for name, tensor in _selected_tensors(side, families):
        if tensor.key not in renamed_keys:
            # The canonical layout may use this name for another tensor.
            result[f"{name} (own name)" if name in result else name] = lazy_read(tensor)
    names = {tensor.key: name for name, value in result.items() for tensor in source_tensors(value)}
    projector_names = {name: names[tensor.key] for name, tensor in projector.items() if tensor and tensor.key in names}
    return _CanonicalTensors(result, encoders, generated, projector_names)


def _rename_projector(a: _CanonicalTensors, b: _CanonicalTensors) -> None:
    """Rename B's projector tensors to A's names. Matrices of one row, as llama.cpp stores biases, become vectors."""
    for deepseek_name in a.projector.keys() & b.projector.keys():
        name_a, name_b = a.projector[deepseek_name], b.projector[deepseek_name]
        value_a, value_b = as_vector(a.tensors[name_a]), as_vector(b.tensors[name_b])
        # The shapes differ if one of the tensors is quantised, and therefore packed.
        if name_a not in b.tensors and value_a.shape == value_b.shape:
            a.tensors[name_a], b.tensors[name_a] = value_a, value_b
            del b.tensors[name_b]


def _only_layout(detected: DetectedLayout) -> DetectedLayout:
    """Return the encoder without tensors that no rule of the layout matches, such as those of a classification head."""
    match = detected.match
    templates = match.layout.templates(match.prefix)
    known = {
        match.outer_prefix + name: tensor for name, tensor in detected.tensors.items() if any_match(templates, name)
    }
    return replace(detected, selected=known)


def _selected_tensors(side: Side, families: list[str]) -> Iterator[tuple[str, TensorInfo]]:
    """Yield all tensors of a side or, if a prefix was selected, those of the encoders under it."""
    if side.state_dict.prefix is None:
        detected = side.detected[families[0]]
        yield from (*detected.tensors.items(), *detected.outside.items())
        return
    for family in families:
        detected = side.detected[family]
        match = detected.match
        is_outside = outside_predicate(match.layout.mapping, match.prefix, registry.canonical(family))
        yield from (item for item in detected.tensors.items() if not is_outside(item[0]))


def _drop_generated(a: _CanonicalTensors, b: _CanonicalTensors) -> list[str]:
    """Drop tensors that were generated on both sides; return notes on tensors that were generated on one side."""
    for name in a.generated & b.generated:
        del a.tensors[name], b.tensors[name]
    one_side = [("A", name) for name in a.generated - b.generated] + [("B", name) for name in b.generated - a.generated]
    return [f"{side} has no {name}, which is not required: taken as 0, 1, 2, ..." for side, name in one_side]

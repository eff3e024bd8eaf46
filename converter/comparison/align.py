"""Brings the tensors of two checkpoints to the same names."""

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
from converter.plan.apply import outside_encoder
from converter.plan.planner import ResolvedPlan, plan_to_canonical
from converter.plan.projector import as_vector, find_projector
from converter.tensors.lazy_tensor import LazyTensor, lazy_read, source_tensors
from converter.tensors.tensor_info import TensorInfo

Named = dict[str, LazyTensor]


class Side(NamedTuple):
    """One of the two checkpoints: the state dict to compare, and the detected layout of each family."""

    opened: Checkpoint
    state_dict: StateDict
    detected: dict[str, DetectedLayout]


class AlignedTensors(NamedTuple):
    """The tensors of A and B by comparable names."""

    a: Named
    b: Named
    layouts: list[str]  # The layouts whose names are used; empty for the checkpoints' own names
    notes: list[str]  # Messages for the user
    encoders: dict[str, set[str]]  # The names of the tensors of each encoder that both have, by family


def select_side(opened: Checkpoint, path: str | None, prefix: str | None) -> Side:
    """Select a state dict of a checkpoint, and detect its layouts.

    Args:
        opened: The checkpoint.
        path: The state dict, or None for the largest one.
        prefix: The prefix of the names to compare, or None for all names.

    Raises:
        LayoutError: Several state dicts are the largest.
        UsageError: There is no such state dict, or no name with the prefix.
    """
    # The path may be that of the other checkpoint, if this one has a single state dict.
    if len(select_state_dicts(opened, None)) == 1:
        path = None
    chosen = largest_state_dict(select_state_dicts(opened, path, prefix), opened.name)
    found = {family: detect_layouts(opened, registry.layouts(family), [chosen]) for family in registry.families()}
    # A checkpoint with several encoders of a family is compared by its own names.
    return Side(opened, chosen, {family: layouts[0] for family, layouts in found.items() if len(layouts) == 1})


def align(a: Side, b: Side) -> AlignedTensors:
    """Return the tensors under canonical names if both sides have the same family, else under their own names."""
    families = [family for family in a.detected if family in b.detected]
    notes = [note for side in (a, b) for note in _unread(side)]
    if families:
        try:
            left, right = _by_canonical_name(a, families), _by_canonical_name(b, families)
        except MappingError as error:
            notes.append(f"compared under their own names: {'; '.join(error.message.splitlines())}")
        else:
            _rename_projector(left, right)
            notes += _drop_generated(left, right)
            layouts = [registry.canonical(family).name for family in families]
            return AlignedTensors(left.named, right.named, layouts, notes, left.encoders)
    # max() returns the first of equals, which removes the shortest prefixes.
    pairs = product(_own(a), _own(b))
    (one, left_own), (other, right_own) = max(pairs, key=lambda pair: len(pair[0][1].keys() & pair[1][1]))
    for side, prefix in (("A", one), ("B", other)):
        if prefix:
            notes.append(f"compared without the prefix {prefix} of {side}'s names")
    return AlignedTensors(_read(left_own), _read(right_own), [], notes, {})


def _read(tensors: Mapping[str, TensorInfo]) -> Named:
    return {name: lazy_read(tensor) for name, tensor in tensors.items()}


def _own(side: Side) -> Iterator[tuple[str, Mapping[str, TensorInfo]]]:
    """Yield a prefix that all names have, and the tensors without it: first none, then one more segment each time."""
    return without_common_prefixes(unwrapped_names(side.state_dict.tensors, side.opened.name), side.opened.name)


def _unread(side: Side) -> Iterator[str]:
    """Yield notes if the checkpoint has other state dicts, or if a prefix was chosen."""
    prefix = side.state_dict.prefix
    if prefix is not None:
        what = "encoder" if side.detected else "tensors"
        yield f"{side.opened.name}: only the {what} under the prefix {prefix or '.'} is compared"
    others = [entry for entry in select_state_dicts(side.opened, None) if entry.path != side.state_dict.path]
    if others:
        rest = f"{len(others)} more, such as {others[0].path or '.'}"
        yield f"{side.opened.name}: state dict {side.state_dict.path or '.'} is compared, not {rest}"


class _ByCanonicalName(NamedTuple):
    """Tensors by canonical names, the names of each encoder's, and the names of those that no checkpoint has."""

    named: Named
    encoders: dict[str, set[str]]
    generated: set[str]
    projector: dict[str, str]  # The names in `named` of the projector's tensors, by DeepSeek's


def _by_canonical_name(side: Side, families: list[str]) -> _ByCanonicalName:
    """Return the tensors of some families under canonical names, and all others under their own names."""
    named: Named = {}
    generated: set[str] = set()
    projector: dict[str, TensorInfo | None] = {}
    encoders = {}
    for family in families:
        plan = plan_to_canonical(side.opened, _only_layout(side.detected[family]), ConvertOptions(family))
        # Two families may have the same names.
        prefix = registry.encoder_prefix(family) if len(families) > 1 else ""
        named.update((prefix + name, value) for name, value in {**plan.outputs, **plan.extra_tensors}.items())
        generated.update(prefix + name for name in plan.generated)
        projector = projector or find_projector(ResolvedPlan(side.detected[family], plan))
        encoders[family] = {prefix + name for name in plan.outputs if name not in plan.generated}
    taken = {tensor.key for value in named.values() for tensor in source_tensors(value)}
    for name, tensor in _comparable(side, families):
        if tensor.key not in taken:
            # The canonical layout may use this name for another tensor.
            named[f"{name} (own name)" if name in named else name] = lazy_read(tensor)
    names = {tensor.key: name for name, value in named.items() for tensor in source_tensors(value)}
    own = {name: names[tensor.key] for name, tensor in projector.items() if tensor and tensor.key in names}
    return _ByCanonicalName(named, encoders, generated, own)


def _rename_projector(a: _ByCanonicalName, b: _ByCanonicalName) -> None:
    """Give the projector's tensors A's names, and the shape of a vector to a matrix of one row, as llama.cpp has."""
    for own in a.projector.keys() & b.projector.keys():
        name, other = a.projector[own], b.projector[own]
        first, second = as_vector(a.named[name]), as_vector(b.named[other])
        # Quantised ones are packed.
        if name not in b.named and first.shape == second.shape:
            a.named[name], b.named[name] = first, second
            del b.named[other]


def _only_layout(detected: DetectedLayout) -> DetectedLayout:
    """Return the encoder without tensors that the layout has no rules for, such as those of a classification head."""
    match = detected.match
    templates = match.layout.templates(match.prefix)
    known = {match.wrapper + name: tensor for name, tensor in detected.tensors.items() if any_match(templates, name)}
    return replace(detected, names=known)


def _comparable(side: Side, families: list[str]) -> Iterator[tuple[str, TensorInfo]]:
    """Yield all tensors of a side or, if a prefix was chosen, those of the encoders under it."""
    first = side.detected[families[0]]
    if side.state_dict.prefix is None:
        yield from (*first.tensors.items(), *first.outside.items())
        return
    for family in families:
        detected = side.detected[family]
        match = detected.match
        is_outside = outside_encoder(match.layout.mapping, match.prefix, registry.canonical(family))
        yield from (item for item in detected.tensors.items() if not is_outside(item[0]))


def _drop_generated(a: _ByCanonicalName, b: _ByCanonicalName) -> list[str]:
    """Drop tensors that were generated on both sides; return notes on those generated on one."""
    for name in a.generated & b.generated:
        del a.named[name], b.named[name]
    single = [("A", name) for name in a.generated - b.generated] + [("B", name) for name in b.generated - a.generated]
    return [f"{side} has no {name}, which is not required: taken as 0, 1, 2, ..." for side, name in single]

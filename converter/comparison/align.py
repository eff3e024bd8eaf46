"""Brings the tensors of two checkpoints to the same names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import product
from typing import NamedTuple

from converter.checkpoint.open import Checkpoint
from converter.checkpoint.state_dict import StateDict, largest_state_dict, unwrapped_names, without_common_prefixes
from converter.errors import LayoutError, MappingError
from converter.layouts import registry
from converter.layouts.detect import DetectedLayout, detect_layouts, select_state_dicts
from converter.layouts.template import any_match
from converter.options import ConvertOptions
from converter.plan.planner import plan_to_canonical
from converter.tensors.lazy_tensor import LazyTensor, lazy_read, source_tensors
from converter.tensors.tensor_info import TensorInfo

Named = dict[str, LazyTensor]


class Side(NamedTuple):
    """One of the two: the state dict that is compared, and what it was recognised as by family."""

    opened: Checkpoint
    state_dict: StateDict
    known: dict[str, DetectedLayout]


class Common(NamedTuple):
    """The tensors of A and of B under the same names: `names` are the layouts that these are of."""

    a: Named
    b: Named
    names: list[str]
    notes: list[str]


def side_of(opened: Checkpoint, path: str) -> Side:
    """The state dict at `path`, or the largest if that is empty; LayoutError where several are the largest."""
    entries = select_state_dicts(opened, None)
    # A file with one state dict alone leaves nothing to choose.
    if path and len(entries) > 1:
        entries = select_state_dicts(opened, path)
    chosen = largest_state_dict(entries, opened.name)
    known: dict[str, DetectedLayout] = {}
    for family in registry.families():
        # A checkpoint that fits two layouts is compared by its own names.
        with suppress(LayoutError):
            known.update((family, hit) for hit in detect_layouts(opened, registry.entries(family), [chosen]))
    return Side(opened, chosen, known)


def common(a: Side, b: Side) -> Common:
    """Both sides under the hubs' names, if they are of the same families, else under their own."""
    families = [family for family in a.known if family in b.known]
    notes = [note for side in (a, b) for note in _unread(side)]
    if families:
        try:
            left, right = _by_canonical_name(a, families), _by_canonical_name(b, families)
        except MappingError as error:
            notes.append(f"compared under their own names: {'; '.join(error.message.splitlines())}")
        else:
            notes += _drop_generated(left, right)
            return Common(left.named, right.named, [f"deepencoder-{family}" for family in families], notes)
    # The first of equals: as little as possible is taken from the names.
    pairs = product(_own(a), _own(b))
    (one, left_own), (other, right_own) = max(pairs, key=lambda pair: len(pair[0][1].keys() & pair[1][1]))
    for side, prefix in (("A", one), ("B", other)):
        if prefix:
            notes.append(f"compared without the prefix {prefix} of {side}'s names")
    return Common(_read(left_own), _read(right_own), [], notes)


def _own(side: Side) -> Iterator[tuple[str, dict[str, TensorInfo]]]:
    """A side's tensors under their own names, with more of what all begin with removed each time, and that prefix."""
    return without_common_prefixes(unwrapped_names(side.state_dict.tensors, side.opened.name), side.opened.name)


def _read(tensors: Mapping[str, TensorInfo]) -> Named:
    return {name: lazy_read(tensor) for name, tensor in tensors.items()}


def _unread(side: Side) -> Iterator[str]:
    others = [entry for entry in select_state_dicts(side.opened, None) if entry.path != side.state_dict.path]
    if others:
        rest = f"{len(others)} more, such as {others[0].path or '.'}"
        yield f"{side.opened.name}: state dict {side.state_dict.path or '.'} is compared, not {rest}"


class _ByCanonicalName(NamedTuple):
    named: Named
    generated: set[str]


def _by_canonical_name(side: Side, families: list[str]) -> _ByCanonicalName:
    """A side's tensors under the names of its families' hubs, and all others under their own."""
    named: Named = {}
    generated: set[str] = set()
    for family in families:
        known = side.known[family]
        plan = plan_to_canonical(side.opened, known._replace(tensors=_fitting(known)), ConvertOptions(family))
        # Where both families are there, their names are kept apart.
        prefix = registry.encoder_prefix(family) if len(families) > 1 else ""
        named.update((prefix + name, value) for name, value in {**plan.outputs, **plan.extra_tensors}.items())
        generated.update(prefix + name for name in plan.generated)
    taken = {tensor.key for value in named.values() for tensor in source_tensors(value)}
    for name, tensor in side.known[families[0]].tensors.items():
        if tensor.key not in taken:
            # A name that the canonical layout has too is another tensor's.
            named[f"{name} (own name)" if name in named else name] = lazy_read(tensor)
    return _ByCanonicalName(named, generated)


def _fitting(known: DetectedLayout) -> dict[str, TensorInfo]:
    """The tensors that the layout knows: a head that was added does not keep the rest from being compared."""
    templates = known.match.layout.templates(known.match.prefix)
    return {name: tensor for name, tensor in known.tensors.items() if any_match(templates, name)}


def _drop_generated(a: _ByCanonicalName, b: _ByCanonicalName) -> list[str]:
    """Drop tensors that were generated on both sides; return notes on those generated on one."""
    for name in a.generated & b.generated:
        del a.named[name], b.named[name]
    once = [("A", name) for name in a.generated - b.generated] + [("B", name) for name in b.generated - a.generated]
    return [f"{side} has no {name}, and needs none: taken as 0, 1, 2, ..." for side, name in once]

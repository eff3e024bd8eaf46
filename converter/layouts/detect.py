"""Which state dict of a checkpoint has which layout, and what to say where none does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Mapping as Mapping
from typing import NamedTuple

from converter.checkpoint.open import Checkpoint
from converter.checkpoint.state_dict import StateDict, state_dicts, unwrapped_names, without_common_prefixes
from converter.errors import LayoutError, UsageError, printable
from converter.layouts import registry
from converter.layouts.claims import SHOWN, claim
from converter.layouts.parse import FAMILIES
from converter.layouts.registry import LayoutEntry
from converter.layouts.shapes import Sizes, fits
from converter.layouts.spec import LayoutMapping
from converter.tensors.tensor_info import TensorInfo

# Tensors of which all rules are tried to find the nearest layout: whole OCR models have 3,000.
_MOST_COMPARED = 10_000


class LayoutMatch(NamedTuple):
    """A layout that fits a checkpoint whose names carry `prefix`."""

    candidate: LayoutEntry
    prefix: str

    @property
    def evidence(self) -> list[str]:
        """The tensors by which the layout was known."""
        return [self.prefix + key for key in self.candidate.signature.tensors]


class DetectedLayout(NamedTuple):
    """The state dict of a source that a layout fits.

    `wrapper` is the prefix that was removed from all names to get `tensors`, whose keys are those the layout knows.
    """

    state_dict: StateDict
    wrapper: str
    tensors: dict[str, TensorInfo]
    match: LayoutMatch


def select_state_dicts(source: Checkpoint, path: str | None) -> list[StateDict]:
    """The state dicts of a source; with `path` (the option --state-dict, `.` for the top) that one alone."""
    found = state_dicts(source.contents)
    if not found:
        raise LayoutError(
            f"{source.name}: holds no tensors under names",
            "save the model's state dict, not a list of tensors or a training record without one, and convert that",
        )
    if path is None:
        return found
    chosen = [entry for entry in found if entry.path == path.strip(".")]
    if not chosen:
        raise UsageError(f"--state-dict {path}: {source.name} has no such state dict", f"it has: {_paths(found)}")
    return chosen


def detect_layout(source: Checkpoint, family: str, layouts: Sequence[LayoutEntry], path: str | None) -> DetectedLayout:
    """The one state dict of a source that one of `layouts` fits; LayoutError where none or several do."""
    candidates = select_state_dicts(source, path)
    found = detect_layouts(source, layouts, candidates)
    if not found:
        raise _unknown(source, family, layouts, candidates)
    if len(found) > 1:
        raise LayoutError(
            f"{source.name}: holds {len(found)} state dicts that fit: {_paths([hit.state_dict for hit in found])}",
            f"choose one, such as --state-dict {printable(found[0].state_dict.path) or '.'}",
        )
    return found[0]


def detect_layouts(
    source: Checkpoint, layouts: Sequence[LayoutEntry], candidates: list[StateDict]
) -> list[DetectedLayout]:
    """Those of the candidates that one of `layouts` fits."""
    return [hit for hit in (_known(source, candidate, layouts) for candidate in candidates) if hit]


def _known(source: Checkpoint, state_dict: StateDict, layouts: Sequence[LayoutEntry]) -> DetectedLayout | None:
    """The layout of a state dict, tried under its own names first, then with common prefixes removed."""
    plain = unwrapped_names(state_dict.tensors, source.name)
    for wrapper, tensors in without_common_prefixes(plain, source.name):
        matches = match_layouts(tensors, layouts)
        if len(matches) > 1:
            names = ", ".join(match.candidate.name for match in matches)
            raise LayoutError(f"{source.name}: fits several layouts: {names}", "choose one with --mapping")
        if matches:
            return DetectedLayout(state_dict, wrapper, tensors, matches[0])
    return None


def match_layouts(tensors: Mapping[str, TensorInfo], candidates: Iterable[LayoutEntry]) -> list[LayoutMatch]:
    """The layouts that fit, each with the first of its prefixes that does."""
    return [match for match in (_fit(tensors, candidate) for candidate in candidates) if match]


def _fit(tensors: Mapping[str, TensorInfo], candidate: LayoutEntry) -> LayoutMatch | None:
    for prefix in candidate.signature.prefixes:
        sizes: Sizes = {}
        if all(
            prefix + key in tensors and fits(shape, tensors[prefix + key].shape, sizes)
            for key, shape in candidate.signature.tensors.items()
        ):
            return LayoutMatch(candidate, prefix)
    return None


def _paths(entries: Sequence[StateDict]) -> str:
    return ", ".join(f"{printable(entry.path) or '.'} ({len(entry.tensors)} tensors)" for entry in entries)


def _unknown(
    source: Checkpoint, family: str, layouts: Sequence[LayoutEntry], candidates: list[StateDict]
) -> LayoutError:
    """What to say of a source that no layout fits: the other family's, or the nearest layout and the differences."""
    largest = max(candidates, key=lambda entry: len(entry.tensors))
    for other in FAMILIES:
        if other != family and _known(source, largest, registry.entries(other)):
            return LayoutError(
                f"{source.name}: is a {other.upper()} checkpoint, not {family.upper()}",
                f"run: dsocr-convert {other} ...",
            )
    mappings = [loaded for candidate in layouts if isinstance(loaded := candidate.load(), LayoutMapping)]
    no_fit = f"{source.name}: no {family.upper()} layout fits its {len(largest.tensors)} tensors"
    return LayoutError(
        "\n".join([no_fit, *nearest_layout(source, largest, mappings)]),
        "write a mapping for it and give it with --mapping (`dsocr-convert mapping show` prints examples)",
    )


def nearest_layout(source: Checkpoint, state_dict: StateDict, mappings: list[LayoutMapping]) -> list[str]:
    """Lines on the mapping that comes closest to a state dict, and where the two first differ."""
    tensors = unwrapped_names(state_dict.tensors, source.name)
    near = _nearest(tensors, mappings)
    if near is None:
        return [f"its first names: {', '.join(map(repr, sorted(tensors)[:SHOWN]))}"]
    differences = [f"  {near.mapping.name} has nothing for {name!r}" for name in near.unclaimed[:SHOWN]]
    differences += [f"  the checkpoint has nothing for {text}" for text in near.unmatched[:SHOWN]]
    for key, shape in near.mapping.signature.tensors.items():
        tensor = tensors.get(near.prefix + key)
        if tensor and len(tensor.shape) != len(shape):
            differences.append(f"  {near.prefix + key!r} has {len(tensor.shape)} dimensions, not {len(shape)}")
    prefix = f" (prefix {near.prefix})" if near.prefix else ""
    # With the lines around them a dozen.
    return [f"nearest is {near.mapping.name}{prefix}:", *differences[:9]]


class _Nearest(NamedTuple):
    """The mapping that comes closest to tensors that fit none, and where it first differs from them."""

    mapping: LayoutMapping
    prefix: str
    unclaimed: list[str]
    unmatched: list[str]


def _nearest(tensors: Mapping[str, TensorInfo], candidates: list[LayoutMapping]) -> _Nearest | None:
    """The mapping whose rules claim most of the tensors and are used most, or None where all claim nothing."""
    if len(tensors) > _MOST_COMPARED:
        return None
    best: _Nearest | None = None
    best_score = 0.0
    for mapping in candidates:
        for prefix in mapping.signature.prefixes:
            rules = mapping.rules_for(prefix)
            claims = claim(rules, tensors)
            alive = len({index for index, _ in claims.groups})
            claimed = sum(len(parts) for parts in claims.groups.values())
            # A mapping of few wide rules claims much by chance: both shares count.
            score = claimed / max(len(tensors), 1) * alive / len(rules)
            if score > best_score:
                dead = [rule.text for rule in claims.dead(rules)]
                best, best_score = _Nearest(mapping, prefix, claims.unclaimed, dead), score
    return best

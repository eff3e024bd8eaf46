"""Layout detection: which state dict of a checkpoint has which layout, and an explanation if none has any."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from converter.checkpoint.open import Checkpoint
from converter.checkpoint.state_dict import StateDict, state_dicts, unwrapped_names, without_common_prefixes
from converter.errors import LayoutError, UsageError, printable
from converter.layouts import registry
from converter.layouts.claims import MAX_SHOWN, claim
from converter.layouts.registry import LayoutEntry
from converter.layouts.shapes import Sizes, match_shape
from converter.layouts.spec import LayoutMapping, LayoutSpec
from converter.tensors.tensor_info import TensorInfo

# The search for the nearest layout tries all rules, so it is skipped for more tensors. OCR models have 3,000.
_MAX_TENSORS_COMPARED = 10_000


class LayoutMatch(NamedTuple):
    """A layout that fits a checkpoint in which the layout's names begin with `prefix`."""

    entry: LayoutEntry
    prefix: str

    @property
    def name(self) -> str:
        """The name of the layout."""
        return self.entry.name

    @property
    def layout(self) -> LayoutSpec:
        """The layout with its rules."""
        return self.entry.load()

    @property
    def evidence(self) -> list[str]:
        """The tensors by which the layout was detected."""
        return [self.prefix + key for key in self.entry.signature.tensors]


class DetectedLayout(NamedTuple):
    """A state dict and its detected layout.

    Attributes:
        state_dict: The state dict.
        wrapper: A common prefix of all names that the layout does not have, such as `model.`; often empty.
        tensors: The tensors of the state dict by their names without `wrapper`.
        match: The layout.
    """

    state_dict: StateDict
    wrapper: str
    tensors: dict[str, TensorInfo]
    match: LayoutMatch


def select_state_dicts(source: Checkpoint, path: str | None) -> list[StateDict]:
    """Return the state dicts of a checkpoint, or only the one at `path` (--state-dict; `.` is the top level)."""
    entries = state_dicts(source.contents)
    if not entries:
        raise LayoutError(
            f"{source.name}: contains no named tensors",
            "save the model's state dict and convert that",
        )
    if path is None:
        return entries
    chosen = [entry for entry in entries if entry.path == path.strip(".")]
    if not chosen:
        raise UsageError(f"--state-dict {path}: {source.name} has no such state dict", f"it has: {_paths(entries)}")
    return chosen


def detect_layout(source: Checkpoint, family: str, layouts: Sequence[LayoutEntry], path: str | None) -> DetectedLayout:
    """Detect the layout of a checkpoint.

    Args:
        source: The checkpoint.
        family: The family of the layouts, for error messages.
        layouts: The layouts to try.
        path: The state dict to use (--state-dict), or None to search all of them.

    Raises:
        LayoutError: No state dict fits a layout, or several do.
    """
    candidates = select_state_dicts(source, path)
    detected = detect_layouts(source, layouts, candidates)
    if not detected:
        raise _unknown(source, family, layouts, candidates)
    if len(detected) > 1:
        paths = _paths([layout.state_dict for layout in detected])
        raise LayoutError(
            f"{source.name}: has {len(detected)} state dicts that fit: {paths}",
            f"choose one, such as --state-dict {printable(detected[0].state_dict.path) or '.'}",
        )
    return detected[0]


def detect_layouts(
    source: Checkpoint, layouts: Sequence[LayoutEntry], candidates: list[StateDict]
) -> list[DetectedLayout]:
    """Detect the layouts of several state dicts.

    Args:
        source: The checkpoint, for error messages.
        layouts: The layouts to try.
        candidates: The state dicts of the checkpoint.

    Returns:
        One item for each state dict that fits a layout.
    """
    detected = (_detect(source, candidate, layouts) for candidate in candidates)
    return [layout for layout in detected if layout]


def _detect(source: Checkpoint, state_dict: StateDict, layouts: Sequence[LayoutEntry]) -> DetectedLayout | None:
    """Detect the layout of a state dict by its own names first, then with common prefixes removed."""
    unwrapped = unwrapped_names(state_dict.tensors, source.name)
    for wrapper, tensors in without_common_prefixes(unwrapped, source.name):
        matches = match_layouts(tensors, layouts)
        if len(matches) > 1:
            names = ", ".join(match.name for match in matches)
            raise LayoutError(f"{source.name}: fits several layouts: {names}", "choose one with --mapping")
        if matches:
            return DetectedLayout(state_dict, wrapper, tensors, matches[0])
    return None


def match_layouts(tensors: Mapping[str, TensorInfo], candidates: Iterable[LayoutEntry]) -> list[LayoutMatch]:
    """Return the layouts that fit, each with the first of its prefixes that does."""
    return [match for match in (_fit(tensors, entry) for entry in candidates) if match]


def _fit(tensors: Mapping[str, TensorInfo], entry: LayoutEntry) -> LayoutMatch | None:
    for prefix in entry.signature.prefixes:
        sizes: Sizes = {}
        if all(
            prefix + key in tensors and match_shape(shape, tensors[prefix + key].shape, sizes)
            for key, shape in entry.signature.tensors.items()
        ):
            return LayoutMatch(entry, prefix)
    return None


def _paths(entries: Sequence[StateDict]) -> str:
    return ", ".join(f"{printable(entry.path) or '.'} ({len(entry.tensors)} tensors)" for entry in entries)


def _unknown(
    source: Checkpoint, family: str, layouts: Sequence[LayoutEntry], candidates: list[StateDict]
) -> LayoutError:
    """Return the error for a checkpoint that no layout fits.

    It names another family that fits, or the differences from the nearest layout.
    """
    largest = max(candidates, key=lambda entry: len(entry.tensors))
    for other in registry.families():
        if other != family and _detect(source, largest, registry.entries(other)):
            return LayoutError(
                f"{source.name}: is a {other.upper()} checkpoint, not {family.upper()}",
                f"run: dsocr-convert {other} ...",
            )
    mappings = [spec.mapping for spec in (entry.load() for entry in layouts) if not spec.is_canonical]
    no_fit = f"{source.name}: no {family.upper()} layout fits its {len(largest.tensors)} tensors"
    return LayoutError(
        "\n".join([no_fit, *nearest_layout(source, largest, mappings)]),
        "write a mapping for it and give it with --mapping (`dsocr-convert mapping show` prints examples)",
    )


def nearest_layout(source: Checkpoint, state_dict: StateDict, mappings: list[LayoutMapping]) -> list[str]:
    """Describe the mapping that is closest to a state dict, and the first differences.

    Args:
        source: The checkpoint, for error messages.
        state_dict: The state dict that fits no layout.
        mappings: The mappings to compare it with.

    Returns:
        Lines of text.
    """
    tensors = unwrapped_names(state_dict.tensors, source.name)
    near = _nearest(tensors, mappings)
    if near is None:
        return [f"first names: {', '.join(map(repr, sorted(tensors)[:MAX_SHOWN]))}"]
    differences = [f"  {near.mapping.name} has no rule for {name!r}" for name in near.unclaimed[:MAX_SHOWN]]
    differences += [f"  the checkpoint has no tensor for {text}" for text in near.unmatched[:MAX_SHOWN]]
    for key, shape in near.mapping.signature.tensors.items():
        tensor = tensors.get(near.prefix + key)
        if tensor and len(tensor.shape) != len(shape):
            differences.append(f"  {near.prefix + key!r} has {len(tensor.shape)} dimensions, not {len(shape)}")
    prefix = f" (prefix {near.prefix})" if near.prefix else ""
    # The whole message has about a dozen lines.
    return [f"nearest is {near.mapping.name}{prefix}:", *differences[:9]]


class _Nearest(NamedTuple):
    """The mapping that is closest to tensors that fit none: names without a rule, rules without a name."""

    mapping: LayoutMapping
    prefix: str
    unclaimed: list[str]
    unmatched: list[str]


def _nearest(tensors: Mapping[str, TensorInfo], candidates: list[LayoutMapping]) -> _Nearest | None:
    """Return the mapping with the highest share of claimed tensors times used rules, or None if no rule claims any."""
    if len(tensors) > _MAX_TENSORS_COMPARED:
        return None
    best: _Nearest | None = None
    best_score = 0.0
    for mapping in candidates:
        for prefix in mapping.signature.prefixes:
            rules = mapping.rules_for(prefix)
            claims = claim(rules, tensors)
            num_used_rules = len({index for index, _ in claims.groups})
            num_claimed = sum(len(parts) for parts in claims.groups.values())
            # Both shares count: a mapping with a few general rules claims much by chance.
            score = num_claimed / max(len(tensors), 1) * num_used_rules / len(rules)
            if score > best_score:
                unmatched = [rule.text for rule in claims.unmatched_rules(rules)]
                best, best_score = _Nearest(mapping, prefix, claims.unclaimed, unmatched), score
    return best

"""Shortens lists of tensor names: folds the names of repeated layers, and groups names by reason."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from converter.errors import first_names

_Key = TypeVar("_Key")
# A segment of a dotted name that is a number.
_INDEX = re.compile(r"(?<![^.])[0-9]{1,9}(?![^.])")


def overflow_warning(overflows: Mapping[str, int]) -> str:
    """Return a warning about finite values that a cast made infinite or NaN, given their number in each tensor."""
    total, names = sum(overflows.values()), [f"{name} ({count})" for name, count in overflows.items()]
    warning = f"warning: the cast made {total} finite values infinite or NaN: {first_names(names)}"
    return f"{warning}; bfloat16 and float32 have a larger range"


def fold(name: str) -> str:
    """Replace each layer index of a name by `{}`: `blocks.3.norm1.weight` becomes `blocks.{}.norm1.weight`."""
    return _INDEX.sub("{}", name)


def layer_indices(names: Sequence[str]) -> list[str]:
    """Return a range such as `0..23` for each layer index in names that differ only in layer indices."""
    positions = zip(*(_INDEX.findall(name) for name in names), strict=True)
    return [_format_indices(sorted({int(index) for index in indices})) for indices in positions]


def _format_indices(indices: list[int]) -> str:
    if len(indices) > 1 and indices[-1] - indices[0] == len(indices) - 1:
        return f"{indices[0]}..{indices[-1]}"
    return " ".join(map(str, indices))


def same_layer_key(name: str) -> tuple[str, int]:
    """Return a key that only names that differ only in layer indices share. A literal `{}` in a name is no index."""
    return fold(name), len(_INDEX.findall(name))


def fold_layers(names: Iterable[str]) -> dict[str, list[str]]:
    """Group names that differ only in layer indices, by one name for all of them, such as `blocks.0..11`."""
    groups = grouped((same_layer_key(name), name) for name in names)
    return {_with_ranges(members): members for members in groups.values()}


def _with_ranges(names: list[str]) -> str:
    ranges = iter(layer_indices(names))
    return _INDEX.sub(lambda _: next(ranges), names[0])


def fold_names(names: Iterable[str]) -> list[str]:
    """Fold names that differ only in layer indices into one, such as `blocks.{}.norm1.weight (x 12)`."""
    return [
        f"{pattern} (x {len(members)})" if len(members) > 1 else members[0]
        for pattern, members in grouped((fold(name), name) for name in names).items()
    ]


class FoldedTensor(NamedTuple):
    """Output tensors whose names differ only in the layer index."""

    name: str  # The name of the output tensors, with `{}` for the layer index if there are several
    sources: list[str]  # The names of their source tensors, with `{}` in the same way
    members: list[str]  # The full names of the output tensors


def fold_key_map(key_map: Mapping[str, Sequence[str]]) -> list[FoldedTensor]:
    """Fold the output tensors of repeated layers, each with the source tensors that it is made of."""
    groups = grouped(((fold(name), *map(fold, sources)), name) for name, sources in key_map.items())
    return [
        FoldedTensor(pattern, sources, members)
        if len(members) > 1
        else FoldedTensor(members[0], list(key_map[members[0]]), members)
        for (pattern, *sources), members in groups.items()
    ]


def group_by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the names for each reason, given the reason for each name."""
    return grouped((reason, name) for name, reason in reasons.items())


def grouped(pairs: Iterable[tuple[_Key, str]]) -> dict[_Key, list[str]]:
    """Group names by key, given pairs of a key and a name."""
    groups: dict[_Key, list[str]] = {}
    for key, name in pairs:
        groups.setdefault(key, []).append(name)
    return groups

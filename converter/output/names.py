"""Formats lists of tensor names: shortened, with repeated layers folded, or grouped by reason."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from converter.errors import first_names

_Key = TypeVar("_Key")
# A part of a dotted name that is a number.
_INDEX = re.compile(r"(?<![^.])[0-9]{1,9}(?![^.])")


def overflow_warning(overflows: Mapping[str, int]) -> str:
    """Describe finite values that a cast made infinite or NaN, by the number in each tensor."""
    total, names = sum(overflows.values()), [f"{name} ({number})" for name, number in overflows.items()]
    what = f"warning: the cast made {total} finite values infinite or NaN: {first_names(names)}"
    return f"{what}; bfloat16 and float32 have a larger range"


def fold(name: str) -> str:
    """The name with `{}` for each layer index: `blocks.3.norm1.weight` becomes `blocks.{}.norm1.weight`."""
    return _INDEX.sub("{}", name)


def layer_indices(names: Sequence[str]) -> list[str]:
    """The layer indices of names that differ in nothing else, such as `0..23`; an entry for each index of a name."""
    columns = zip(*(_INDEX.findall(name) for name in names), strict=True)
    return [_format_indices(sorted(set(map(int, column)))) for column in columns]


def _format_indices(numbers: list[int]) -> str:
    if len(numbers) > 1 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}..{numbers[-1]}"
    return " ".join(map(str, numbers))


def same_layer_key(name: str) -> tuple[str, int]:
    """A key that is equal for names that differ in layer indices alone, also if one has a literal `{}`."""
    return fold(name), len(_INDEX.findall(name))


def fold_layers(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by one for all that differ in layer indices alone, such as `blocks.0..11`."""
    groups = grouped((same_layer_key(name), name) for name in names)
    return {_with_indices(members): members for members in groups.values()}


def _with_indices(names: list[str]) -> str:
    indices = iter(layer_indices(names))
    return _INDEX.sub(lambda _: next(indices), names[0])


def fold_names(names: Iterable[str]) -> list[str]:
    """The names with repeated layers folded into one entry, such as `blocks.{}.norm1.weight (x 12)`."""
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
    """Output tensors and the source tensors they are made of, repeated layers folded."""
    groups = grouped(((fold(name), *map(fold, sources)), name) for name, sources in key_map.items())
    return [
        FoldedTensor(pattern, sources, members)
        if len(members) > 1
        else FoldedTensor(members[0], list(key_map[members[0]]), members)
        for (pattern, *sources), members in groups.items()
    ]


def group_by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """Reason -> names, from name -> reason."""
    return grouped((reason, name) for name, reason in reasons.items())


def grouped(pairs: Iterable[tuple[_Key, str]]) -> dict[_Key, list[str]]:
    """Names by their key."""
    groups: dict[_Key, list[str]] = {}
    for key, name in pairs:
        groups.setdefault(key, []).append(name)
    return groups

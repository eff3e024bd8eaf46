"""Shapes with named sizes, `[3*width, width]`: checked against a tensor, they tell what the names stand for."""

from __future__ import annotations

import re
from typing import NamedTuple

_DIM = re.compile(r"(?:([1-9][0-9]{0,5})\*)?([a-z][a-z_0-9]*)")

# What the names have been found to stand for so far.
Sizes = dict[str, int]


class Dim(NamedTuple):
    """One dimension: `factor` times the size `name`, or just `factor` where `name` is None; factor 0 is any size."""

    factor: int
    name: str | None

    def __str__(self) -> str:
        if self.name is None:
            return str(self.factor) if self.factor else "_"
        return self.name if self.factor == 1 else f"{self.factor}*{self.name}"


Shape = tuple[Dim, ...]


def parse_dim(text: str) -> Dim:
    """`768`, `width`, `3*width`, or `_` for any size; ValueError otherwise."""
    if text == "_":
        return Dim(0, None)
    if re.fullmatch("[1-9][0-9]{0,11}", text):
        return Dim(int(text), None)
    found = _DIM.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no dimension: write a number, a name, a number*name, or _ for any")
    return Dim(int(found.group(1) or 1), found.group(2))


def written(shape: Shape) -> str:
    """The shape as mapping files have it."""
    return "[" + ", ".join(map(str, shape)) + "]"


def fits(shape: Shape, actual: tuple[int, ...], sizes: Sizes) -> bool:
    """Whether `actual` has this shape given `sizes`; names met for the first time are added to `sizes`.

    No name stands for 0: of tensors without elements a file may claim any size.
    """
    if len(shape) != len(actual):
        return False
    found = dict(sizes)
    for dim, size in zip(shape, actual, strict=True):
        if dim.name is None:
            if dim.factor not in (0, size):
                return False
        elif not size or size % dim.factor or found.setdefault(dim.name, size // dim.factor) != size // dim.factor:
            return False
    sizes.update(found)
    return True


def resolve(shape: Shape, sizes: Sizes) -> tuple[int, ...]:
    """The shape in numbers; KeyError for a name that nothing has determined."""
    return tuple(dim.factor if dim.name is None else dim.factor * sizes[dim.name] for dim in shape)

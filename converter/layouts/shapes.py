"""Shapes with named sizes such as `[3*width, width]`; matching a tensor's shape binds the names to numbers."""

from __future__ import annotations

import re
from typing import NamedTuple

_DIM = re.compile(r"(?:([1-9][0-9]{0,5})\*)?([a-z][a-z_0-9]*)")

# Sizes by name, as far as they are known.
Sizes = dict[str, int]


class Dim(NamedTuple):
    """One dimension: `factor` times the size `name`, or `factor` itself if `name` is None; factor 0 is any size."""

    factor: int
    name: str | None

    def __str__(self) -> str:
        if self.name is None:
            return str(self.factor) if self.factor else "_"
        return self.name if self.factor == 1 else f"{self.factor}*{self.name}"


Shape = tuple[Dim, ...]


def parse_dim(text: str) -> Dim:
    """Parse `768`, `width`, `3*width`, or `_` for any size; ValueError otherwise."""
    if text == "_":
        return Dim(0, None)
    if re.fullmatch("[1-9][0-9]{0,11}", text):
        return Dim(int(text), None)
    match = _DIM.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a dimension: write a number, a name, a number*name, or _ for any")
    return Dim(int(match.group(1) or 1), match.group(2))


def written(shape: Shape) -> str:
    """Return the shape as written in mapping files."""
    return "[" + ", ".join(map(str, shape)) + "]"


def fits(shape: Shape, actual: tuple[int, ...], sizes: Sizes) -> bool:
    """Return whether a tensor has a shape; if so, names that are new are added to `sizes`.

    Names do not match size 0, because a file may claim any other size for a tensor without elements.

    Args:
        shape: The expected shape.
        actual: The shape of the tensor.
        sizes: The sizes known so far.
    """
    if len(shape) != len(actual):
        return False
    bound = dict(sizes)
    for dim, size in zip(shape, actual, strict=True):
        if dim.name is None:
            if dim.factor not in (0, size):
                return False
        elif not size or size % dim.factor or bound.setdefault(dim.name, size // dim.factor) != size // dim.factor:
            return False
    sizes.update(bound)
    return True


def resolve(shape: Shape, sizes: Sizes) -> tuple[int, ...]:
    """Return the shape in numbers; KeyError for a name without a size."""
    return tuple(dim.factor if dim.name is None else dim.factor * sizes[dim.name] for dim in shape)

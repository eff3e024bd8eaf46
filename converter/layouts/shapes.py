"""Shapes with named sizes such as `[3*width, width]`; matching a tensor's shape binds the names to numbers."""

from __future__ import annotations

import re
from typing import NamedTuple

# Known sizes by name, such as width: 1024.
Sizes = dict[str, int]


class Dim(NamedTuple):
    """A dimension: `factor` times the size `name`. Without a name, its size is `factor`, or any size if that is 0."""

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
    match = re.fullmatch(r"(?:([1-9][0-9]{0,5})\*)?([a-z][a-z_0-9]*)", text)
    if match is None:
        raise ValueError(f"{text!r} is not a dimension: write a number, a name, a number*name, or _ for any")
    return Dim(int(match.group(1) or 1), match.group(2))


def format_shape(shape: Shape) -> str:
    """Return a shape as text in the syntax of mapping files."""
    return "[" + ", ".join(map(str, shape)) + "]"


def match_shape(shape: Shape, actual: tuple[int, ...], sizes: Sizes) -> bool:
    """Return whether a tensor's shape matches. If it does, add sizes that were not known yet to `sizes`.

    Names do not match size 0, because a file may claim any other size for a tensor without elements.

    Args:
        shape: The expected shape.
        actual: The shape of the tensor.
        sizes: The known sizes, to which new ones are added.
    """
    if len(shape) != len(actual):
        return False
    new_sizes = dict(sizes)
    for dim, size in zip(shape, actual, strict=True):
        if dim.name is None:
            if dim.factor not in (0, size):
                return False
        elif not size or size % dim.factor or new_sizes.setdefault(dim.name, size // dim.factor) != size // dim.factor:
            return False
    sizes.update(new_sizes)
    return True


def concrete_shape(shape: Shape, sizes: Sizes) -> tuple[int, ...]:
    """Return a shape as numbers; KeyError for a name without a known size."""
    return tuple(dim.factor if dim.name is None else dim.factor * sizes[dim.name] for dim in shape)


def shows_channels_last(shape: tuple[int, ...]) -> bool | None:
    """Return whether a convolution's weight is [out, side, side, in], as in MLX, and not [out, in, side, side].

    None for shapes that fit neither, and for those that fit both: as many input channels as rows of the kernel.
    """
    if len(shape) != 4 or (shape[1] == shape[2]) == (shape[2] == shape[3]):
        return None
    return shape[1] == shape[2]

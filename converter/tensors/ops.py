"""What a rule does to tensors. Every operation knows its inverse or says why it has none.

`one` makes one tensor of another; `apply`, of Fuse and Split, makes all of a rule's tensors of all of them. Both raise
ValueError where shapes or types do not allow it. `inverse` raises LossyError.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from converter.tensors.dtypes import BY_NAME
from converter.tensors.lazy_tensor import Cast, LazyTensor, Resample, concatenated, permuted, reshaped, sliced

Values = tuple[LazyTensor, ...]

# Of positions along a side: an image of 8192 pixels in CLIP-L's patches, 1.4 GB of positions, computed in memory.
LARGEST_GRID = 585


class LossyError(Exception):
    """The operation cannot be undone."""


class Fuse(NamedTuple):
    """Concatenates `parts` tensors along `dim`; undone by Split."""

    parts: int
    dim: int = 0

    def apply(self, values: Values) -> Values:
        first = values[0]
        _axis(first, self.dim)
        for value in values[1:]:
            if value.dtype != first.dtype:
                raise ValueError(f"cannot fuse {first.dtype.name} with {value.dtype.name}")
            # Equal sizes only: a split could not tell unequal ones apart.
            if value.shape != first.shape:
                raise ValueError(f"cannot fuse shapes {list(first.shape)} and {list(value.shape)}")
        return (concatenated(values, self.dim),)

    def inverse(self) -> Op:
        return Split(self.parts, self.dim)


class Split(NamedTuple):
    """Cuts a tensor into `parts` equal parts along `dim`; undone by Fuse."""

    parts: int
    dim: int = 0

    def apply(self, values: Values) -> Values:
        (value,) = values
        size = value.shape[_axis(value, self.dim)]
        if size % self.parts:
            raise ValueError(f"cannot split shape {list(value.shape)} into {self.parts} equal parts")
        step = size // self.parts
        return tuple(sliced(value, self.dim, i * step, step) for i in range(self.parts))

    def inverse(self) -> Op:
        return Fuse(self.parts, self.dim)


class Squeeze(NamedTuple):
    """Removes dimensions of one element, numbered as before; undone by Unsqueeze."""

    dims: tuple[int, ...]

    def one(self, value: LazyTensor) -> LazyTensor:
        if any(value.shape[_axis(value, dim)] != 1 for dim in self.dims):
            raise ValueError(f"cannot squeeze dimensions {list(self.dims)} of shape {list(value.shape)}")
        return reshaped(value, tuple(n for i, n in enumerate(value.shape) if i not in self.dims))

    def inverse(self) -> Op:
        return Unsqueeze(self.dims)


class Unsqueeze(NamedTuple):
    """Inserts dimensions of one element, numbered as afterwards; undone by Squeeze."""

    dims: tuple[int, ...]

    def one(self, value: LazyTensor) -> LazyTensor:
        shape = list(value.shape)
        for dim in sorted(self.dims):
            if dim > len(shape):
                raise ValueError(f"cannot insert dimension {dim} into shape {list(value.shape)}")
            shape.insert(dim, 1)
        return reshaped(value, tuple(shape))

    def inverse(self) -> Op:
        return Squeeze(self.dims)


class Reshaped(NamedTuple):
    """The shape `before` becomes `after`, both given in numbers; undone by the reverse."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def one(self, value: LazyTensor) -> LazyTensor:
        if value.shape != self.before:
            raise ValueError(f"expected shape {list(self.before)}, found {list(value.shape)}")
        return reshaped(value, self.after)

    def inverse(self) -> Op:
        return Reshaped(self.after, self.before)


class Permuted(NamedTuple):
    """Dimension i of the result is dimension `dims[i]` of the tensor; undone by the inverse permutation."""

    dims: tuple[int, ...]

    def one(self, value: LazyTensor) -> LazyTensor:
        if len(value.shape) != len(self.dims):
            raise ValueError(f"cannot permute shape {list(value.shape)} by {list(self.dims)}")
        return permuted(value, self.dims)

    def inverse(self) -> Op:
        return Permuted(tuple(self.dims.index(i) for i in range(len(self.dims))))


class Deinterleave(NamedTuple):
    """Rows ordered head by head (q0 k0 v0 q1 k1 v1 ...) become part by part (q0 q1 ... k0 k1 ... v0 v1 ...).

    The first dimension holds `heads` x `parts` x head width rows. Only rows move, so this still is a copy. Undone by
    the same operation with the numbers exchanged.
    """

    heads: int
    parts: int

    def one(self, value: LazyTensor) -> LazyTensor:
        rows = value.shape[_axis(value, 0)]
        if not rows or rows % (self.heads * self.parts):
            raise ValueError(f"cannot take {self.heads} heads of {self.parts} parts from shape {list(value.shape)}")
        step = rows // (self.heads * self.parts)
        order = [head * self.parts + part for part in range(self.parts) for head in range(self.heads)]
        return concatenated(tuple(sliced(value, 0, i * step, step) for i in order), 0)

    def inverse(self) -> Op:
        return Deinterleave(self.parts, self.heads)


class Reorder(NamedTuple):
    """Cuts rows into equal parts and concatenates them in another order: part i of the result is part `order[i]`.

    Only rows move, so this still is a copy. Undone by the inverse order.
    """

    order: tuple[int, ...]

    def one(self, value: LazyTensor) -> LazyTensor:
        rows = value.shape[_axis(value, 0)]
        if rows % len(self.order):
            raise ValueError(f"cannot cut shape {list(value.shape)} into {len(self.order)} equal parts")
        step = rows // len(self.order)
        return concatenated(tuple(sliced(value, 0, part * step, step) for part in self.order), 0)

    def inverse(self) -> Op:
        return Reorder(tuple(self.order.index(i) for i in range(len(self.order))))


class CastTo(NamedTuple):
    """Rounds a floating-point tensor to another element type."""

    dtype: str

    def one(self, value: LazyTensor) -> LazyTensor:
        if not value.dtype.is_float:
            raise ValueError(f"cannot cast {value.dtype.name} to {self.dtype}")
        return value if value.dtype.name == self.dtype else Cast(BY_NAME[self.dtype], value.shape, value)

    def inverse(self) -> Op:
        raise LossyError("rounding to another type cannot be undone")


class ResamplePositions(NamedTuple):
    """Resamples a table [1 + n*n, width] of a class token and a square grid of positions to another grid.

    Bicubic and antialiased, as DeepSeek-OCR and the papers it follows do it; the class token is kept.
    """

    grid: int

    def one(self, value: LazyTensor) -> LazyTensor:
        positions = value.shape[_axis(value, 0)] - 1
        if self.grid > LARGEST_GRID:
            raise ValueError(f"cannot resample to a grid of {self.grid}: larger than {LARGEST_GRID}")
        if len(value.shape) != 2 or positions < 1 or math.isqrt(positions) ** 2 != positions:
            raise ValueError(f"cannot resample shape {list(value.shape)}: not a class token and a square grid")
        if positions == self.grid**2:
            return value
        return Resample(value.dtype, (1 + self.grid**2, value.shape[1]), value, self.grid)

    def inverse(self) -> Op:
        raise LossyError("resampling cannot be undone")


Op = Fuse | Split | Squeeze | Unsqueeze | Reshaped | Permuted | Deinterleave | Reorder | CastTo | ResamplePositions


def apply_op(op: Op, values: Values) -> Values:
    """The operation applied to the tensors of one rule; ValueError where their shapes or types do not allow it."""
    if isinstance(op, Fuse | Split):
        return op.apply(values)
    return tuple(op.one(value) for value in values)


def lossy_reason(op: Op) -> str:
    """Why the operation cannot be undone, or nothing if it can."""
    try:
        op.inverse()
    except LossyError as error:
        return str(error)
    return ""


def _axis(value: LazyTensor, dim: int) -> int:
    if dim >= len(value.shape):
        raise ValueError(f"shape {list(value.shape)} has no dimension {dim}")
    return dim

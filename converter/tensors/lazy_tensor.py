"""What an output tensor is made of: a small expression over the source's tensors, with its shape and dtype known.

Two readers exist: `extents` says which bytes to copy, where copying is all there is to do; `converter.tensors.evaluate`
evaluates everything else with torch.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from converter.storage.byte_range import ByteRange, Segment, cut
from converter.tensors.dtypes import INT64, DType
from converter.tensors.tensor_info import TensorInfo


class Read(NamedTuple):
    """A tensor of the source as it is."""

    dtype: DType
    shape: tuple[int, ...]
    tensor: TensorInfo


class Concat(NamedTuple):
    """`parts` one after another along `dim`."""

    dtype: DType
    shape: tuple[int, ...]
    parts: tuple[LazyTensor, ...]
    dim: int


class Slice(NamedTuple):
    """`of[start:start + shape[dim]]` along `dim`."""

    dtype: DType
    shape: tuple[int, ...]
    of: LazyTensor
    dim: int
    start: int


class Reshape(NamedTuple):
    """The same elements in the same order under another shape."""

    dtype: DType
    shape: tuple[int, ...]
    of: LazyTensor


class Permute(NamedTuple):
    """Dimension i of the result is dimension `dims[i]` of `of`."""

    dtype: DType
    shape: tuple[int, ...]
    of: LazyTensor
    dims: tuple[int, ...]


class Cast(NamedTuple):
    """The values rounded to another element type."""

    dtype: DType
    shape: tuple[int, ...]
    of: LazyTensor


class Resample(NamedTuple):
    """A table of position embeddings resampled to a grid of `grid` x `grid`, its class token kept."""

    dtype: DType
    shape: tuple[int, ...]
    of: LazyTensor
    grid: int


class Generated(NamedTuple):
    """What no source holds: `make` gives the bytes, little-endian and row-major, once they are wanted."""

    dtype: DType
    shape: tuple[int, ...]
    make: Callable[[], bytes]


# Named tuples, here and elsewhere in this package: frozen like a frozen dataclass, and made in a seventh of its time,
# which for forty classes is 20 ms of every start.
LazyTensor = Read | Concat | Slice | Reshape | Permute | Cast | Resample | Generated


def nbytes(expr: LazyTensor) -> int:
    """Bytes of the tensor's data."""
    return math.prod(expr.shape) * expr.dtype.itemsize


def lazy_read(tensor: TensorInfo) -> LazyTensor:
    """The expression for a tensor of the source."""
    return Read(tensor.dtype, tensor.shape, tensor)


def arange(shape: tuple[int, ...]) -> LazyTensor:
    """0, 1, 2, ... as int64."""
    count = math.prod(shape)
    return Generated(INT64, shape, lambda: struct.pack(f"<{count}q", *range(count)))


def source_tensors(expr: LazyTensor) -> Iterator[TensorInfo]:
    """The source tensors an expression reads, in order."""
    match expr:
        case Read(tensor=tensor):
            yield tensor
        case Concat(parts=parts):
            for part in parts:
                yield from source_tensors(part)
        case Slice(of=of) | Reshape(of=of) | Permute(of=of) | Cast(of=of) | Resample(of=of):
            yield from source_tensors(of)


def concatenated(parts: tuple[LazyTensor, ...], dim: int) -> LazyTensor:
    """A concatenation of tensors that agree in all other dimensions; of all slices of one tensor, that tensor."""
    size = sum(part.shape[dim] for part in parts)
    first = parts[0]
    if isinstance(first, Slice) and first.of.shape[dim] == size and _follow(parts, first.of, dim):
        return first.of
    return Concat(first.dtype, (*first.shape[:dim], size, *first.shape[dim + 1 :]), parts, dim)


def _follow(parts: tuple[LazyTensor, ...], of: LazyTensor, dim: int) -> bool:
    """Whether `parts` are slices of one tensor, each from where the one before it ended."""
    at = 0
    for part in parts:
        if not isinstance(part, Slice) or part.of is not of or (part.dim, part.start) != (dim, at):
            return False
        at += part.shape[dim]
    return True


def sliced(of: LazyTensor, dim: int, start: int, size: int) -> LazyTensor:
    """A slice; of a concatenation along the same dimension that it is one part of, that part."""
    if isinstance(of, Concat) and of.dim == dim:
        at = 0
        for part in of.parts:
            if (at, part.shape[dim]) == (start, size):
                return part
            at += part.shape[dim]
    return Slice(of.dtype, (*of.shape[:dim], size, *of.shape[dim + 1 :]), of, dim, start)


def reshaped(of: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    """A reshape; one that undoes another vanishes."""
    if isinstance(of, Reshape):
        of = of.of
    return of if of.shape == shape else Reshape(of.dtype, shape, of)


def permuted(of: LazyTensor, dims: tuple[int, ...]) -> LazyTensor:
    """A permutation; one that undoes another vanishes."""
    if isinstance(of, Permute) and tuple(of.dims[dim] for dim in dims) == tuple(range(len(dims))):
        return of.of
    return Permute(of.dtype, tuple(of.shape[dim] for dim in dims), of, dims)


def byte_ranges(expr: LazyTensor) -> list[Segment] | None:
    """The bytes that make up the tensor, in order, or None where it takes more than copying."""
    match expr:
        case Read(tensor=tensor):
            return [ByteRange(tensor.storage, tensor.start, tensor.nbytes)] if tensor.verbatim else None
        case Reshape(of=of):
            return byte_ranges(of)
        case Concat(parts=parts, dim=0):
            found = [byte_ranges(part) for part in parts]
            return None if None in found else [segment for part in found for segment in part or ()]
        case Slice(of=of, dim=0, start=start):
            row = nbytes(of) // max(of.shape[0], 1)
            whole = byte_ranges(of)
            return None if whole is None else cut(whole, start * row, nbytes(expr))
        case Generated(make=make):
            return [make()]
    return None

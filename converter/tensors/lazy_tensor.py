"""Lazy tensors: expressions over the tensors of a checkpoint, with known shape and dtype.

`byte_ranges` lists the bytes of a lazy tensor that can be copied. `converter.tensors.evaluate` computes all others with
torch.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from converter.storage.byte_range import ByteRange, Segment, cut
from converter.tensors.dtypes import BY_NAME, INT64, DType
from converter.tensors.tensor_info import TensorInfo

# Positions along a side of the largest grid: 8192 pixels in CLIP-L's patches of 14, 1.4 GB of embeddings in memory.
LARGEST_GRID = 585


@dataclass(frozen=True, slots=True)
class Read:
    """A tensor of the checkpoint, unchanged."""

    dtype: DType
    shape: tuple[int, ...]
    tensor: TensorInfo


@dataclass(frozen=True, slots=True)
class Concat:
    """`parts` concatenated along `dim`."""

    dtype: DType
    shape: tuple[int, ...]
    parts: tuple[LazyTensor, ...]
    dim: int


@dataclass(frozen=True, slots=True)
class Slice:
    """`of[start:start + shape[dim]]` along `dim`."""

    dtype: DType
    shape: tuple[int, ...]
    of: LazyTensor
    dim: int
    start: int


@dataclass(frozen=True, slots=True)
class Reshape:
    """The same elements in the same order in another shape."""

    dtype: DType
    shape: tuple[int, ...]
    of: LazyTensor


@dataclass(frozen=True, slots=True)
class Permute:
    """Dimension i of the result is dimension `dims[i]` of `of`."""

    dtype: DType
    shape: tuple[int, ...]
    of: LazyTensor
    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cast:
    """The values rounded to another dtype."""

    dtype: DType
    shape: tuple[int, ...]
    of: LazyTensor


@dataclass(frozen=True, slots=True)
class Resample:
    """Position embeddings resampled to a grid of `grid` x `grid` positions; the class token is kept."""

    dtype: DType
    shape: tuple[int, ...]
    of: LazyTensor
    grid: int


@dataclass(frozen=True, slots=True)
class Generated:
    """A tensor that no checkpoint contains; `make` returns its bytes, little-endian and row-major."""

    dtype: DType
    shape: tuple[int, ...]
    make: Callable[[], bytes]


LazyTensor = Read | Concat | Slice | Reshape | Permute | Cast | Resample | Generated


def nbytes(expr: LazyTensor) -> int:
    """Size of the tensor's data in bytes."""
    return math.prod(expr.shape) * expr.dtype.itemsize


def lazy_read(tensor: TensorInfo) -> LazyTensor:
    """The lazy tensor for a tensor of a checkpoint."""
    return Read(tensor.dtype, tensor.shape, tensor)


def arange(shape: tuple[int, ...]) -> LazyTensor:
    """A tensor of 0, 1, 2, ... as int64."""
    count = math.prod(shape)
    return Generated(INT64, shape, lambda: struct.pack(f"<{count}q", *range(count)))


def source_tensors(expr: LazyTensor) -> Iterator[TensorInfo]:
    """Yield the checkpoint tensors that an expression reads, in order."""
    match expr:
        case Read(tensor=tensor):
            yield tensor
        case Concat(parts=parts):
            for part in parts:
                yield from source_tensors(part)
        case Slice(of=of) | Reshape(of=of) | Permute(of=of) | Cast(of=of) | Resample(of=of):
            yield from source_tensors(of)


def concatenated(parts: tuple[LazyTensor, ...], dim: int) -> LazyTensor:
    """Concatenate tensors; consecutive slices that cover one tensor give that tensor.

    Args:
        parts: Tensors of one dtype, equal in all dimensions but `dim`.
        dim: The dimension to concatenate along.
    """
    size = sum(part.shape[dim] for part in parts)
    first = parts[0]
    if isinstance(first, Slice) and first.of.shape[dim] == size and _follow(parts, first.of, dim):
        return first.of
    return Concat(first.dtype, (*first.shape[:dim], size, *first.shape[dim + 1 :]), parts, dim)


def _follow(parts: tuple[LazyTensor, ...], of: LazyTensor, dim: int) -> bool:
    """Whether `parts` are consecutive slices of the tensor `of`, starting at 0."""
    at = 0
    for part in parts:
        if not isinstance(part, Slice) or part.of is not of or (part.dim, part.start) != (dim, at):
            return False
        at += part.shape[dim]
    return True


def sliced(of: LazyTensor, dim: int, start: int, size: int) -> LazyTensor:
    """Slice a tensor; a slice that is one part of a concatenation gives that part.

    Args:
        of: The tensor to slice.
        dim: The dimension to slice along.
        start: Index of the first element along `dim`.
        size: Number of elements along `dim`.
    """
    if isinstance(of, Concat) and of.dim == dim:
        at = 0
        for part in of.parts:
            if (at, part.shape[dim]) == (start, size):
                return part
            at += part.shape[dim]
    return Slice(of.dtype, (*of.shape[:dim], size, *of.shape[dim + 1 :]), of, dim, start)


def reshaped(of: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    """Reshape a tensor; a reshape back to the original shape gives the original."""
    if isinstance(of, Reshape):
        of = of.of
    return of if of.shape == shape else Reshape(of.dtype, shape, of)


def permuted(of: LazyTensor, dims: tuple[int, ...]) -> LazyTensor:
    """Permute dimensions; the inverse of a permutation gives the original."""
    if isinstance(of, Permute) and tuple(of.dims[dim] for dim in dims) == tuple(range(len(dims))):
        return of.of
    return Permute(of.dtype, tuple(of.shape[dim] for dim in dims), of, dims)


def cast(of: LazyTensor, dtype: str) -> LazyTensor:
    """Cast a floating-point tensor; ValueError for other types."""
    if not of.dtype.is_float:
        raise ValueError(f"cannot cast {of.dtype.name} to {dtype}")
    return of if of.dtype.name == dtype else Cast(BY_NAME[dtype], of.shape, of)


def resampled(of: LazyTensor, grid: int) -> LazyTensor:
    """Resample position embeddings [1 + n*n, width], the first row a class token, to [1 + grid*grid, width].

    ValueError for other shapes, or a grid above LARGEST_GRID.
    """
    if grid > LARGEST_GRID:
        raise ValueError(f"cannot resample to a grid of {grid}: larger than {LARGEST_GRID}")
    positions = of.shape[0] - 1 if len(of.shape) == 2 else 0
    if positions < 1 or math.isqrt(positions) ** 2 != positions:
        raise ValueError(f"cannot resample shape {list(of.shape)}: not a class token and a square grid")
    return of if positions == grid**2 else Resample(of.dtype, (1 + grid**2, of.shape[1]), of, grid)


def byte_ranges(expr: LazyTensor) -> list[Segment] | None:
    """The byte ranges that make up the tensor, in order, or None if it must be computed."""
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

"""What an output tensor is made of: a small expression over the source's tensors, with its shape and dtype known.

Two readers exist: `extents` says which bytes to copy, where copying is all there is to do; `converter.compute`
evaluates everything else with torch.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from converter.checkpoint import Storage, Tensor
from converter.dtypes import INT64, DType


class Extent(NamedTuple):
    """`length` bytes from byte `start` of a storage's data, to be copied verbatim."""

    storage: Storage
    start: int
    length: int


# Bytes to write: from a file, or made up (position_ids, an untrained compressor).
Piece = Extent | bytes


class Read(NamedTuple):
    """A tensor of the source as it is."""

    dtype: DType
    shape: tuple[int, ...]
    tensor: Tensor


class Concat(NamedTuple):
    """`parts` one after another along `dim`."""

    dtype: DType
    shape: tuple[int, ...]
    parts: tuple[Expr, ...]
    dim: int


class Slice(NamedTuple):
    """`of[start:start + shape[dim]]` along `dim`."""

    dtype: DType
    shape: tuple[int, ...]
    of: Expr
    dim: int
    start: int


class Reshape(NamedTuple):
    """The same elements in the same order under another shape."""

    dtype: DType
    shape: tuple[int, ...]
    of: Expr


class Permute(NamedTuple):
    """Dimension i of the result is dimension `dims[i]` of `of`."""

    dtype: DType
    shape: tuple[int, ...]
    of: Expr
    dims: tuple[int, ...]


class Cast(NamedTuple):
    """The values rounded to another element type."""

    dtype: DType
    shape: tuple[int, ...]
    of: Expr


class Resample(NamedTuple):
    """A table of position embeddings resampled to a grid of `grid` x `grid`, its class token kept."""

    dtype: DType
    shape: tuple[int, ...]
    of: Expr
    grid: int


class Made(NamedTuple):
    """What no source holds: `make` gives the bytes, little-endian and row-major, once they are wanted."""

    dtype: DType
    shape: tuple[int, ...]
    make: Callable[[], bytes]


# Named tuples, here and elsewhere in this package: frozen like a frozen dataclass, and made in a seventh of its time,
# which for forty classes is 20 ms of every start.
Expr = Read | Concat | Slice | Reshape | Permute | Cast | Resample | Made


def nbytes(expr: Expr) -> int:
    """Bytes of the tensor's data."""
    return math.prod(expr.shape) * expr.dtype.itemsize


def read(tensor: Tensor) -> Expr:
    """The expression for a tensor of the source."""
    return Read(tensor.dtype, tensor.shape, tensor)


def arange(shape: tuple[int, ...]) -> Expr:
    """0, 1, 2, ... as int64."""
    count = math.prod(shape)
    return Made(INT64, shape, lambda: struct.pack(f"<{count}q", *range(count)))


def sources(expr: Expr) -> Iterator[Tensor]:
    """The source tensors an expression reads, in order."""
    match expr:
        case Read(tensor=tensor):
            yield tensor
        case Concat(parts=parts):
            for part in parts:
                yield from sources(part)
        case Slice(of=of) | Reshape(of=of) | Permute(of=of) | Cast(of=of) | Resample(of=of):
            yield from sources(of)


def joined(parts: tuple[Expr, ...], dim: int) -> Expr:
    """A concatenation of tensors that agree in all other dimensions; of all slices of one tensor, that tensor."""
    size = sum(part.shape[dim] for part in parts)
    first = parts[0]
    if isinstance(first, Slice) and first.of.shape[dim] == size and _follow(parts, first.of, dim):
        return first.of
    return Concat(first.dtype, (*first.shape[:dim], size, *first.shape[dim + 1 :]), parts, dim)


def _follow(parts: tuple[Expr, ...], of: Expr, dim: int) -> bool:
    """Whether `parts` are slices of one tensor, each from where the one before it ended."""
    at = 0
    for part in parts:
        if not isinstance(part, Slice) or part.of is not of or (part.dim, part.start) != (dim, at):
            return False
        at += part.shape[dim]
    return True


def sliced(of: Expr, dim: int, start: int, size: int) -> Expr:
    """A slice; of a concatenation along the same dimension that it is one part of, that part."""
    if isinstance(of, Concat) and of.dim == dim:
        at = 0
        for part in of.parts:
            if (at, part.shape[dim]) == (start, size):
                return part
            at += part.shape[dim]
    return Slice(of.dtype, (*of.shape[:dim], size, *of.shape[dim + 1 :]), of, dim, start)


def reshaped(of: Expr, shape: tuple[int, ...]) -> Expr:
    """A reshape; one that undoes another vanishes."""
    if isinstance(of, Reshape):
        of = of.of
    return of if of.shape == shape else Reshape(of.dtype, shape, of)


def permuted(of: Expr, dims: tuple[int, ...]) -> Expr:
    """A permutation; one that undoes another vanishes."""
    if isinstance(of, Permute) and tuple(of.dims[dim] for dim in dims) == tuple(range(len(dims))):
        return of.of
    return Permute(of.dtype, tuple(of.shape[dim] for dim in dims), of, dims)


def extents(expr: Expr) -> list[Piece] | None:
    """The bytes that make up the tensor, in order, or None where it takes more than copying."""
    match expr:
        case Read(tensor=tensor):
            return [Extent(tensor.storage, tensor.start, tensor.nbytes)] if tensor.verbatim else None
        case Reshape(of=of):
            return extents(of)
        case Concat(parts=parts, dim=0):
            found = [extents(part) for part in parts]
            return None if None in found else [piece for part in found for piece in part or ()]
        case Slice(of=of, dim=0, start=start):
            row = nbytes(of) // max(of.shape[0], 1)
            whole = extents(of)
            return None if whole is None else _cut(whole, start * row, nbytes(expr))
        case Made(make=make):
            return [make()]
    return None


def _cut(pieces: list[Piece], start: int, length: int) -> list[Piece]:
    """The part of `pieces`, laid end to end, from byte `start` on."""
    result: list[Piece] = []
    for piece in pieces:
        size = len(piece) if isinstance(piece, bytes) else piece.length
        first, last = max(start, 0), min(start + length, size)
        if first < last:
            if isinstance(piece, bytes):
                result.append(piece[first:last])
            else:
                result.append(Extent(piece.storage, piece.start + first, last - first))
        start -= size
    return result


def merge(pieces: list[Piece]) -> list[Piece]:
    """The same bytes in as few extents as possible: neighbours in one storage, or in one file without checksums."""
    result: list[Piece] = []
    for piece in pieces:
        both = _both(result[-1], piece) if result else None
        if both is None:
            result.append(piece)
        else:
            result[-1] = both
    return result


def _both(a: Piece, b: Piece) -> Extent | None:
    """The extent that begins with one and ends with the other, if there is one."""
    if isinstance(a, bytes) or isinstance(b, bytes):
        return None
    if a.storage is b.storage and a.start + a.length == b.start:
        return Extent(a.storage, a.start, a.length + b.length)
    if a.storage.file is not b.storage.file or a.storage.crc32 is not None or b.storage.crc32 is not None:
        return None
    adjacent = a.storage.offset + a.start + a.length == b.storage.offset + b.start
    return Extent(a.storage, a.start, a.length + b.length) if adjacent else None

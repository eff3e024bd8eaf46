"""Tensors' values read, and what is asked of them before they are compared: checksums, and sums."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import product
from typing import NamedTuple

import torch
from isal import isal_zlib

from converter.checkpoint import crc_error
from converter.compute import evaluate, raw
from converter.mapping.expr import Expr, Extent, extents, merge, nbytes

# Elements are compared as integers: a NaN equals itself, and 0.0 is not -0.0.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Into so many a tensor may be cut: q, k and v of each of 21 heads.
_MOST_PARTS = 64
# Elements summed at a time.
_SUMMED = 1 << 20

# Type, number of elements and CRC-32.
Checksum = tuple[str, int, int]


class Sum(NamedTuple):
    """What does not change when a tensor's elements change places."""

    dtype: str
    size: int
    total: int


def checksum(value: Expr) -> Checksum:
    """A tensor's checksum: the file's own where it has one, which saves reading the tensor."""
    crc = _stored(value)
    return value.dtype.name, math.prod(value.shape), isal_zlib.crc32(raw(load(value))) if crc is None else crc


def load(value: Expr) -> torch.Tensor:
    """A tensor's elements as integers, in its shape."""
    integers = _INTEGERS[value.dtype.itemsize]
    pieces = extents(value)
    if pieces is None:
        return evaluate(value).contiguous().view(integers)
    data, at = bytearray(nbytes(value)), 0
    for piece in merge(pieces):
        view = memoryview(data)[at:]
        if isinstance(piece, Extent):
            _read(piece, view[: piece.length])
            at += piece.length
        else:
            view[: len(piece)] = piece
            at += len(piece)
    return torch.frombuffer(data, dtype=integers).reshape(value.shape) if data else torch.empty(value.shape)


def _read(extent: Extent, into: memoryview) -> None:
    """Read an extent, checked where it is all that the file has a checksum for."""
    storage, start, length = extent
    storage.file.readinto(into, storage.offset + start)
    if storage.crc32 is not None and length == storage.length and isal_zlib.crc32(into) != storage.crc32:
        raise crc_error(storage)


def _stored(value: Expr) -> int | None:
    """The checksum that a file gives for a tensor's bytes, if it gives one."""
    pieces = extents(value)
    if pieces is not None and len(pieces) == 1 and isinstance(pieces[0], Extent):
        storage, _, length = pieces[0]
        return storage.crc32 if length == storage.length else None
    return None


def sum_of(tensor: torch.Tensor, value: Expr) -> Sum:
    """The sum of elements that are `value`'s, or some of them."""
    # A part at a time: torch widens all that it sums at once.
    flat, total = tensor.reshape(-1), 0
    for start in range(0, tensor.numel(), _SUMMED):
        total += int(flat[start : start + _SUMMED].sum(dtype=torch.int64))
    return Sum(value.dtype.name, tensor.numel(), total)


def equal(a: Expr, b: Expr) -> bool:
    """Whether two tensors have the same type, shape and bytes."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return a == b or torch.equal(load(a), load(b))


def cuts(value: Expr, counts: Iterable[int]) -> Iterator[tuple[int, tuple[torch.Tensor, ...]]]:
    """A tensor cut into equal parts of one of `counts` elements, along each dimension where that is possible."""
    tensor = load(value)
    for count, dim in product(sorted(counts, reverse=True), range(tensor.dim())):
        if count < tensor.numel() and divides(count, tensor.numel()):
            number = tensor.numel() // count
            if tensor.shape[dim] % number == 0:
                yield dim, tensor.chunk(number, dim)


def divides(part: int, whole: int) -> bool:
    """Whether so many elements are one of at most so many equal parts."""
    return 0 < part <= whole <= part * _MOST_PARTS and whole % part == 0

"""Measures how far tensors have moved, with torch, in pieces of constant size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from converter.comparison.difference import Figures
from converter.comparison.streams import ByteReader, Pairs, Stream
from converter.tensors.evaluate import bit_view, torch_dtype
from converter.tensors.lazy_tensor import LazyTensor

# Elements in one piece: they fit into the processor's cache.
_MAX_ELEMENTS = 1 << 15


def measure(pairs: Pairs, count: Callable[[int], None]) -> dict[str, Figures]:
    """Measure each pair; the tensors of a pair must have the same shape.

    Elements of the same type are compared by their bits, so a NaN equals itself; elements of different types by value.

    Args:
        pairs: The tensors by name.
        count: Called with the number of bytes of A that were measured.
    """
    found: dict[str, Figures] = {}
    left, right = Stream(a for a, _ in pairs.values()), Stream(b for _, b in pairs.values())
    with one_thread(), left, right:
        readers = ByteReader(left), ByteReader(right)
        for name, (a, b) in pairs.items():
            found[name] = Figures()
            for size in piece_sizes(a):
                part = _figures(elements(readers[0], a, size), elements(readers[1], b, size))
                found[name] = found[name].plus(part)
                count(size * a.dtype.itemsize)
    return found


def piece_sizes(tensor: LazyTensor) -> Iterator[int]:
    """Yield the number of elements of each piece of a tensor."""
    num_elements = math.prod(tensor.shape)
    for start in range(0, num_elements, _MAX_ELEMENTS):
        yield min(_MAX_ELEMENTS, num_elements - start)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: on a busy machine, several take six times as long for such small pieces."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def elements(reader: ByteReader, value: LazyTensor, count: int) -> torch.Tensor:
    """Read the next `count` elements of a tensor.

    Args:
        reader: Reads the bytes of the tensor.
        value: The tensor, for its type.
        count: The number of elements.
    """
    return torch.frombuffer(reader.take(count * value.dtype.itemsize), dtype=torch_dtype(value.dtype.name))


def _figures(a: torch.Tensor, b: torch.Tensor) -> Figures:
    same, x, y = _same(a, b), a.double(), b.double()
    # NaN and infinity in both are equal, and would make all sums meaningless.
    if not (x.sum() + y.sum()).isfinite():
        shared = same & ~x.isfinite()
        x, y = x.masked_fill(shared, 0), y.masked_fill(shared, 0)
    difference = x - y
    sums = (float(p.dot(q)) for p, q in ((difference, difference), (x, x), (y, y), (x, y)))
    return Figures(int((~same).sum()), float(difference.abs().max()), *sums)


def _same(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.dtype == b.dtype:
        return bit_view(a) == bit_view(b)
    x, y = a.double(), b.double()
    return (x == y) | (x.isnan() & y.isnan())

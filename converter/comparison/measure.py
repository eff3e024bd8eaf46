"""Measures tensors with torch, in pieces of constant size: their values, how far they have moved, and in what rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from converter.comparison.difference import Figures
from converter.comparison.streams import ByteReader, Pairs, Stream
from converter.tensors.evaluate import bit_view, torch_dtype
from converter.tensors.lazy_tensor import LazyTensor, byte_ranges, sliced

# Elements in one piece: they fit into the processor's cache.
_MAX_ELEMENTS = 1 << 15
# Rows of a matrix that are read for its rank, evenly spaced: ranks up to half of them are found.
_MAX_ROWS = 256
_MAX_COLUMNS = 1 << 16


@dataclass(frozen=True, slots=True)
class Values:
    """Statistics of the values of a tensor, or of several.

    Attributes:
        finite: The number of finite values.
        non_finite: The number of values that are NaN or infinite.
        minimum: The smallest finite value; infinity if there is none.
        maximum: The largest finite value; minus infinity if there is none.
        mean: The mean of the finite values; 0 if there is none.
    """

    finite: int = 0
    non_finite: int = 0
    minimum: float = math.inf
    maximum: float = -math.inf
    mean: float = 0.0

    def plus(self, other: Values) -> Values:
        """Return the statistics of both together."""
        finite = self.finite + other.finite
        return Values(
            finite=finite,
            non_finite=self.non_finite + other.non_finite,
            minimum=min(self.minimum, other.minimum),
            maximum=max(self.maximum, other.maximum),
            mean=(self.mean * self.finite + other.mean * other.finite) / max(finite, 1),
        )


def measure_values(tensors: Mapping[str, LazyTensor], count: Callable[[int], None]) -> dict[str, Values]:
    """Measure the values of each tensor of real numbers; `count` is called with the number of bytes measured."""
    found = {name: Values() for name in tensors}
    with _one_thread(), Stream(tensors.values()) as stream:
        reader = ByteReader(stream)
        for name, tensor in tensors.items():
            for size in _piece_sizes(tensor):
                found[name] = found[name].plus(_values(_elements(reader, tensor, size)))
                count(size * tensor.dtype.itemsize)
    return found


def measure(pairs: Pairs, count: Callable[[int], None]) -> dict[str, Figures]:
    """Measure the difference of each pair; the tensors of a pair must have the same shape.

    Elements of the same type are compared by their bits, so a NaN equals itself; elements of different types by value.

    Args:
        pairs: The tensors by name.
        count: Called with the number of bytes of A that were measured.
    """
    found = {name: Figures() for name in pairs}
    left, right = Stream(a for a, _ in pairs.values()), Stream(b for _, b in pairs.values())
    with _one_thread(), left, right:
        readers = ByteReader(left), ByteReader(right)
        for name, (a, b) in pairs.items():
            for size in _piece_sizes(a):
                found[name] = found[name].plus(_figures(_elements(readers[0], a, size), _elements(readers[1], b, size)))
                count(size * a.dtype.itemsize)
    return found


def _piece_sizes(tensor: LazyTensor) -> Iterator[int]:
    num_elements = math.prod(tensor.shape)
    for start in range(0, num_elements, _MAX_ELEMENTS):
        yield min(_MAX_ELEMENTS, num_elements - start)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread: on a busy machine, several take six times as long for such small pieces."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _elements(reader: ByteReader, value: LazyTensor, count: int) -> torch.Tensor:
    return torch.frombuffer(reader.read(count * value.dtype.itemsize), dtype=torch_dtype(value.dtype.name))


def _values(piece: torch.Tensor) -> Values:
    numbers = finite = piece.double()
    if not numbers.sum().isfinite():
        finite = numbers[numbers.isfinite()]
    if not finite.numel():
        return Values(non_finite=numbers.numel())
    lowest, highest = map(float, finite.aminmax())
    return Values(finite.numel(), numbers.numel() - finite.numel(), lowest, highest, float(finite.mean()))


def _figures(a: torch.Tensor, b: torch.Tensor) -> Figures:
    x, y = a.double(), b.double()
    same = bit_view(a) == bit_view(b) if a.dtype == b.dtype else (x == y) | (x.isnan() & y.isnan())
    # NaN and infinity in both are equal, and would make all sums meaningless.
    if not (x.sum() + y.sum()).isfinite():
        shared = same & ~x.isfinite()
        x, y = x.masked_fill(shared, 0), y.masked_fill(shared, 0)
    difference = x - y
    sums = (float(p.dot(q)) for p, q in ((difference, difference), (x, x), (y, y), (x, y)))
    return Figures(int((~same).sum()), float(difference.abs().max()), *sums)


def difference_rank(a: LazyTensor, b: LazyTensor) -> int | None:
    """Return the rank of B - A, without what rounding alone adds: a merged LoRA adapter has a low one.

    Returns:
        None for tensors that are no matrices of numbers, and for a rank of more than half of the sampled rows or of the
        columns: the difference of a full fine-tune.
    """
    if len(a.shape) != 2 or a.shape != b.shape or not 0 < a.shape[1] <= _MAX_COLUMNS:
        return None
    if not all(value.dtype.is_float and value.dtype.bits >= 16 for value in (a, b)):
        return None
    before, after = _some_rows(a), _some_rows(b)
    if before is None or after is None or not (before.isfinite().all() and after.isfinite().all()):
        return None
    difference = after - before
    squares = torch.linalg.eigvalsh(difference @ difference.T).clamp(min=0)
    eps = max(torch.finfo(torch_dtype(value.dtype.name)).eps for value in (a, b))
    # The largest singular value of a matrix of independent roundings of the elements.
    rows, columns = difference.shape
    noise = eps * float(after.square().mean().sqrt()) * (rows**0.5 + columns**0.5)
    rank = int((squares.sqrt() > noise).sum())
    return rank if 0 < 2 * rank <= min(rows, columns) else None


def _some_rows(value: LazyTensor) -> torch.Tensor | None:
    """Read some rows of a matrix in float64; None if they must be computed."""
    num_rows, columns = value.shape
    number = min(num_rows, _MAX_ROWS)
    data = bytearray()
    for index in range(number):
        ranges = byte_ranges(sliced(value, 0, index * num_rows // number, 1))
        if ranges is None:
            return None
        for part in ranges:
            data += part if isinstance(part, bytes) else part.read()
    return torch.frombuffer(data, dtype=torch_dtype(value.dtype.name)).reshape(number, columns).double()

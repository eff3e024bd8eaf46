"""Measures values and differences of tensors with torch, in chunks of constant size, and the rank of differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from converter.comparison.difference import PairStatistics
from converter.comparison.streams import ByteReader, Pairs, Stream
from converter.tensors.evaluate import bit_view, torch_dtype
from converter.tensors.lazy_tensor import LazyTensor, byte_ranges, sliced

# The number of elements in a chunk, which fits into the processor's cache.
_CHUNK_ELEMENTS = 1 << 15
# The number of evenly spaced rows that are read to find the rank of a matrix, which may be up to half of it.
_MAX_ROWS = 256
_MAX_COLUMNS = 1 << 16


@dataclass(frozen=True, slots=True)
class Values:
    """Statistics of the values of one or several tensors.

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


def measure_values(tensors: Mapping[str, LazyTensor], on_bytes: Callable[[int], None]) -> dict[str, Values]:
    """Measure the values of tensors of real numbers; `on_bytes` is called with the number of bytes measured."""
    results = {name: Values() for name in tensors}
    with _one_thread(), Stream(tensors.values()) as stream:
        reader = ByteReader(stream)
        for name, tensor in tensors.items():
            for num_elements in _chunk_sizes(tensor):
                results[name] = results[name].plus(_values(_read_chunk(reader, tensor, num_elements)))
                on_bytes(num_elements * tensor.dtype.itemsize)
    return results


def measure_differences(pairs: Pairs, on_bytes: Callable[[int], None]) -> dict[str, PairStatistics]:
    """Measure the difference of each pair of tensors, which must have the same shape.

    Elements of the same type are compared by bits, so a NaN equals itself; elements of different types by value.

    Args:
        pairs: The tensors by name.
        on_bytes: Called with the number of bytes of A that were measured.
    """
    results = {name: PairStatistics() for name in pairs}
    stream_a, stream_b = Stream(a for a, _ in pairs.values()), Stream(b for _, b in pairs.values())
    with _one_thread(), stream_a, stream_b:
        reader_a, reader_b = ByteReader(stream_a), ByteReader(stream_b)
        for name, (a, b) in pairs.items():
            for num_elements in _chunk_sizes(a):
                chunk_a, chunk_b = _read_chunk(reader_a, a, num_elements), _read_chunk(reader_b, b, num_elements)
                results[name] = results[name].plus(_pair_statistics(chunk_a, chunk_b))
                on_bytes(num_elements * a.dtype.itemsize)
    return results


def _chunk_sizes(tensor: LazyTensor) -> Iterator[int]:
    num_elements = math.prod(tensor.shape)
    for start in range(0, num_elements, _CHUNK_ELEMENTS):
        yield min(_CHUNK_ELEMENTS, num_elements - start)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread: on a busy machine, several threads take six times as long for small chunks."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _read_chunk(reader: ByteReader, value: LazyTensor, num_elements: int) -> torch.Tensor:
    return torch.frombuffer(reader.read(num_elements * value.dtype.itemsize), dtype=torch_dtype(value.dtype.name))


def _values(chunk: torch.Tensor) -> Values:
    numbers = finite = chunk.double()
    if not numbers.sum().isfinite():
        finite = numbers[numbers.isfinite()]
    if not finite.numel():
        return Values(non_finite=numbers.numel())
    lowest, highest = map(float, finite.aminmax())
    return Values(finite.numel(), numbers.numel() - finite.numel(), lowest, highest, float(finite.mean()))


def _pair_statistics(a: torch.Tensor, b: torch.Tensor) -> PairStatistics:
    x, y = a.double(), b.double()
    same = bit_view(a) == bit_view(b) if a.dtype == b.dtype else (x == y) | (x.isnan() & y.isnan())
    # Elements that are NaN or infinite in both are equal, but would make all sums NaN.
    if not (x.sum() + y.sum()).isfinite():
        shared = same & ~x.isfinite()
        x, y = x.masked_fill(shared, 0), y.masked_fill(shared, 0)
    difference = x - y
    sums = float(difference.dot(difference)), float(x.dot(x)), float(y.dot(y)), float(x.dot(y))
    return PairStatistics(int((~same).sum()), float(difference.abs().max()), *sums)


def difference_rank(a: LazyTensor, b: LazyTensor) -> int | None:
    """Return the rank of B - A, without the effect of rounding. It is low if a LoRA adapter was merged into A.

    Returns:
        None for tensors that are not matrices of real numbers, and for a rank of more than half of the sampled rows or
        of the columns, as after full fine-tuning.
    """
    if len(a.shape) != 2 or a.shape != b.shape or not 0 < a.shape[1] <= _MAX_COLUMNS:
        return None
    if not all(value.dtype.is_float and value.dtype.bits >= 16 for value in (a, b)):
        return None
    before, after = _sample_rows(a), _sample_rows(b)
    if before is None or after is None or not (before.isfinite().all() and after.isfinite().all()):
        return None
    difference = after - before
    singular_values = torch.linalg.eigvalsh(difference @ difference.T).clamp(min=0).sqrt()
    eps = max(torch.finfo(torch_dtype(value.dtype.name)).eps for value in (a, b))
    # The largest singular value of a matrix of independent rounding errors.
    rows, columns = difference.shape
    noise = eps * float(after.square().mean().sqrt()) * (rows**0.5 + columns**0.5)
    rank = int((singular_values > noise).sum())
    return rank if 0 < 2 * rank <= min(rows, columns) else None


def _sample_rows(value: LazyTensor) -> torch.Tensor | None:
    """Read evenly spaced rows of a matrix as float64; None if they are computed, not stored."""
    num_rows, num_columns = value.shape
    num_samples = min(num_rows, _MAX_ROWS)
    data = bytearray()
    for index in range(num_samples):
        ranges = byte_ranges(sliced(value, 0, index * num_rows // num_samples, 1))
        if ranges is None:
            return None
        for part in ranges:
            data += part if isinstance(part, bytes) else part.read()
    return torch.frombuffer(data, dtype=torch_dtype(value.dtype.name)).reshape(num_samples, num_columns).double()

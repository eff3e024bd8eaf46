"""The range of a tensor's values, measured with torch in pieces of constant size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from converter.comparison.measure import elements, one_thread, piece_sizes
from converter.comparison.streams import ByteReader, Stream
from converter.tensors.lazy_tensor import LazyTensor


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
    """Measure the values of each tensor of real numbers.

    Args:
        tensors: The tensors by name.
        count: Called with the number of bytes that were measured.
    """
    found: dict[str, Values] = {}
    with one_thread(), Stream(tensors.values()) as stream:
        reader = ByteReader(stream)
        for name, tensor in tensors.items():
            found[name] = Values()
            for size in piece_sizes(tensor):
                found[name] = found[name].plus(_values(elements(reader, tensor, size)))
                count(size * tensor.dtype.itemsize)
    return found


def _values(piece: torch.Tensor) -> Values:
    numbers = finite = piece.double()
    if not numbers.sum().isfinite():
        finite = numbers[numbers.isfinite()]
    if not finite.numel():
        return Values(non_finite=numbers.numel())
    lowest, highest = map(float, finite.aminmax())
    return Values(finite.numel(), numbers.numel() - finite.numel(), lowest, highest, float(finite.mean()))

"""What a loader finds in a file: named tensors, described but not read."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from converter.errors import ContainerError
from converter.storage.byte_range import DAMAGED, Storage
from converter.tensors.dtypes import DType


class TensorInfo(NamedTuple):
    """One tensor of a checkpoint: `start` is its first byte in `storage`, `strides` count elements.

    The loader has checked that every element lies within the storage.
    """

    key: str
    dtype: DType
    shape: tuple[int, ...]
    storage: Storage
    start: int
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def verbatim(self) -> bool:
        """Whether the bytes in the file are the tensor's own, in order, as a little-endian machine has them."""
        plain = not (self.storage.deflated or self.storage.big_endian)
        return plain and self.strides == contiguous_strides(self.shape)


# What a loader returns: dicts whose leaves are tensors; whatever else the file holds stands there as None or a scalar.
Contents = dict[Any, Any]


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides in elements, as torch gives them to a tensor it makes."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def make_tensor(
    key: str, dtype: DType, shape: tuple[int, ...], storage: Storage, offset: int, strides: tuple[int, ...]
) -> TensorInfo:
    """A checked tensor: `offset` and `strides` in elements; ContainerError where an element leaves the storage."""
    where = f"{storage.file.name}: tensor {key!r}"
    if offset < 0 or any(n < 0 for n in shape) or any(n < 0 for n in strides) or len(shape) != len(strides):
        raise ContainerError(f"{where}: impossible shape {shape}, strides {strides} or offset {offset}", DAMAGED)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 in shape:
        last = offset - 1
    if (last + 1) * dtype.itemsize > storage.size:
        end = (last + 1) * dtype.itemsize
        raise ContainerError(f"{where}: reaches byte {end} of a storage of {storage.size}", DAMAGED)
    # A dimension of one element, or a tensor of none, may carry any stride: it is never taken.
    plain = contiguous_strides(shape)
    if 0 in shape or all(n == 1 or a == b for n, a, b in zip(shape, strides, plain, strict=True)):
        strides = plain
    return TensorInfo(key, dtype, shape, storage, offset * dtype.itemsize, strides)

"""Descriptions of the tensors in a checkpoint file, which loaders return without reading the data."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from converter.errors import ContainerError
from converter.storage.byte_range import DAMAGED, Storage
from converter.tensors.dtypes import DType


class TensorInfo(NamedTuple):
    """One tensor of a checkpoint; all of its elements are within its storage.

    Attributes:
        key: The tensor's name in the file.
        dtype: The element type.
        shape: The sizes of its dimensions.
        storage: The bytes that the tensor views.
        start: Its first byte in the storage.
        strides: Its strides in elements.
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
        """Whether the file has the tensor's bytes contiguous, uncompressed and little-endian."""
        plain = not (self.storage.deflated or self.storage.big_endian)
        return plain and self.strides == contiguous_strides(self.shape)


# What a loader returns: nested dicts of tensors. Other objects in the file are None or scalars.
Contents = dict[Any, Any]


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides in elements, as in a new torch tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def make_tensor(
    key: str, dtype: DType, shape: tuple[int, ...], storage: Storage, offset: int, strides: tuple[int, ...]
) -> TensorInfo:
    """Check a tensor's place in its storage and describe it.

    Args:
        key: The tensor's name in the file.
        dtype: The element type.
        shape: The sizes of its dimensions.
        storage: The bytes that the tensor views.
        offset: Its first element in the storage.
        strides: Its strides in elements.

    Raises:
        ContainerError: An element is outside the storage.
    """
    where = f"{storage.file.name}: tensor {key!r}"
    if offset < 0 or any(n < 0 for n in shape) or any(n < 0 for n in strides) or len(shape) != len(strides):
        raise ContainerError(f"{where}: impossible shape {shape}, strides {strides} or offset {offset}", DAMAGED)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 in shape:
        last = offset - 1
    if (last + 1) * dtype.itemsize > storage.size:
        end = (last + 1) * dtype.itemsize
        raise ContainerError(f"{where}: needs {end} bytes, but its storage has {storage.size}", DAMAGED)
    # The strides of dimensions of size 1, and of empty tensors, have no effect.
    plain = contiguous_strides(shape)
    if 0 in shape or all(n == 1 or a == b for n, a, b in zip(shape, strides, plain, strict=True)):
        strides = plain
    return TensorInfo(key, dtype, shape, storage, offset * dtype.itemsize, strides)

"""Descriptions of the tensors in a checkpoint file, which loaders return without reading the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from converter.storage.byte_range import Storage, damaged
from converter.storage.local_file import SourceFile
from converter.tensors.dtypes import DType

# Torch's own limits.
MAX_DIMENSIONS = 64
MAX_INT = 2**63 - 1  # of sizes, strides and offsets


class TensorInfo(NamedTuple):
    """Description of a tensor in a checkpoint. All of its elements are within its storage."""

    key: str  # the tensor's name in the file
    dtype: DType
    shape: tuple[int, ...]
    storage: Storage  # the bytes that the tensor views
    byte_offset: int  # the offset of the first element in the storage
    strides: tuple[int, ...]  # the strides in elements
    # For a tensor that is stored in several chunks: returns a LazyTensor that concatenates them. `storage` is then the
    # file and the byte range of the first chunk.
    assemble: Callable[[], Any] | None = None

    @property
    def nbytes(self) -> int:
        return self.dtype.nbytes(math.prod(self.shape))

    @property
    def is_raw_contiguous(self) -> bool:
        """Whether the file has the tensor's bytes contiguous, uncompressed and little-endian."""
        is_raw = not (self.storage.deflated or self.storage.big_endian)
        return is_raw and self.strides == contiguous_strides(self.shape)


# The result of a loader: nested dicts of tensors. Non-tensor objects become None or scalars.
Contents = dict[Any, Any]


class FileContents(Contents):
    """Contents of a file, with full names of classes and functions that were not imported, and notes for the user."""

    def __init__(self, contents: Contents, ignored: Iterable[str] = (), notes: Iterable[str] = ()) -> None:
        super().__init__(contents)
        self.ignored, self.notes = tuple(ignored), tuple(notes)


def are_sizes(values: Iterable[Any]) -> bool:
    """Return whether untrusted values are integers that sizes and offsets may have."""
    return all(type(value) is int and 0 <= value <= MAX_INT for value in values)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor, in elements."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def plain_tensor_info(file: SourceFile, key: str, dtype: DType, shape: tuple[int, ...], byte_offset: int) -> TensorInfo:
    """Describe a tensor whose bytes are contiguous in the file.

    Args:
        file: The file.
        key: The tensor's name in the file.
        dtype: The element type.
        shape: The sizes of the dimensions.
        byte_offset: The offset of the first byte in the file.
    """
    nbytes = dtype.nbytes(math.prod(shape))
    storage = Storage(file, (byte_offset, byte_offset + nbytes), nbytes, nbytes, key)
    return TensorInfo(key, dtype, shape, storage, 0, contiguous_strides(shape))


def checked_tensor_info(
    key: str, dtype: DType, shape: tuple[int, ...], storage: Storage, storage_offset: int, strides: tuple[int, ...]
) -> TensorInfo:
    """Describe a tensor that views a storage; ContainerError if an element is outside the storage.

    Strides without effect, such as those of dimensions of size 1, become those of a contiguous tensor.

    Args:
        key: The tensor's name in the file.
        dtype: The element type.
        shape: The sizes of the dimensions.
        storage: The bytes that the tensor views.
        storage_offset: The offset of the first element in the storage, in elements.
        strides: The strides in elements.
    """
    where = f"{storage.file.name}: tensor {key!r}"
    if min(storage_offset, *shape, *strides, 0) < 0 or len(shape) != len(strides):
        raise damaged(f"{where}: impossible shape {shape}, strides {strides} or offset {storage_offset}")
    span = 0 if 0 in shape else 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    end = (storage_offset + span) * dtype.itemsize
    if end > storage.size:
        raise damaged(f"{where}: needs {end} bytes, but its storage has {storage.size}")
    contiguous = contiguous_strides(shape)
    if 0 in shape or all(n == 1 or a == b for n, a, b in zip(shape, strides, contiguous, strict=True)):
        strides = contiguous
    return TensorInfo(key, dtype, shape, storage, storage_offset * dtype.itemsize, strides)

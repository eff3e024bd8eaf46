"""What a loader finds in a file: named tensors, described but not read."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

from isal import isal_zlib

from converter.dtypes import DType
from converter.errors import ContainerError
from converter.files import Range, SourceFile

# The next step wherever a file contradicts itself.
DAMAGED = "the file is damaged: download or copy it again"


class Storage(NamedTuple):
    """A run of bytes in a file that one or more tensors view.

    Its `length` bytes lie in `file` somewhere in `span`, with nothing else of interest: `find` tells where, and reads a
    zip member's own header for it. `crc32` is the checksum the file gives for it, where it gives one. A `deflated`
    storage holds `size` bytes once inflated; for any other `size` equals `length`. `big_endian` storages have their
    elements' bytes the other way round.
    """

    file: SourceFile
    span: Range
    length: int
    size: int
    name: str
    crc32: int | None = None
    deflated: bool = False
    big_endian: bool = False
    find: Callable[[], int] | None = None

    @property
    def offset(self) -> int:
        """Where in the file it begins, in bytes; ContainerError where the file contradicts itself about that."""
        return self.span[0] if self.find is None else self.find()

    def read(self) -> bytes:
        """All `size` bytes, inflated and checked against the CRC."""
        data = self.file.read(self.offset, self.length)
        if self.deflated:
            data = inflate(data, self.size, f"{self.file.name}: {self.name}")
        if self.crc32 is not None and isal_zlib.crc32(data) != self.crc32:
            raise crc_error(self)
        return data


class Tensor(NamedTuple):
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
) -> Tensor:
    """A checked tensor: `offset` and `strides` in elements; ContainerError where an element leaves the storage."""
    where = f"{storage.file.name}: tensor {key!r}"
    if offset < 0 or any(n < 0 for n in shape) or any(n < 0 for n in strides) or len(shape) != len(strides):
        raise ContainerError(f"{where}: impossible shape {shape}, strides {strides} or offset {offset}\n{DAMAGED}")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 in shape:
        last = offset - 1
    if (last + 1) * dtype.itemsize > storage.size:
        end = (last + 1) * dtype.itemsize
        raise ContainerError(f"{where}: reaches byte {end} of a storage of {storage.size}\n{DAMAGED}")
    # A dimension of one element, or a tensor of none, may carry any stride: it is never taken.
    plain = contiguous_strides(shape)
    if 0 in shape or all(n == 1 or a == b for n, a, b in zip(shape, strides, plain, strict=True)):
        strides = plain
    return Tensor(key, dtype, shape, storage, offset * dtype.itemsize, strides)


def inflate(data: bytes, size: int, where: str) -> bytes:
    """Raw deflate to exactly `size` bytes; never asks for more memory than that."""
    engine = zlib.decompressobj(-15)
    try:
        result = engine.decompress(data, size + 1)
    except zlib.error as error:
        raise ContainerError(f"{where}: damaged compressed data ({error})\ndownload or copy the file again") from error
    if len(result) != size:
        more = "more" if len(result) > size else "less"
        raise ContainerError(f"{where}: inflates to {more} than {size} bytes\ndownload or copy the file again")
    return result


def crc_error(storage: Storage) -> ContainerError:
    return ContainerError(
        f"{storage.file.name}: {storage.name}: its bytes do not match the file's own CRC-32 checksum\n{DAMAGED}"
    )

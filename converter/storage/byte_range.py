"""Byte ranges of files: the storages that tensors view, and the segments that an output is written from."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import NamedTuple

from converter.errors import ContainerError
from converter.storage.local_file import Range, SourceFile

try:
    # Several times as fast as zlib's.
    from isal.isal_zlib import crc32 as crc32
except ImportError:
    from zlib import crc32 as crc32

# The hint of all errors for a file that contradicts itself.
DAMAGED = "the file is damaged: download or copy it again"


class Storage(NamedTuple):
    """A run of bytes in a file that one or more tensors view.

    Attributes:
        file: The file.
        span: The part of the file that holds the storage, and nothing else of interest.
        length: Bytes in the file.
        size: Bytes of data; another number than `length` only if it is compressed.
        name: What the file calls it.
        crc32: The checksum that the file gives for it, if any.
        deflated: Whether it is compressed (raw deflate).
        big_endian: Whether the bytes of its elements are in big-endian order.
        find: Returns its offset in the file, where only the header of a zip member tells it.
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
        """Its first byte in the file; ContainerError where the file contradicts itself about that."""
        return self.span[0] if self.find is None else self.find()

    def read(self) -> bytes:
        """Return all data, decompressed and checked against the CRC."""
        data = self.file.read(self.offset, self.length)
        if self.deflated:
            data = _inflate(data, self.size, f"{self.file.name}: {self.name}")
        if self.crc32 is not None and crc32(data) != self.crc32:
            raise crc_error(self)
        return data


class ByteRange(NamedTuple):
    """`length` bytes of a storage from byte `start`, which are copied as they are."""

    storage: Storage
    start: int
    length: int


# Bytes to write: copied from a file, or generated (position_ids, a random compressor).
Segment = ByteRange | bytes


def cut(segments: list[Segment], start: int, length: int) -> list[Segment]:
    """Return `length` bytes from byte `start` of the concatenated segments."""
    result: list[Segment] = []
    for segment in segments:
        size = len(segment) if isinstance(segment, bytes) else segment.length
        first, last = max(start, 0), min(start + length, size)
        if first < last:
            if isinstance(segment, bytes):
                result.append(segment[first:last])
            else:
                result.append(ByteRange(segment.storage, segment.start + first, last - first))
        start -= size
    return result


def merge(segments: list[Segment]) -> list[Segment]:
    """Join neighbours: byte ranges that are adjacent in one storage, or in one file without checksums."""
    result: list[Segment] = []
    for segment in segments:
        joined = _join(result[-1], segment) if result else None
        if joined is None:
            result.append(segment)
        else:
            result[-1] = joined
    return result


def _join(a: Segment, b: Segment) -> ByteRange | None:
    if isinstance(a, bytes) or isinstance(b, bytes):
        return None
    if a.storage is b.storage and a.start + a.length == b.start:
        return ByteRange(a.storage, a.start, a.length + b.length)
    if a.storage.file is not b.storage.file or a.storage.crc32 is not None or b.storage.crc32 is not None:
        return None
    adjacent = a.storage.offset + a.start + a.length == b.storage.offset + b.start
    return ByteRange(a.storage, a.start, a.length + b.length) if adjacent else None


def _inflate(data: bytes, size: int, where: str) -> bytes:
    """Decompress raw deflate to exactly `size` bytes; a bomb gets no more memory than that."""
    engine = zlib.decompressobj(-15)
    try:
        result = engine.decompress(data, size + 1)
    except zlib.error as error:
        raise ContainerError(f"{where}: damaged compressed data ({error})", DAMAGED) from error
    if len(result) != size:
        more = "more" if len(result) > size else "less"
        raise ContainerError(f"{where}: decompresses to {more} than {size} bytes", DAMAGED)
    return result


def crc_error(storage: Storage) -> ContainerError:
    return ContainerError(
        f"{storage.file.name}: {storage.name}: its bytes do not match the file's own CRC-32 checksum", DAMAGED
    )

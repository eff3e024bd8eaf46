"""Runs of bytes in files: storages that tensors view, and the byte ranges of them that are copied."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import NamedTuple

from isal import isal_zlib

from converter.errors import ContainerError
from converter.storage.local_file import Range, SourceFile

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


class ByteRange(NamedTuple):
    """`length` bytes from byte `start` of a storage's data, to be copied verbatim."""

    storage: Storage
    start: int
    length: int


# Bytes to write: from a file, or made up (position_ids, an untrained compressor).
Segment = ByteRange | bytes


def cut(segments: list[Segment], start: int, length: int) -> list[Segment]:
    """The part of `pieces`, laid end to end, from byte `start` on."""
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
    """The same bytes in as few extents as possible: neighbours in one storage, or in one file without checksums."""
    result: list[Segment] = []
    for segment in segments:
        both = _both(result[-1], segment) if result else None
        if both is None:
            result.append(segment)
        else:
            result[-1] = both
    return result


def _both(a: Segment, b: Segment) -> ByteRange | None:
    """The extent that begins with one and ends with the other, if there is one."""
    if isinstance(a, bytes) or isinstance(b, bytes):
        return None
    if a.storage is b.storage and a.start + a.length == b.start:
        return ByteRange(a.storage, a.start, a.length + b.length)
    if a.storage.file is not b.storage.file or a.storage.crc32 is not None or b.storage.crc32 is not None:
        return None
    adjacent = a.storage.offset + a.start + a.length == b.storage.offset + b.start
    return ByteRange(a.storage, a.start, a.length + b.length) if adjacent else None


def inflate(data: bytes, size: int, where: str) -> bytes:
    """Raw deflate to exactly `size` bytes; never asks for more memory than that."""
    engine = zlib.decompressobj(-15)
    try:
        result = engine.decompress(data, size + 1)
    except zlib.error as error:
        raise ContainerError(
            f"{where}: damaged compressed data ({error})", "download or copy the file again"
        ) from error
    if len(result) != size:
        more = "more" if len(result) > size else "less"
        raise ContainerError(f"{where}: inflates to {more} than {size} bytes", "download or copy the file again")
    return result


def crc_error(storage: Storage) -> ContainerError:
    return ContainerError(
        f"{storage.file.name}: {storage.name}: its bytes do not match the file's own CRC-32 checksum", DAMAGED
    )

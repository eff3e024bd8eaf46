"""Bytes copied from where a checkpoint has them to where the output wants them, checked on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from isal import isal_zlib

from converter.checkpoint import Storage, crc_error
from converter.mapping.expr import Extent, Piece

# Fits in the second-level cache: measured against copy_file_range, sendfile and memory maps, nothing was faster.
BUFFER = 256 * 1024

Progress = Callable[[int], None]


class Copier:
    """Copies pieces to `write` through one buffer; small pieces share a write.

    The CRC of a storage that a file gives one for is checked on the way, whole storages as they pass and others,
    of which only a part is wanted, once before. `progress` is told the bytes written, each time some are.
    """

    def __init__(self, write: Callable[[memoryview], object], progress: Progress) -> None:
        self._write = write
        self._progress = progress
        self._buffer = memoryview(bytearray(BUFFER))
        self._used = 0
        self._checked: set[int] = set()

    def copy(self, pieces: Iterable[Piece | memoryview]) -> None:
        for piece in pieces:
            if isinstance(piece, Extent):
                self._copy_extent(piece)
            else:
                self._copy_bytes(memoryview(piece))

    def flush(self) -> None:
        if self._used:
            self._write(self._buffer[: self._used])
            self._progress(self._used)
            self._used = 0

    def _room(self) -> int:
        if self._used == BUFFER:
            self.flush()
        return BUFFER - self._used

    def _copy_bytes(self, data: memoryview) -> None:
        while data:
            count = min(self._room(), len(data))
            self._buffer[self._used : self._used + count] = data[:count]
            self._used += count
            data = data[count:]

    def _copy_extent(self, extent: Extent) -> None:
        storage, start, length = extent
        whole = length == storage.length
        if storage.crc32 is not None and not whole:
            self._check(storage)
        crc, end = 0, start + length
        while start < end:
            count = min(self._room(), end - start)
            view = self._buffer[self._used : self._used + count]
            storage.file.readinto(view, storage.offset + start)
            if whole and storage.crc32 is not None:
                crc = isal_zlib.crc32(view, crc)
            self._used += count
            start += count
        if whole and storage.crc32 is not None and crc != storage.crc32:
            raise crc_error(storage)

    def _check(self, storage: Storage) -> None:
        """Read a storage of which only a part is wanted, for its checksum alone."""
        if id(storage) in self._checked:
            return
        crc, start, view = 0, 0, memoryview(bytearray(BUFFER))
        while start < storage.length:
            count = min(BUFFER, storage.length - start)
            storage.file.readinto(view[:count], storage.offset + start)
            crc = isal_zlib.crc32(view[:count], crc)
            start += count
        if crc != storage.crc32:
            raise crc_error(storage)
        self._checked.add(id(storage))

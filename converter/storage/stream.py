"""Bytes copied from where a checkpoint has them to where the output wants them, checked on the way."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from threading import Thread

from isal import isal_zlib

from converter.storage.atomic_output import write_all
from converter.storage.byte_range import ByteRange, Segment, Storage, crc_error

# With a thread that reads and one that writes, 1 MiB took the least time of 128 KiB to 2 MiB: smaller ones are handed
# over more often. copy_file_range, sendfile and memory maps were no faster, and cannot check what they copy.
BUFFER = 1 << 20

# Buffers between the reading and the writing thread: enough that neither waits for the other's hiccups.
_IN_FLIGHT = 4

# Bytes between two hints to start writing to the disk.
_WRITEBACK = 4 << 20

# Told the bytes handed on, each time some are.
OnBytes = Callable[[int], None]
# Shown the tensors' bytes as they are written, all of them in their order.
OnData = Callable[[memoryview], None]
# Has a file grow by the bytes of a buffer.
Write = Callable[[int, memoryview], None]


class BackgroundWriter:
    """Writes buffers to a file in a thread of its own, while the next ones are read and checked.

    A fifth of the time of a copy within memory is saved by this. `seen` is called there too. At the end of the `with`
    block all is written; an error of the thread is raised from the call that follows it, or there.
    """

    def __init__(self, fd: int, seen: OnData | None = None, write: Write | None = None) -> None:
        self._fd, self._seen, self._write = fd, seen, write
        self._full: SimpleQueue[memoryview | None] = SimpleQueue()
        self._free: SimpleQueue[memoryview] = SimpleQueue()
        for _ in range(_IN_FLIGHT):
            self._free.put(memoryview(bytearray(BUFFER)))
        self._error: BaseException | None = None
        self._written = self._sent = 0
        self._thread = Thread(target=self._run, name="writer")

    def __enter__(self) -> BackgroundWriter:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._full.put(None)
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error

    def exchange(self, full: memoryview) -> memoryview:
        """Have `full` written; an empty buffer in return."""
        if self._error is not None:
            raise self._error
        self._full.put(full)
        return self._free.get()

    def _run(self) -> None:
        while (full := self._full.get()) is not None:
            try:
                if self._error is None:
                    (self._write or write_all)(self._fd, full)
                    self._written += len(full)
                    self._start_writeback()
                    if self._seen is not None:
                        self._seen(full)
            except BaseException as error:  # told to the thread that waits for it
                self._error = error
            # The whole buffer, of which `full` may be the beginning.
            self._free.put(memoryview(full.obj))

    def _start_writeback(self) -> None:
        """Have the kernel send what was written to the disk now, not all of it at the fsync that ends the file.

        A copy and its fsync together take a third less time for it. That dropping clean pages, which is what this
        advice asks for, starts with writing the dirty ones is Linux's way; elsewhere it changes nothing.
        """
        if self._written - self._sent >= _WRITEBACK and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, self._sent, self._written - self._sent, os.POSIX_FADV_DONTNEED)
            self._sent = self._written


class Copier:
    """Copies pieces through buffers of one size; small pieces share a buffer.

    `exchange` takes the bytes to write and returns an empty buffer, which may be the same one. The CRC of a storage
    that a file gives one for is checked on the way, whole storages as they pass and others, of which only a part is
    wanted, once before. `count` is told of the bytes.
    """

    def __init__(self, exchange: Callable[[memoryview], memoryview], count: OnBytes) -> None:
        self._exchange = exchange
        self._count = count
        self._buffer = memoryview(bytearray(BUFFER))
        self._used = 0
        self._checks = CrcChecker()

    def copy(self, segments: Iterable[Segment | memoryview]) -> None:
        for segment in segments:
            if isinstance(segment, ByteRange):
                self._checks.read(segment, self._parts(segment.length))
            else:
                self._copy_bytes(memoryview(segment))
            # Before the next one is computed: both may be large.
            del segment

    def flush(self) -> None:
        if self._used:
            self._buffer = self._exchange(self._buffer[: self._used])
            self._count(self._used)
            self._used = 0

    def _copy_bytes(self, data: memoryview) -> None:
        for part in self._parts(len(data)):
            part[:] = data[: len(part)]
            data = data[len(part) :]

    def _parts(self, length: int) -> Iterator[memoryview]:
        """Places in the buffers for the next `length` bytes, each to be filled before the next one is asked for."""
        while length:
            if self._used == BUFFER:
                self.flush()
            part = self._buffer[self._used : self._used + length]
            yield part
            self._used += len(part)
            length -= len(part)


class CrcChecker:
    """Reads extents and checks the CRCs of the storages that they lie in."""

    def __init__(self) -> None:
        self._checked: set[int] = set()

    def read(self, extent: ByteRange, parts: Iterable[memoryview]) -> None:
        """Fill `parts`, together of the extent's size; ContainerError where its storage does not match its checksum."""
        storage, start, length = extent
        passes = length == storage.length
        if not passes:
            self.whole(storage)
        crc, at = 0, storage.offset + start
        for part in parts:
            storage.file.readinto(part, at)
            if passes and storage.crc32 is not None:
                # While the bytes are in the processor's cache.
                crc = isal_zlib.crc32(part, crc)
            at += len(part)
        if passes and storage.crc32 not in (None, crc):
            raise crc_error(storage)

    def whole(self, storage: Storage) -> None:
        """Read a storage for its checksum alone, if it has one, and only once."""
        if storage.crc32 is None or id(storage) in self._checked:
            return
        buffer = memoryview(bytearray(BUFFER))
        parts = (buffer[: storage.length - at] for at in range(0, storage.length, BUFFER))
        self.read(ByteRange(storage, 0, storage.length), parts)
        self._checked.add(id(storage))

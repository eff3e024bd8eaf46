"""Streaming copy from checkpoints to the output, through a few buffers, with checks of CRCs on the way."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from threading import Thread

from converter.storage.atomic_output import write_all
from converter.storage.byte_range import ByteRange, Segment, Storage, crc32, crc_error

# Measured with one thread that reads and one that writes: the fastest of 128 KiB to 2 MiB. copy_file_range, sendfile
# and memory maps were no faster, and cannot check what they copy.
BUFFER = 1 << 20
_NUM_BUFFERS = 4  # enough that a short delay of one thread does not stop the other
_WRITEBACK_BYTES = 4 << 20  # between two requests to start writing to the disk

OnBytes = Callable[[int], None]  # called with the number of bytes copied
OnData = Callable[[memoryview], None]  # called with the data of the tensors, in the order in which it is written
Write = Callable[[int, memoryview], None]  # appends a buffer to a file


class BackgroundWriter:
    """Writes buffers to a file in a thread while the caller reads the next ones; saves a fifth of the time in memory.

    The end of the `with` block waits for the thread. It or the next call of `exchange` raises an error of the thread.
    """

    def __init__(self, fd: int, on_data: OnData | None = None, write: Write | None = None) -> None:
        """Write to `fd` with `write` or `write_all`; `on_data` is called in the thread with each written buffer."""
        self._fd, self._on_data, self._write = fd, on_data, write or write_all
        self._full: SimpleQueue[memoryview | None] = SimpleQueue()
        self._free: SimpleQueue[memoryview] = SimpleQueue()
        for _ in range(_NUM_BUFFERS):
            self._free.put(memoryview(bytearray(BUFFER)))
        self._error: BaseException | None = None
        self._written = self._sent = 0
        # A daemon: Python would wait for another thread at its exit if a signal arrives before the block begins.
        self._thread = Thread(target=self._run, name="writer", daemon=True)

    def __enter__(self) -> BackgroundWriter:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._full.put(None)
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error

    def exchange(self, full: memoryview) -> memoryview:
        """Queue a buffer for writing; return an empty one."""
        if self._error is not None:
            raise self._error
        self._full.put(full)
        return self._free.get()

    def _run(self) -> None:
        while (full := self._full.get()) is not None:
            try:
                if self._error is None:
                    self._write(self._fd, full)
                    self._written += len(full)
                    self._start_writeback()
                    if self._on_data is not None:
                        self._on_data(full)
            except BaseException as error:  # raised again in the caller's thread
                self._error = error
            # The whole buffer, of which `full` may be the beginning.
            self._free.put(memoryview(full.obj))

    def _start_writeback(self) -> None:
        """Ask Linux to drop the written pages from its cache, which starts writing them to the disk.

        Copy and fsync together take a third less time than if the fsync writes everything.
        """
        if self._written - self._sent >= _WRITEBACK_BYTES and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, self._sent, self._written - self._sent, os.POSIX_FADV_DONTNEED)
            self._sent = self._written


class Copier:
    """Copies segments to the output through buffers of one size.

    The CRC of a storage is checked: during the copy if the storage is copied completely, else before it.
    """

    def __init__(self, exchange: Callable[[memoryview], memoryview], on_bytes: OnBytes) -> None:
        """Use `exchange` to write a full buffer and get an empty one, which may be the same."""
        self._exchange, self._on_bytes = exchange, on_bytes
        self._buffer, self._used = memoryview(bytearray(BUFFER)), 0
        self._checks = CrcChecker()

    def copy(self, segments: Iterable[Segment | memoryview]) -> None:
        for segment in segments:
            if isinstance(segment, ByteRange):
                self._checks.read(segment, self._parts(segment.length))
            else:
                self._copy_bytes(memoryview(segment))
            # Free a computed tensor before the next one is computed.
            del segment

    def flush(self) -> None:
        """Write the bytes that are still in the buffer."""
        if self._used:
            self._buffer = self._exchange(self._buffer[: self._used])
            self._on_bytes(self._used)
            self._used = 0

    def _copy_bytes(self, data: memoryview) -> None:
        for part in self._parts(len(data)):
            part[:] = data[: len(part)]
            data = data[len(part) :]

    def _parts(self, length: int) -> Iterator[memoryview]:
        """Yield views of buffers for the next `length` bytes. The caller fills each one before it requests the next."""
        while length:
            if self._used == BUFFER:
                self.flush()
            part = self._buffer[self._used : self._used + length]
            yield part
            self._used += len(part)
            length -= len(part)


def read_checked(segments: Iterable[Segment]) -> bytes:
    """Return the bytes of segments, and check the CRC of each storage that has one."""
    checker, parts = CrcChecker(), list[bytes | bytearray]()
    for segment in segments:
        if isinstance(segment, bytes):
            parts.append(segment)
            continue
        part = bytearray(segment.length)
        checker.read(segment, [memoryview(part)])
        parts.append(part)
    return b"".join(parts)


class CrcChecker:
    """Reads byte ranges and checks the CRCs of their storages."""

    def __init__(self) -> None:
        self._checked: set[int] = set()

    def read(self, byte_range: ByteRange, parts: Iterable[memoryview]) -> None:
        """Read a range into the buffers `parts`; ContainerError if the storage does not match its CRC."""
        storage, start, length = byte_range
        is_whole = length == storage.length and storage.crc32 is not None
        if not is_whole:
            self.check(storage)
        crc, offset = 0, storage.offset + start
        for part in parts:
            storage.file.readinto(part, offset)
            if is_whole:
                # Here, while the bytes are in the processor's cache.
                crc = crc32(part, crc)
            offset += len(part)
        if is_whole and crc != storage.crc32:
            raise crc_error(storage)

    def check(self, storage: Storage) -> None:
        """Read a whole storage to check its CRC, unless it has none or was checked before."""
        if storage.crc32 is None or id(storage) in self._checked:
            return
        buffer = memoryview(bytearray(BUFFER))
        parts = (buffer[: storage.length - start] for start in range(0, storage.length, BUFFER))
        self.read(ByteRange(storage, 0, storage.length), parts)
        self._checked.add(id(storage))

"""Files that tensors are read from by offset, wherever they lie."""

from __future__ import annotations

import mmap
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from converter.errors import ContainerError, DsocrError, printable

# Not to count a map as memory that will be written to: a file may be larger than all there is. Python names it from
# 3.13 on; the number is that of Linux on x86 and ARM.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)

READ_HINT = "check that it is there, where it leads if it is a link, and that you may read it"

# Bytes that are digested at once.
_PIECE = 1 << 20

# First byte, and the one after the last.
Range = tuple[int, int]


class SourceFile(Protocol):
    """Bytes that can be read at any offset; the one door through which checkpoints are read.

    `name` is what messages call the file, `size` its length in bytes. `identity` is device and inode of a local file:
    two paths with the same pair are one file, and a remote one has none. `path` is where other libraries find what has
    been read of it.
    """

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def identity(self) -> tuple[int, int] | None: ...
    @property
    def path(self) -> str: ...

    def close(self) -> None:
        """Let go of it: nothing is read any more."""

    def readinto(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from `offset` on; ContainerError where the file ends before it is full."""

    def read(self, offset: int, length: int) -> bytes:
        """The `length` bytes at `offset`; ContainerError where the file ends before that."""

    def check_unchanged(self) -> None:
        """ContainerError if the file was written to or cut since it was opened."""


class LocalFile:
    """A file on this machine, opened once and kept open, so that a replaced file cannot be mixed with its successor.

    Reads by `pread`: a memory map would count every page that was touched as the process's own memory.
    """

    def __init__(self, path: Path, name: str = "") -> None:
        """`name` is what messages call it, if not by its path."""
        self.name = printable(name or str(path))
        self.path = str(path)
        self._fd = -1
        try:
            # Else a pipe is waited for until somebody writes to it.
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
            self._stat = os.fstat(self._fd)
        except OSError as error:
            raise ContainerError(f"{self.name}: cannot be read: {error.strerror}", READ_HINT) from error
        if not stat.S_ISREG(self._stat.st_mode):
            raise ContainerError(
                f"{self.name}: is a {_kind(self._stat.st_mode)}, not a file: nothing in it can be looked up",
                "write what comes from it to a file, and give that",
            )
        self.size = self._stat.st_size

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def identity(self) -> tuple[int, int]:
        return self._stat.st_dev, self._stat.st_ino

    def readinto(self, buffer: memoryview, offset: int) -> None:
        generated = 0
        while generated < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[generated:]], offset + generated)
            except OSError as error:
                raise ContainerError(f"{self.name}: cannot be read at byte {offset}: {error.strerror}") from error
            if not count:
                raise self._truncated(offset, len(buffer))
            generated += count

    def read(self, offset: int, length: int) -> bytes:
        # Asked before the buffer is made: a file may claim any length it likes.
        if offset < 0 or length < 0 or offset + length > self.size:
            raise self._truncated(offset, length)
        data = bytearray(length)
        self.readinto(memoryview(data), offset)
        return bytes(data)

    def _truncated(self, offset: int, length: int) -> ContainerError:
        return ContainerError(
            f"{self.name}: truncated: {length} bytes wanted at byte {offset}, the file has {self.size}",
            "download or copy it again",
        )

    def map(self) -> mmap.mmap:
        """The file in memory, read as it is touched; what is written there never reaches the file."""
        try:
            return mmap.mmap(self._fd, self.size, mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            raise ContainerError(f"{self.name}: cannot be mapped into memory: {error.strerror}") from error

    def check_unchanged(self) -> None:
        now = os.fstat(self._fd)
        if (now.st_size, now.st_mtime_ns) != (self._stat.st_size, self._stat.st_mtime_ns):
            raise ContainerError(
                f"{self.name}: changed while it was being read", "wait until it is complete, then rerun"
            )


def exists(path: str | Path) -> bool:
    """Whether there is something at a path. Unlike for Path.exists(), a name that is too long is no error."""
    return os.path.exists(path)  # noqa: PTH110


def require_regular_file(path: Path, error: type[DsocrError]) -> None:
    """`error` for a pipe, which would be waited for, or a device, which may have no end; OSError as stat raises it."""
    if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
        raise error(f"{path}: is no file")


def _kind(mode: int) -> str:
    """What people call it when it is no file."""
    kinds = ((stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"))
    return next((kind for is_, kind in kinds if is_(mode)), "device")


def sha256_of(file: SourceFile, count: Callable[[int], None] = lambda nbytes: None) -> str:
    """The digest of a whole file, in hexadecimal; `count` is told the bytes as they are read."""
    # Two milliseconds of import, for those alone who ask.
    import hashlib

    digest, buffer = hashlib.sha256(), memoryview(bytearray(_PIECE))
    for start in range(0, file.size, _PIECE):
        part = buffer[: file.size - start]
        file.readinto(part, start)
        digest.update(part)
        count(len(part))
    return digest.hexdigest()

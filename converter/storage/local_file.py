"""Source files, which are read at byte offsets."""

from __future__ import annotations

import mmap
import os
import stat
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from threading import Lock

from converter.errors import ContainerError, DsocrError, printable

# Without it, Linux may refuse to map a file that is larger than the memory. Python defines the name from 3.13 on; the
# number is Linux's on x86 and ARM.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)

READ_HINT = "check that it exists, where a link leads to, and that you may read it"
_BUFFER = 1 << 20
Range = tuple[int, int]  # the first byte offset, and the one after the last


class SourceFile(ABC):
    """A file that is read at any offset, on this machine or on a hub."""

    name: str  # the name in messages
    size: int  # the number of bytes
    path: str  # a local path for other libraries; of a file on a hub, only the bytes that were fetched are there
    identity: tuple[int, int] | None = None  # device and inode, equal for two paths of one file; None on a hub
    copy_hint = "download or copy it again"  # what to do if the file is incomplete

    @abstractmethod
    def close(self) -> None:
        """Close the file."""

    @abstractmethod
    def _readinto(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes at `offset`, which are within the file."""

    @abstractmethod
    def check_unchanged(self) -> None:
        """Raise ContainerError if the file was modified after it was opened."""

    def readinto(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes at `offset`; ContainerError if the file is too short."""
        self._check_bounds(offset, len(buffer))
        self._readinto(buffer, offset)

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset`; ContainerError if the file is too short."""
        # Before the buffer is allocated: a header may claim any length.
        self._check_bounds(offset, length)
        data = bytearray(length)
        self._readinto(memoryview(data), offset)
        return bytes(data)

    def _check_bounds(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise self._truncated(offset, length)

    def _truncated(self, offset: int, length: int) -> ContainerError:
        return ContainerError(
            f"{self.name}: truncated: {length} bytes at byte {offset} exceed its size of {self.size} bytes",
            self.copy_hint,
        )


class LocalFile(SourceFile):
    """A file on this machine. It is opened once, so that a file that replaces it is not read by mistake.

    It is read, not mapped: a map would count every page that was touched as the process's own memory. `name` is the
    name in messages; by default the path.
    """

    def __init__(self, path: Path, name: str = "") -> None:
        self.name = printable(name or str(path))
        self.path = str(path)
        self._fd, self._lock = -1, Lock()
        try:
            # O_NONBLOCK: opening a pipe would wait for a writer.
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
            self._stat = os.fstat(self._fd)
        except OSError as error:
            raise ContainerError(f"{self.name}: cannot be read: {error.strerror}", READ_HINT) from error
        if not stat.S_ISREG(self._stat.st_mode):
            mode = self._stat.st_mode
            kind = "folder" if stat.S_ISDIR(mode) else "pipe" if stat.S_ISFIFO(mode) else "device"
            raise ContainerError(
                f"{self.name}: is a {kind}, which cannot be read at an offset",
                "write its content to a file, and give that",
            )
        self.size = self._stat.st_size
        self.identity = self._stat.st_dev, self._stat.st_ino

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _readinto(self, buffer: memoryview, offset: int) -> None:
        while buffer:
            try:
                count = self._read_at(buffer, offset)
            except OSError as error:
                raise ContainerError(f"{self.name}: cannot be read at byte {offset}: {error.strerror}") from error
            if not count:
                raise self._truncated(offset, len(buffer))
            buffer, offset = buffer[count:], offset + count

    def _read_at(self, buffer: memoryview, offset: int) -> int:
        """Read with one system call, which may fill a part of the buffer; return the number of bytes."""
        if hasattr(os, "preadv"):
            return os.preadv(self._fd, [buffer], offset)
        with self._lock:  # Windows
            os.lseek(self._fd, offset, os.SEEK_SET)
            data = os.read(self._fd, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def map(self) -> mmap.mmap:
        """Map the file into memory, copy-on-write."""
        try:
            if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
                return mmap.mmap(self._fd, self.size, access=mmap.ACCESS_COPY)
            return mmap.mmap(self._fd, self.size, mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            raise ContainerError(f"{self.name}: cannot be mapped into memory: {error.strerror}") from error

    def check_unchanged(self) -> None:
        now = os.fstat(self._fd)
        if (now.st_size, now.st_mtime_ns) != (self._stat.st_size, self._stat.st_mtime_ns):
            raise ContainerError(
                f"{self.name}: changed while it was being read", "wait until it is complete, then rerun"
            )


class FileSlice(SourceFile):
    """A range of a file that is read like a file, for formats that embed other files."""

    def __init__(self, file: SourceFile, offset: int, size: int) -> None:
        self.file, self.offset, self.size = file, offset, size
        self.name, self.path, self.copy_hint = f"{file.name}: byte {offset}", file.path, file.copy_hint

    def close(self) -> None:
        """Do nothing: the caller that opened the file closes it."""

    def _readinto(self, buffer: memoryview, offset: int) -> None:
        self.file.readinto(buffer, self.offset + offset)

    def check_unchanged(self) -> None:
        self.file.check_unchanged()


def exists(path: str | Path) -> bool:
    """Return whether a path exists; False for a name that is too long, for which Path.exists() raises."""
    return os.path.exists(path)  # noqa: PTH110


def require_regular_file(path: Path, error: type[DsocrError]) -> None:
    """Raise `error` for a pipe or a device, which may never end, and OSError if there is no file."""
    if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
        raise error(f"{path}: is not a file")


def sha256_of(file: SourceFile, on_bytes: Callable[[int], None] = lambda nbytes: None) -> str:
    """Return the SHA-256 of a whole file in hexadecimal; `on_bytes` is called with the number of bytes read."""
    import hashlib

    digest, buffer = hashlib.sha256(), memoryview(bytearray(_BUFFER))
    for start in range(0, file.size, _BUFFER):
        part = buffer[: file.size - start]
        file.readinto(part, start)
        digest.update(part)
        on_bytes(len(part))
    return digest.hexdigest()

"""A file in memory, for code that reads files by offset."""

from __future__ import annotations

from converter.storage.local_file import SourceFile


class Memory(SourceFile):
    """A SourceFile made of bytes."""

    name = path = "memory"

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)

    def _readinto(self, buffer: memoryview, offset: int) -> None:
        data = self.data[offset : offset + len(buffer)]
        if len(data) < len(buffer):
            raise self._truncated(offset, len(buffer))
        buffer[:] = data

    def close(self) -> None: ...

    def check_unchanged(self) -> None: ...

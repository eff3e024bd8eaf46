"""A file that lies in memory, for what reads files by offset."""

from __future__ import annotations

from converter.errors import ContainerError


class Memory:
    """A SourceFile made of bytes."""

    name = path = "memory"
    identity = None

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)

    def readinto(self, buffer: memoryview, offset: int) -> None:
        buffer[:] = self.read(offset, len(buffer))

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or length < 0 or offset + length > len(self.data):
            raise ContainerError(f"{self.name}: truncated")
        return self.data[offset : offset + length]

    def close(self) -> None: ...

    def check_unchanged(self) -> None: ...

"""Reads torch.save's format before torch 1.6, which later versions still write on request.

Five pickles: a magic number, the protocol version, properties of the machine, the object, and the list of storage keys.
Then follow, for each key in that order, the number of elements (8 bytes) and the elements. Both are always
little-endian: torch ignores the byte order in the properties of the machine.
"""

from __future__ import annotations

from typing import Any

from converter.errors import ContainerError
from converter.formats.pickle_opcodes import resave_step
from converter.formats.pickle_reader import MAX_PICKLE, Globals, TruncatedPickleError, unpickle
from converter.formats.torch_contents import contents_of
from converter.formats.torch_pickle import StorageRefs, TorchGlobals
from converter.storage.byte_range import Storage, damaged
from converter.storage.local_file import SourceFile
from converter.tensors.tensor_info import Contents

CONTAINER = "torch legacy"

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


def can_read(file: SourceFile) -> bool:
    # The magic number takes 28 bytes in protocol 0, and fewer in other protocols.
    head = file.read(0, min(file.size, 64))
    # Most files that are not pickles are rejected here, which is fast.
    if head[:1] not in (b"\x80", b"L"):
        return False
    try:
        return bool(unpickle(head, file.name)[0] == _MAGIC)
    except ContainerError:
        return False


def load(file: SourceFile) -> Contents:
    reader = _Reader(file)
    reader.pickle()
    if reader.pickle() != _PROTOCOL:
        raise damaged(f"{file.name}: torch's legacy format with a protocol version other than {_PROTOCOL}")
    reader.pickle()
    globals_ = TorchGlobals()
    value = reader.pickle(globals_)
    storages = _storages(file, reader.pickle(), reader.refs, reader.pos)
    return contents_of(file, value, lambda ref: storages[ref.key], globals_.ignored)


class _Reader:
    """Reads consecutive pickles. The length of each one is only known when it was read."""

    def __init__(self, file: SourceFile) -> None:
        self._file, self.pos, self.refs = file, 0, StorageRefs()

    def pickle(self, globals_: Globals | None = None) -> Any:
        """Read the next pickle and return its value."""
        name, rest = f"{self._file.name}: pickle at byte {self.pos}", self._file.size - self.pos
        for limit in (256 << 10, 1 << 20, 4 << 20, MAX_PICKLE):
            data = self._file.read(self.pos, min(limit, rest))
            try:
                value, end = unpickle(data, name, globals_, self.refs.load)
            except TruncatedPickleError:
                if limit >= rest:
                    raise
            else:
                self.pos += end
                return value
        raise ContainerError(f"{name}: longer than {MAX_PICKLE} bytes", resave_step(data[:4096]))


def _storages(file: SourceFile, keys: Any, refs: StorageRefs, pos: int) -> dict[str, Storage]:
    """Locate the storages, which follow each other from byte `pos` in the order of `keys`."""
    storages: dict[str, Storage] = {}
    # Sorted lists show both duplicate and missing keys.
    if type(keys) is not list or any(type(key) is not str for key in keys) or sorted(keys) != sorted(refs):
        raise damaged(f"{file.name}: the storage list does not match the tensors")
    for key in keys:
        name, ref = f"storage {key!r}", refs[key]
        numel = int.from_bytes(file.read(pos, 8), "little", signed=True)
        if numel != ref.numel:
            raise damaged(f"{file.name}: {name}: {numel} elements, but the pickle says {ref.numel}")
        start, pos = pos + 8, pos + 8 + ref.nbytes
        if pos > file.size:
            raise damaged(f"{file.name}: truncated in {name}")
        storages[key] = Storage(file, (start, pos), ref.nbytes, ref.nbytes, name)
    return storages

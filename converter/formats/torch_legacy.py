"""torch.save's format before torch 1.6 (and still, on request): pickles in a row, then the storages.

The pickles: a magic number, the protocol version, facts about the machine, the object, the list of storage keys. Then,
a key at a time and in the order of that list, the count of elements (8 bytes) and the elements. Both are
little-endian on every machine: torch never looked at the machine's own order that it wrote down.
"""

from __future__ import annotations

from typing import Any

from converter.errors import ContainerError
from converter.formats import torch_pickle
from converter.formats.pickle_reader import MAX_PICKLE, Globals, TruncatedPickleError, unpickle
from converter.formats.torch_pickle import StorageRefs
from converter.storage.byte_range import DAMAGED, Storage
from converter.storage.local_file import SourceFile
from converter.tensors.tensor_info import Contents

CONTAINER = "torch legacy"

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
# The tar archive that torch wrote before 0.1.10 begins with one of these members.
_TAR_MEMBERS = (b"sys_info\0", b"pickle\0", b"tensors\0", b"storages\0")


def can_read(file: SourceFile) -> bool:
    return _is_tar(file) or _has_magic(file)


def load(file: SourceFile) -> Contents:
    if _is_tar(file):
        raise ContainerError(
            f"{file.name}: a tar archive as torch wrote before 0.1.10 (2017), which is not read",
            "where you trust the file, convert it: torch.save(torch.load(PATH, weights_only=False), NEW_PATH)",
        )
    reader = _Reader(file)
    reader.pickle()
    protocol = reader.pickle()
    if protocol != _PROTOCOL:
        raise ContainerError(
            f"{file.name}: torch's old format in a version other than {_PROTOCOL}, which is not known",
            "download or copy the file again",
        )
    reader.pickle()
    value = reader.pickle(torch_pickle.GLOBALS)
    storages = _storages(file, reader.pickle(), reader.refs, reader.pos)
    return torch_pickle.contents(file, value, lambda ref: storages[ref.key])


def _is_tar(file: SourceFile) -> bool:
    if file.size < 512:
        return False
    head = file.read(0, 512)
    return head[257:262] == b"ustar" and head.startswith(_TAR_MEMBERS)


def _has_magic(file: SourceFile) -> bool:
    # In protocol 0 the number is text, of 28 bytes; in the others it takes less.
    head = file.read(0, min(file.size, 64))
    # Cheaper than to try, for the files that are no pickle at all.
    if head[:1] not in (b"\x80", b"L"):
        return False
    try:
        return bool(unpickle(head, file.name)[0] == _MAGIC)
    except ContainerError:
        return False


class _Reader:
    """Reads pickle after pickle; how long one is shows only at its end."""

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        self.pos = 0
        self.refs = StorageRefs()
        self._data = b""

    def pickle(self, globals_: Globals | None = None) -> Any:
        """The next pickle's value."""
        start = self.pos
        length = 256 << 10
        while True:
            length = min(length, MAX_PICKLE, self._file.size - start)
            try:
                data = self._file.read(start, length)
                value, end = unpickle(data, f"{self._file.name}: pickle at byte {start}", globals_, self.refs.load)
            except TruncatedPickleError:
                if length == self._file.size - start:
                    raise
                if length == MAX_PICKLE:
                    raise ContainerError(
                        f"{self._file.name}: the pickle at byte {start} takes more than {MAX_PICKLE} bytes",
                        "no checkpoint needs that: do not trust this file",
                    ) from None
                length *= 4
            else:
                self.pos = start + end
                return value


def _storages(file: SourceFile, keys: Any, refs: StorageRefs, at: int) -> dict[str, Storage]:
    """Where each storage lies; `keys` is the order of those that follow byte `at`."""
    storages: dict[str, Storage] = {}
    # Sorted: neither list has one twice, and all that a tensor is in are there.
    if type(keys) is not list or any(type(key) is not str for key in keys) or sorted(keys) != sorted(refs):
        raise ContainerError(f"{file.name}: its list of storages is not that of its tensors", "download it again")
    for key in keys:
        ref = refs[key]
        numel = int.from_bytes(file.read(at, 8), "little", signed=True)
        if numel != ref.numel:
            raise ContainerError(
                f"{file.name}: storage {key!r}: {numel} elements, where the pickle says {ref.numel}", DAMAGED
            )
        at += 8
        if at + ref.nbytes > file.size:
            raise ContainerError(f"{file.name}: truncated in storage {key!r}", "download or copy the file again")
        storages[key] = Storage(file, (at, at + ref.nbytes), ref.nbytes, ref.nbytes, f"storage {key}")
        at += ref.nbytes
    return storages

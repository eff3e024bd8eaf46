"""torch.save's format since torch 1.6: a zip archive of a pickle and one member a storage.

<root>/data.pkl      the pickled object, each storage in it a persistent id
<root>/data/<key>    the bytes of a storage, as a rule stored and aligned
<root>/byteorder     "little" or "big"; files of torch before 2.1 lack it and are little

It is written opcode by opcode, without torch: protocol 2, nothing memoised. Each tensor is
`torch._utils._rebuild_tensor_v2` of a persistent id that names its storage (`archive/data/<index>`), an offset, a shape
and strides; types without a storage class of their own take `_rebuild_tensor_v3`.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Iterable, Mapping
from functools import partial
from typing import IO

from converter.errors import ContainerError
from converter.formats import torch_pickle
from converter.formats.pickle_reader import MAX_PICKLE, unpickle
from converter.formats.torch_pickle import StorageRef
from converter.formats.zip_directory import Directory, is_zip, read_directory, read_small
from converter.storage.byte_range import DAMAGED, Segment, Storage
from converter.storage.local_file import SourceFile
from converter.storage.stream import Copier, OnBytes, OnData
from converter.tensors.lazy_tensor import LazyTensor, nbytes
from converter.tensors.serialize import Outputs, segments_of
from converter.tensors.tensor_info import Contents, contiguous_strides

CONTAINER = "torch zip"

# Bytes of a zip member's local header before its name.
_LOCAL_HEADER = 30
_EMPTY_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def can_read(file: SourceFile) -> bool:
    if not is_zip(file):
        return False
    names = read_directory(file)
    # TorchScript archives have constants beside the data, and a loader of their own.
    return f"{names.root}/data.pkl" in names and f"{names.root}/constants.pkl" not in names


def load(file: SourceFile) -> Contents:
    archive = Archive(file)
    value, _ = unpickle(archive.pickle, archive.where, torch_pickle.GLOBALS, torch_pickle.StorageRefs().load)
    return torch_pickle.contents(file, value, archive.storage)


class Archive:
    """The members that saved objects and TorchScript modules have in common."""

    def __init__(self, file: SourceFile) -> None:
        self.file = file
        self.members: Directory = read_directory(file)
        self.root = self.members.root
        self.where = f"{file.name}: data.pkl"
        self.pickle = read_small(self.members[f"{self.root}/data.pkl"], MAX_PICKLE)
        self._big_endian = self._byteorder() == b"big"

    def _byteorder(self) -> bytes:
        name = f"{self.root}/byteorder"
        order = read_small(self.members[name], 16) if name in self.members else b"little"
        if order not in (b"little", b"big"):
            raise ContainerError(
                f"{self.file.name}: byteorder: {order!r} is neither little nor big", "download or copy the file again"
            )
        return order

    def storage(self, ref: StorageRef) -> Storage:
        """The member that holds `ref`'s bytes, checked to be as long as the pickle says."""
        name = f"{self.root}/data/{ref.key}"
        if name not in self.members:
            raise ContainerError(f"{self.file.name}: no member {name!r}, which data.pkl refers to", "download it again")
        storage = self.members[name]
        if storage.size != ref.nbytes:
            raise ContainerError(
                f"{self.file.name}: {name}: {storage.size} bytes, where data.pkl says {ref.nbytes}", DAMAGED
            )
        return storage._replace(big_endian=True) if self._big_endian else storage


def write_pth(fd: int, outputs: Outputs, count: OnBytes, seen: OnData | None = None) -> None:
    """Write the zip; ContainerError where a source is damaged, OSError where the system refuses to write."""
    with open(fd, "wb", closefd=False) as file, zipfile.ZipFile(file, "w") as archive:
        _add(archive, "data.pkl", [state_dict_pickle(outputs)])
        _add(archive, "byteorder", [b"little"])
        for index, value in enumerate(outputs.values()):
            _add(archive, f"data/{index}", segments_of([value]), nbytes(value), count, seen)
        _add(archive, "version", [b"3\n"])


def _add(
    archive: zipfile.ZipFile,
    name: str,
    segments: Iterable[Segment | memoryview],
    size: int = 0,
    count: OnBytes = lambda _: None,
    seen: OnData | None = None,
) -> None:
    # The date that zip gives to files without one: repeated runs give identical files.
    info = zipfile.ZipInfo(f"archive/{name}")
    # Data begins at multiples of 64 bytes, so that torch.load can map it; torch pads in the same way.
    assert archive.fp is not None
    large = size >= zipfile.ZIP64_LIMIT
    begin = archive.fp.tell() + _LOCAL_HEADER + len(info.filename) + 4 + (20 if large else 0)
    padding = -begin % 64
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=large) as member:
        copier = Copier(partial(_write, member, seen), count)
        copier.copy(segments)
        copier.flush()


def _write(member: IO[bytes], seen: OnData | None, full: memoryview) -> memoryview:
    """Write `full` and give its buffer back."""
    member.write(full)
    if seen is not None:
        seen(full)
    return memoryview(full.obj)


def state_dict_pickle(outputs: Mapping[str, LazyTensor]) -> bytes:
    """The content of `data.pkl` for these tensors, whose storages are numbered in their order."""
    items = b"".join(_text(name) + _tensor(value, index) for index, (name, value) in enumerate(outputs.items()))
    return b"\x80\x02" + _EMPTY_ORDERED_DICT + b"(" + items + b"u."


def _tensor(value: LazyTensor, index: int) -> bytes:
    count = math.prod(value.shape)
    if value.dtype.storage:
        rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
        storage = b"ctorch\n" + value.dtype.storage.encode() + b"\n"
        dtype = b""
    else:
        # An untyped storage counts bytes, and the type is told apart.
        rebuild = b"ctorch._utils\n_rebuild_tensor_v3\n"
        storage = b"ctorch.storage\nUntypedStorage\n"
        count *= value.dtype.itemsize
        dtype = b"ctorch\n" + value.dtype.name.encode() + b"\n"
    persistent_id = b"(" + _text("storage") + storage + _text(str(index)) + _text("cpu") + _int(count) + b"tQ"
    shape, strides = _ints(value.shape), _ints(contiguous_strides(value.shape))
    # Offset 0; requires no gradient; no backward hooks.
    arguments = persistent_id + _int(0) + shape + strides + b"\x89" + _EMPTY_ORDERED_DICT + dtype
    return rebuild + b"(" + arguments + b"tR"


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _ints(numbers: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_int, numbers)) + b"t"


def _int(number: int) -> bytes:
    if number < 2**31:
        return b"J" + struct.pack("<i", number)
    return b"\x8a\x08" + struct.pack("<q", number)

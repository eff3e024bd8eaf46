"""Reads and writes torch.save's format since torch 1.6: a zip archive of a pickle and one member per storage.

    <root>/data.pkl      the pickled object, in which persistent ids refer to storages
    <root>/data/<key>    the bytes of a storage, usually stored without compression and aligned
    <root>/byteorder     "little" or "big"; absent (and little) before torch 2.1

Reading describes tensors by their byte ranges. Writing assembles the pickle from its opcodes (protocol 2, without a
memo). Each tensor is a call of `torch._utils._rebuild_tensor_v2` with its storage, offset, shape and strides, or of
`_rebuild_tensor_v3` where its element type has no storage class.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Mapping
from typing import IO, Any

from converter.errors import ContainerError
from converter.formats.pickle_opcodes import resave_step
from converter.formats.pickle_reader import MAX_PICKLE, Globals, unpickle
from converter.formats.torch_contents import Resolver, contents_of
from converter.formats.torch_pickle import StorageRef, StorageRefs, TensorRecord, TorchGlobals
from converter.formats.zip_directory import is_zip, read_directory, read_small
from converter.storage.byte_range import Storage, damaged
from converter.storage.local_file import SourceFile
from converter.storage.stream import Copier, OnBytes, OnData
from converter.tensors.lazy_tensor import LazyTensor, nbytes
from converter.tensors.serialize import Outputs, segments_of
from converter.tensors.tensor_info import Contents, TensorInfo, contiguous_strides

CONTAINER = "torch zip"

_MAX_VERSION = 10  # kMaxSupportedFileFormatVersion of torch
_ALIGNMENT = 64  # of the bytes of a storage, as in torch.save, so that torch.load can map them
_LOCAL_HEADER_SIZE = 30  # of a zip member, before its name
_EMPTY_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def can_read(file: SourceFile) -> bool:
    if not is_zip(file):
        return False
    members = read_directory(file)
    # TorchScript archives also have constants; another loader reads them.
    return f"{members.root}/data.pkl" in members and f"{members.root}/constants.pkl" not in members


def load(file: SourceFile) -> Contents:
    archive, globals_ = Archive(file), TorchGlobals()
    value = archive.unpickled(globals_)
    contents = contents_of(file, value, archive.storage, globals_.ignored)
    if not archive.members.has_checksums:
        contents.notes = ("the file holds no checksums (CRC-32): damaged weights would not be noticed",)
    return contents


def load_tensor(file: SourceFile, key: str) -> TensorInfo:
    """Describe the tensor of a file that contains a single tensor, under the name `key`."""
    archive = Archive(file)
    record = archive.unpickled(TorchGlobals())
    if type(record) is not TensorRecord:
        raise damaged(f"{file.name}: holds no tensor, but {key!r} is expected there")
    return Resolver(file, archive.storage).tensor(key, record)


class Archive:
    """The members that archives of torch.save and of torch.jit.save both have."""

    def __init__(self, file: SourceFile) -> None:
        self.file = file
        self.members = read_directory(file)
        self.root = self.members.root
        self._check_version()
        self._big_endian = self._byteorder() == b"big"

    def unpickled(self, globals_: Globals) -> Any:
        """Return the saved object."""
        pickle = self.members.get(f"{self.root}/data.pkl")
        if pickle is None:
            raise damaged(f"{self.file.name}: no member data.pkl")
        is_large = pickle.size > MAX_PICKLE
        step = resave_step(self.file.read(pickle.offset, min(pickle.length, 4096))) if is_large else ""
        data = read_small(pickle, MAX_PICKLE, step)
        return unpickle(data, f"{self.file.name}: data.pkl", globals_, StorageRefs().load)[0]

    def _check_version(self) -> None:
        """Raise ContainerError for a version that torch refuses. Files of other programs may have no valid version."""
        version = self.members.get(f"{self.root}/version")
        text = version.read() if version and version.size < 64 else b""
        if text.strip().isdigit() and int(text) > _MAX_VERSION:
            raise ContainerError(
                f"{self.file.name}: archive version {int(text)}; torch knows versions up to {_MAX_VERSION}",
                "the file is damaged, or from a newer torch: load it there and save its state dict with torch 2",
            )

    def _byteorder(self) -> bytes:
        member = self.members.get(f"{self.root}/byteorder")
        order = read_small(member, 16) if member else b"little"
        if order not in (b"little", b"big"):
            raise damaged(f"{self.file.name}: byteorder: {order!r} is neither little nor big")
        return order

    def storage(self, ref: StorageRef) -> Storage:
        """Return the member with the bytes of a storage; ContainerError if it is missing or has another size."""
        name = f"{self.root}/data/{ref.key}"
        storage = self.members.get(name)
        if storage is None:
            raise damaged(f"{self.file.name}: no member {name!r}, which data.pkl refers to")
        if storage.size != ref.nbytes:
            raise damaged(f"{self.file.name}: {name}: {storage.size} bytes, but data.pkl says {ref.nbytes}")
        return storage._replace(big_endian=True) if self._big_endian else storage


def write_pth(fd: int, outputs: Outputs, on_bytes: OnBytes, on_data: OnData | None = None) -> None:
    """Write a file that torch.load reads as a state dict.

    Args:
        fd: Descriptor of the file, open for writing.
        outputs: The tensors by name, in the order in which they are written.
        on_bytes: Called with the number of bytes of tensor data that were written.
        on_data: Called with each chunk of tensor data, in order.
    """
    with open(fd, "wb", closefd=False) as file, zipfile.ZipFile(file, "w") as archive:
        writer = _Writer(archive, on_bytes, on_data)
        writer.write("data.pkl", state_dict_pickle(outputs))
        writer.write("byteorder", b"little")
        for index, value in enumerate(outputs.values()):
            writer.write_storage(f"data/{index}", value)
        writer.write("version", b"3\n")


class _Writer:
    """Adds uncompressed, aligned members to an archive."""

    def __init__(self, archive: zipfile.ZipFile, on_bytes: OnBytes, on_data: OnData | None) -> None:
        self._archive, self._on_data = archive, on_data
        # One for all members, as it remembers which source storages it has checked.
        self._copier = Copier(self._exchange, on_bytes)
        self._member: IO[bytes]

    def write(self, name: str, data: bytes) -> None:
        with self._open(name, len(data)) as member:
            member.write(data)

    def write_storage(self, name: str, value: LazyTensor) -> None:
        with self._open(name, nbytes(value)) as self._member:
            self._copier.copy(segments_of([value]))
            self._copier.flush()

    def _open(self, name: str, size: int) -> IO[bytes]:
        # ZipInfo's default date is constant: repeated runs write identical files.
        info = zipfile.ZipInfo(f"archive/{name}")
        is_large = size >= zipfile.ZIP64_LIMIT
        assert self._archive.fp is not None
        data_offset = self._archive.fp.tell() + _LOCAL_HEADER_SIZE + len(info.filename) + 4 + (20 if is_large else 0)
        padding = -data_offset % _ALIGNMENT
        # Padded with the same extra field as in torch.save.
        info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        return self._archive.open(info, "w", force_zip64=is_large)

    def _exchange(self, full: memoryview) -> memoryview:
        """Write a buffer and return it for reuse."""
        self._member.write(full)
        if self._on_data is not None:
            self._on_data(full)
        return memoryview(full.obj)


def state_dict_pickle(outputs: Mapping[str, LazyTensor]) -> bytes:
    """Return the content of `data.pkl`. Storages are numbered in the order of the tensors."""
    items = b"".join(_string(name) + _tensor(value, index) for index, (name, value) in enumerate(outputs.items()))
    return b"\x80\x02" + _EMPTY_ORDERED_DICT + b"(" + items + b"u."


def _tensor(value: LazyTensor, index: int) -> bytes:
    numel, version, dtype = math.prod(value.shape), b"2", b""
    storage = f"ctorch\n{value.dtype.storage}\n".encode()
    if not value.dtype.storage:
        # The elements of an untyped storage are bytes; the element type of the tensor is a separate argument.
        numel, version, dtype = numel * value.dtype.itemsize, b"3", f"ctorch\n{value.dtype.name}\n".encode()
        storage = b"ctorch.storage\nUntypedStorage\n"
    persistent_id = b"(" + _string("storage") + storage + _string(str(index)) + _string("cpu") + _int(numel) + b"tQ"
    shape, strides = _ints(value.shape), _ints(contiguous_strides(value.shape))
    # Offset 0, requires_grad False, no backward hooks.
    arguments = persistent_id + _int(0) + shape + strides + b"\x89" + _EMPTY_ORDERED_DICT + dtype
    return b"ctorch._utils\n_rebuild_tensor_v" + version + b"\n(" + arguments + b"tR"


def _string(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _ints(numbers: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_int, numbers)) + b"t"


def _int(number: int) -> bytes:
    if number < 2**31:
        return b"J" + struct.pack("<i", number)
    return b"\x8a\x08" + struct.pack("<q", number)

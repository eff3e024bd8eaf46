"""NumPy's .npz: a zip archive of one .npy file a tensor, each a short header, then the elements."""

import re
from typing import Any

from converter.errors import ContainerError
from converter.formats.zip_directory import is_zip, read_directory
from converter.storage.byte_range import DAMAGED, Storage
from converter.storage.local_file import SourceFile
from converter.tensors.dtypes import BY_NAME
from converter.tensors.tensor_info import Contents, TensorInfo, contiguous_strides, make_tensor

CONTAINER = "npz"

_DTYPES = {"<f8": "float64", "<f4": "float32", "<f2": "float16", "<i8": "int64", "<i4": "int32", "|u1": "uint8"}
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '(...)', 'fortran_order': (True|False), 'shape': \(([0-9, ]*)\), \} *\n", re.DOTALL
)


def can_read(file: SourceFile) -> bool:
    """By content: a zip archive, and nothing in it but arrays."""
    return is_zip(file) and all(name.endswith(".npy") for name in read_directory(file))


def load(file: SourceFile) -> Contents:
    """The arrays as tensors: their types, shapes and places, with no element read."""
    members = read_directory(file)
    return {name.removesuffix(".npy"): _tensor(name.removesuffix(".npy"), members[name]) for name in members}


def _tensor(key: str, member: Storage) -> TensorInfo:
    head = member.read() if member.deflated else member.file.read(member.offset, min(member.length, 4096))
    found = _HEADER.match(head)
    if found is None or found[1].decode() not in _DTYPES:
        raise ContainerError(f"{member.file.name}: {member.name}: no .npy file of a type that is known\n{DAMAGED}")
    dtype = BY_NAME[_DTYPES[found[1].decode()]]
    shape = tuple(int(size) for size in found[3].split(b",") if size.strip())
    strides = contiguous_strides(shape[::-1])[::-1] if found[2] == b"True" else contiguous_strides(shape)
    # The header is padded so that the elements begin at a multiple of 64 bytes.
    return make_tensor(key, dtype, shape, member, found.end() // dtype.itemsize, strides)


def reference(path: str) -> dict[str, Any]:
    """The same as torch tensors, read by NumPy itself: what dsocr-verify compares a conversion with."""
    import numpy
    import torch

    with numpy.load(path) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}

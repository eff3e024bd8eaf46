"""Loader for NumPy's .npz: a zip archive with one .npy file per array, each a short header and the elements."""

import re
from typing import Any

from converter.errors import ContainerError
from converter.formats.zip_directory import is_zip, read_directory
from converter.storage.byte_range import DAMAGED, Storage
from converter.storage.local_file import SourceFile
from converter.tensors.dtypes import BY_NAME
from converter.tensors.tensor_info import Contents, TensorInfo, checked_tensor_info, contiguous_strides

CONTAINER = "npz"

_DTYPES = {"<f8": "float64", "<f4": "float32", "<f2": "float16", "<i8": "int64", "<i4": "int32", "|u1": "uint8"}
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '(...)', 'fortran_order': (True|False), 'shape': \(([0-9, ]*)\), \} *\n", re.DOTALL
)


def can_read(file: SourceFile) -> bool:
    """Whether the file is a zip archive of .npy files and nothing else."""
    return is_zip(file) and all(name.endswith(".npy") for name in read_directory(file))


def load(file: SourceFile) -> Contents:
    """Describe the arrays as tensors; no element is read."""
    members = read_directory(file)
    return {name.removesuffix(".npy"): _tensor(name.removesuffix(".npy"), members[name]) for name in members}


def _tensor(key: str, member: Storage) -> TensorInfo:
    head = member.read() if member.deflated else member.file.read(member.offset, min(member.length, 4096))
    header = _HEADER.match(head)
    if header is None or header[1].decode() not in _DTYPES:
        raise ContainerError(f"{member.file.name}: {member.name}: not a .npy file of a supported type", DAMAGED)
    dtype = BY_NAME[_DTYPES[header[1].decode()]]
    shape = tuple(int(size) for size in header[3].split(b",") if size.strip())
    strides = contiguous_strides(shape[::-1])[::-1] if header[2] == b"True" else contiguous_strides(shape)
    # The header is padded so that the elements begin at a multiple of 64 bytes.
    return checked_tensor_info(key, dtype, shape, member, header.end() // dtype.itemsize, strides)


def reference(path: str) -> dict[str, Any]:
    """The arrays read by NumPy itself; dsocr-verify compares a conversion with them."""
    import numpy
    import torch

    with numpy.load(path) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}

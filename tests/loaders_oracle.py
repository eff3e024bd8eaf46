"""Builds torch tensors from the loaders' descriptions, to compare them with those of the libraries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from converter.formats.registry import open_file
from converter.storage.local_file import LocalFile
from converter.tensors.tensor_info import Contents, TensorInfo

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.bool, torch.complex64, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
]


def opened(path: Path, container: str) -> Contents:
    """The file's contents; fails unless the loader called `container` read it."""
    name, contents = open_file(LocalFile(path))
    assert name == container
    return contents


def to_torch(tensor: TensorInfo) -> torch.Tensor:
    """Read a described tensor."""
    data = tensor.storage.read()
    if tensor.storage.big_endian:
        size = tensor.dtype.itemsize
        data = b"".join(data[i : i + size][::-1] for i in range(0, len(data), size))
    dtype = getattr(torch, tensor.dtype.name)
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    usable = flat[tensor.byte_offset :]
    usable = usable[: len(usable) // tensor.dtype.itemsize * tensor.dtype.itemsize].clone().view(dtype)
    return torch.as_strided(usable, tensor.shape, tensor.strides)


def assert_same(ours: Any, theirs: Any, key: Any = None) -> None:
    """Check keys and their order, dtype, shape and bytes of each tensor; other values are scalars or None."""
    if isinstance(theirs, dict) and not has_tensors(theirs):
        assert not ours
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for name in theirs:
            assert_same(ours[name], theirs[name], name)
    elif isinstance(theirs, torch.Tensor):
        assert ours.key == str(key)
        made = to_torch(ours)
        assert (made.dtype, made.shape) == (theirs.dtype, theirs.shape)
        assert raw(made) == raw(theirs.detach()), key
        if ours.is_raw_contiguous:
            data = ours.storage.file.read(ours.storage.offset + ours.byte_offset, ours.nbytes)
            assert data == raw(theirs.detach())
    else:
        assert ours is None or ours == theirs


def has_tensors(value: Any) -> bool:
    """Whether a nested dict or list has tensors in it; those without any are left out."""
    if isinstance(value, dict | list | tuple):
        return any(map(has_tensors, value.values() if isinstance(value, dict) else value))
    return isinstance(value, torch.Tensor)


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> Path:
    """The file with its bytes changed."""
    path.write_bytes(change(path.read_bytes()))
    return path

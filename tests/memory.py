"""Tensors of a checkpoint in memory, and the bytes that a copy of them gives."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch
from memory_file import Memory

from converter.storage.byte_range import Segment, Storage
from converter.storage.stream import Copier
from converter.tensors.dtypes import BY_NAME
from converter.tensors.lazy_tensor import LazyTensor, lazy_read
from converter.tensors.tensor_info import TensorInfo, checked_tensor_info


def raw(tensor: torch.Tensor) -> bytes:
    """A tensor's elements in order, as bytes."""
    # Copied: of one element the stride may be any, which `contiguous` leaves as it is.
    return bytes(tensor.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8).numpy().tobytes())


def stored(tensor: torch.Tensor, key: str = "x", *, damaged: bool = False) -> TensorInfo:
    """`tensor` as a loader would describe it, strides and offset too, its storage not at the file's beginning."""
    data = raw(torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()))
    crc = zlib.crc32(data) ^ damaged
    storage = Storage(Memory(b"head" + data + b"tail"), (4, 4 + len(data)), len(data), len(data), key, crc)
    dtype = BY_NAME[str(tensor.dtype).removeprefix("torch.")]
    return checked_tensor_info(
        key, dtype, tuple(tensor.shape), storage, tensor.storage_offset(), tuple(tensor.stride())
    )


def expr(tensor: torch.Tensor, key: str = "x") -> LazyTensor:
    return lazy_read(stored(tensor, key))


def copied(segments: Iterable[Segment | memoryview]) -> bytes:
    """What a Copier writes of `pieces`."""
    result = bytearray()

    def exchange(full: memoryview) -> memoryview:
        result.extend(full)
        return memoryview(full.obj)

    copier = Copier(exchange, lambda count: None)
    copier.copy(segments)
    copier.flush()
    return bytes(result)

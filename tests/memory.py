"""Tensors of a checkpoint that lies in memory, and the bytes that a copy of them gives."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch
from memory_file import Memory

from converter.checkpoint import Storage, Tensor, make_tensor
from converter.copier import Copier
from converter.dtypes import BY_NAME
from converter.mapping.expr import Expr, Piece, read


def raw(tensor: torch.Tensor) -> bytes:
    """A tensor's elements in order, as bytes."""
    # Copied: of one element the stride may be any, which `contiguous` leaves as it is.
    return bytes(tensor.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8).numpy().tobytes())


def stored(tensor: torch.Tensor, key: str = "x", *, damaged: bool = False) -> Tensor:
    """`tensor` as a loader would describe it, strides and offset too, its storage not at the file's beginning."""
    data = raw(torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()))
    crc = zlib.crc32(data) ^ damaged
    storage = Storage(Memory(b"head" + data + b"tail"), (4, 4 + len(data)), len(data), len(data), key, crc)
    dtype = BY_NAME[str(tensor.dtype).removeprefix("torch.")]
    return make_tensor(key, dtype, tuple(tensor.shape), storage, tensor.storage_offset(), tuple(tensor.stride()))


def expr(tensor: torch.Tensor, key: str = "x") -> Expr:
    return read(stored(tensor, key))


def copied(pieces: Iterable[Piece | memoryview]) -> bytes:
    """What a Copier writes of `pieces`."""
    result = bytearray()

    def exchange(full: memoryview) -> memoryview:
        result.extend(full)
        return memoryview(full.obj)

    copier = Copier(exchange, lambda count: None)
    copier.copy(pieces)
    copier.flush()
    return bytes(result)

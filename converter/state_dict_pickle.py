"""The pickle that torch.save writes for an ordered dict of tensors, written opcode by opcode, without torch.

Protocol 2, nothing memoised. Each tensor is `torch._utils._rebuild_tensor_v2` of a persistent id that names its storage
(`archive/data/<index>`), an offset, a shape and strides; types without a storage class take `_rebuild_tensor_v3`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping

from converter.checkpoint import contiguous_strides
from converter.mapping.expr import Expr

_EMPTY_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def state_dict_pickle(outputs: Mapping[str, Expr]) -> bytes:
    """The content of `data.pkl` for these tensors, whose storages are numbered in their order."""
    items = b"".join(_text(name) + _tensor(value, index) for index, (name, value) in enumerate(outputs.items()))
    return b"\x80\x02" + _EMPTY_ORDERED_DICT + b"(" + items + b"u."


def _tensor(value: Expr, index: int) -> bytes:
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

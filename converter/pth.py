"""A plan written as torch.save would write an ordered dict of tensors: a zip of a pickle and stored members.

The pickle is written opcode by opcode, without torch: protocol 2, nothing memoised. Each tensor in it is
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

from converter.checkpoint import contiguous_strides
from converter.copier import Copier, Count, Seen
from converter.mapping.expr import Expr, Piece, nbytes
from converter.write import Outputs, pieces_of

# Bytes of a zip member's local header before its name.
_LOCAL_HEADER = 30
_EMPTY_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def write_pth(fd: int, outputs: Outputs, count: Count, seen: Seen | None = None) -> None:
    """Write the zip; ContainerError where a source is damaged, OSError where the system refuses to write."""
    with open(fd, "wb", closefd=False) as file, zipfile.ZipFile(file, "w") as archive:
        _add(archive, "data.pkl", [state_dict_pickle(outputs)])
        _add(archive, "byteorder", [b"little"])
        for index, value in enumerate(outputs.values()):
            _add(archive, f"data/{index}", pieces_of([value]), nbytes(value), count, seen)
        _add(archive, "version", [b"3\n"])


def _add(
    archive: zipfile.ZipFile,
    name: str,
    pieces: Iterable[Piece | memoryview],
    size: int = 0,
    count: Count = lambda _: None,
    seen: Seen | None = None,
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
        copier.copy(pieces)
        copier.flush()


def _write(member: IO[bytes], seen: Seen | None, full: memoryview) -> memoryview:
    """Write `full` and give its buffer back."""
    member.write(full)
    if seen is not None:
        seen(full)
    return memoryview(full.obj)


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

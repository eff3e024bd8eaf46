"""Files as torch.save writes them, of parts that torch.save would not put into them."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from hostile.case import State

MAGIC, PROTOCOL, SYSTEM = 0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "protocol_version": 1001}
FLOAT = torch.FloatStorage


class Raw:
    """Opcodes that leave one value on the stack, to stand anywhere in a value that `pickled` pickles."""

    def __init__(self, opcodes: bytes) -> None:
        self.opcodes = opcodes


class Id:
    """A persistent id."""

    def __init__(self, *pid: Any) -> None:
        self.pid: Any = pid


class Rebuilt:
    """What a function of torch makes of arguments when the pickle is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


class _Pickler(pickle._Pickler):
    # The standard library's Pickler in Python, whose stream others may write into.
    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)
    dispatch[Raw] = lambda self, raw: self.write(raw.opcodes)

    def persistent_id(self, obj: Any) -> Any:
        return obj.pid if type(obj) is Id else None


def pickled(value: Any, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol).dump(value)
    return buffer.getvalue()


def opcodes(value: Any) -> bytes:
    """Those that leave `value` on the stack, and use no memo."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, 2)
    pickler.fast = True
    pickler.dump(value)
    return buffer.getvalue()[2:-1]


def named(name: str) -> Raw:
    """A global `module.name`, by GLOBAL."""
    module, _, attribute = name.rpartition(".")
    return Raw(f"c{module}\n{attribute}\n".encode())


def call(function: str | Raw, *arguments: Any) -> Raw:
    """What a global, or what stands for one, returns."""
    callee = named(function) if isinstance(function, str) else function
    return Raw(callee.opcodes + opcodes(arguments) + b"R")


# ---- values: state dicts whose tensors are described as we like


def record(
    key: str,
    shape: Sequence[Any],
    strides: Sequence[Any],
    offset: Any = 0,
    *,
    storage: Any = FLOAT,
    numel: Any = None,
    dtype: Any = None,
    more: tuple[Any, ...] = (),
) -> Rebuilt:
    """A tensor of the storage `key`; with `dtype`, of that element type."""
    if numel is None:
        numel = torch.Size(shape).numel()
    arguments = (Id("storage", storage, key, "cpu", numel), offset, tuple(shape), tuple(strides), False, {})
    if dtype is None:
        return Rebuilt(torch._utils._rebuild_tensor_v2, *arguments, *more)
    return Rebuilt(torch._utils._rebuild_tensor_v3, *arguments, dtype, *more)


def described(state: State) -> tuple[dict[str, Any], dict[str, bytes]]:
    """A state dict as records, one storage of its own for each tensor, and the storages' bytes: all to be changed."""
    records, storages = {}, {}
    for number, (name, tensor) in enumerate(state.items()):
        key = f"{number}"
        records[name] = record(key, tensor.shape, tensor.contiguous().stride())
        storages[key] = tensor.contiguous().numpy().tobytes()
    return records, storages


# ---- the two containers


def zipped(data: bytes, storages: Mapping[str, bytes], more: Mapping[str, bytes] | None = None) -> bytes:
    """The zip that holds a pickle and the storages; `more` are further members or others' replacements."""
    members = {"data.pkl": data, "byteorder": b"little", "version": b"3\n"}
    members |= {f"data/{key}": content for key, content in storages.items()} | dict(more or {})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            # Deflated where that is what makes it small.
            method = zipfile.ZIP_DEFLATED if len(content) > 1 << 20 else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content, method)
    return buffer.getvalue()


def legacy(
    data: bytes, storages: Mapping[str, bytes], pickles: Mapping[int, bytes] | None = None, itemsize: int = 4
) -> bytes:
    """The file of five pickles and the storages; `pickles` replaces some of the five, counted from 1."""
    parts = [pickled(MAGIC), pickled(PROTOCOL), pickled(SYSTEM), data, pickled(list(storages))]
    for number, content in (pickles or {}).items():
        parts[number - 1] = content
    for content in storages.values():
        parts.append(struct.pack("<q", len(content) // itemsize) + content)
    return b"".join(parts)


def as_file(value: Any, storages: Mapping[str, bytes], form: str, protocol: int = 2) -> bytes:
    """Either container of a value."""
    container: Callable[[bytes, Mapping[str, bytes]], bytes] = zipped if form == "zip" else legacy
    return container(pickled(value, protocol), storages)

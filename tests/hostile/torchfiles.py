"""Builds files in torch.save's formats from arbitrary parts."""

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
    """Opcodes that push one value; can be anywhere in a value that `pickled` pickles."""

    def __init__(self, opcodes: bytes) -> None:
        self.opcodes = opcodes


class Id:
    """A persistent id."""

    def __init__(self, *pid: Any) -> None:
        self.pid: Any = pid


class Rebuilt:
    """A call of a function of torch."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


class _Pickler(pickle._Pickler):
    # The Python implementation of Pickler, whose stream can be written to.
    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)
    dispatch[Raw] = lambda self, raw: self.write(raw.opcodes)

    def persistent_id(self, obj: Any) -> Any:
        return obj.pid if type(obj) is Id else None


def pickled(value: Any, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol).dump(value)
    return buffer.getvalue()


def opcodes(value: Any) -> bytes:
    """Opcodes that push `value` without a memo."""
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
    """A call of a global."""
    callee = named(function) if isinstance(function, str) else function
    return Raw(callee.opcodes + opcodes(arguments) + b"R")


# ---- state dicts with arbitrary records


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
    """A state dict as records with one storage for each tensor, and the storages' bytes; the caller may change both."""
    records, storages = {}, {}
    for number, (name, tensor) in enumerate(state.items()):
        key = f"{number}"
        records[name] = record(key, tensor.shape, tensor.contiguous().stride())
        storages[key] = tensor.contiguous().numpy().tobytes()
    return records, storages


# ---- the two formats


def zipped(data: bytes, storages: Mapping[str, bytes], more: Mapping[str, bytes] | None = None) -> bytes:
    """A zip of a pickle and storages; `more` adds or replaces members."""
    members = {"data.pkl": data, "byteorder": b"little", "version": b"3\n"}
    members |= {f"data/{key}": content for key, content in storages.items()} | dict(more or {})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            # Large members are deflated.
            method = zipfile.ZIP_DEFLATED if len(content) > 1 << 20 else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content, method)
    return buffer.getvalue()


def legacy(
    data: bytes, storages: Mapping[str, bytes], pickles: Mapping[int, bytes] | None = None, itemsize: int = 4
) -> bytes:
    """A legacy file of five pickles and storages; `pickles` replaces pickles by number, from 1."""
    parts = [pickled(MAGIC), pickled(PROTOCOL), pickled(SYSTEM), data, pickled(list(storages))]
    for number, content in (pickles or {}).items():
        parts[number - 1] = content
    for content in storages.values():
        parts.append(struct.pack("<q", len(content) // itemsize) + content)
    return b"".join(parts)


def as_file(value: Any, storages: Mapping[str, bytes], form: str, protocol: int = 2) -> bytes:
    """A value in either format."""
    container: Callable[[bytes, Mapping[str, bytes]], bytes] = zipped if form == "zip" else legacy
    return container(pickled(value, protocol), storages)

"""Reads and writes GGUF: a header with keys, values and descriptions of tensors, and the aligned bytes of the tensors.

The format is documented at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Like llama.cpp, the reader
refuses nested arrays, and tensors whose data is not in the order of the header. It also refuses bytes after the last
tensor. Shapes are stored in reverse order.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from itertools import cycle

from converter.errors import ContainerError
from converter.formats import strict_json
from converter.storage.byte_range import damaged
from converter.storage.local_file import SourceFile
from converter.storage.stream import OnBytes, OnData
from converter.tensors.dtypes import BY_NAME, DType, quantised
from converter.tensors.lazy_tensor import Generated, LazyTensor, nbytes
from converter.tensors.serialize import Outputs, write_tensors
from converter.tensors.tensor_info import Contents, TensorInfo, plain_tensor_info

CONTAINER = "GGUF"

MAX_HEADER = strict_json.MAX_BYTES
MAX_ENTRIES = 1 << 16  # of keys, and of tensors; models have a few thousand
MAX_DIMENSIONS = 4
_MAX_NAME = 65_535  # bytes of a key, as in the format's specification
_MAX_NUMEL = 1 << 63
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT_KEY, _ALIGNMENT = "general.alignment", 32
_WINDOW_NBYTES = 64 << 10  # bytes of the header that are read at a time

# Types of values, and the `struct` codes of scalar types by their number.
_UINT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 6, 7, 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", _UINT32: "I", 5: "i", _FLOAT32: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d"}
# Element types of tensors by their number.
_PLAIN = {0: "float32", 1: "float16", 24: "int8", 25: "int16", 26: "int32", 27: "int64", 28: "float64", 30: "bfloat16"}
# Quantised element types by their number: name, elements of a block, bytes of a block.
_QUANTISED = {
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}  # fmt: skip
_DTYPES = {number: BY_NAME[name] for number, name in _PLAIN.items()}
_DTYPES |= {number: quantised(*described) for number, described in _QUANTISED.items()}
_TYPE_NUMBERS = {dtype: number for number, dtype in _DTYPES.items()}


def can_read(file: SourceFile) -> bool:
    return file.size >= len(_MAGIC) and file.read(0, len(_MAGIC)) == _MAGIC


def load(file: SourceFile) -> Contents:
    header = _Header(file)
    num_tensors, num_keys = _read_counts(header)
    alignment = _read_alignment(header, _read_keys(header, num_keys))
    entries = [_read_tensor(header) for _ in range(num_tensors)]
    tensors: dict[str, TensorInfo] = {}
    data_start = pos = _aligned(header.pos, alignment)
    for name, dtype, shape, offset in entries:
        if name in tensors:
            raise header.damaged(f"tensor {name!r} is there twice")
        begin = _aligned(pos, alignment)
        if data_start + offset != begin:
            raise header.damaged(f"tensor {name!r} is at byte {offset} of the data; expected {begin - data_start}")
        tensors[name] = tensor = plain_tensor_info(file, name, dtype, shape, begin)
        pos = begin + tensor.nbytes
    if not tensors:
        raise ContainerError(
            f"{file.name}: a GGUF file without tensors",
            "take the file with the weights: for the vision encoder of DeepSeek-OCR, its mmproj file",
        )
    if not pos <= file.size <= _aligned(pos, alignment):
        problem = "truncated" if pos > file.size else "extra bytes at the end"
        raise header.damaged(f"{problem}: expected {pos} bytes, found {file.size}")
    return dict(tensors)


def stored_keys(file: SourceFile) -> dict[str, bytes]:
    """Return the stored bytes of the values of a header by key, each with its type, without the alignment."""
    header = _Header(file)
    _, num_keys = _read_counts(header)
    values = _read_keys(header, num_keys).items()
    return {key: file.read(offset, length) for key, (offset, length) in values if key != _ALIGNMENT_KEY}


def decode_value(stored: bytes) -> object:
    """Decode a value of `stored_keys`: a number, a bool or a list of these; None for strings."""
    (kind,) = struct.unpack_from("<I", stored)
    if kind in _SCALARS:
        return struct.unpack_from(f"<{_SCALARS[kind]}", stored, 4)[0]
    if kind == _ARRAY:
        kind, count = struct.unpack_from("<IQ", stored, 4)
        if kind in _SCALARS:
            return list(struct.unpack_from(f"<{count}{_SCALARS[kind]}", stored, 16))
    return None


class _Header:
    """Reads a header of at most `MAX_HEADER` bytes sequentially, through a small buffer."""

    def __init__(self, file: SourceFile) -> None:
        self.file, self.pos = file, 0
        self._window, self._window_start = b"", 0

    def damaged(self, why: str) -> ContainerError:
        return damaged(f"{self.file.name}: damaged GGUF file: {why}")

    def skip(self, length: int) -> None:
        self.pos += length
        if self.pos > self.file.size:
            raise self.damaged(f"truncated: its header exceeds its size of {self.file.size} bytes")
        if self.pos > MAX_HEADER:
            raise self.damaged(f"a header of more than {MAX_HEADER} bytes, the limit")

    def read(self, length: int) -> bytes:
        begin = self.pos
        self.skip(length)
        if not self._window_start <= begin <= self.pos <= self._window_start + len(self._window):
            self._window_start = begin
            self._window = self.file.read(begin, max(length, min(_WINDOW_NBYTES, self.file.size - begin)))
        return self._window[begin - self._window_start : self.pos - self._window_start]

    def number(self, code: str) -> int:
        (value,) = struct.unpack(f"<{code}", self.read(struct.calcsize(code)))
        return int(value)

    def text(self, limit: int) -> str:
        length = self.number("Q")
        if length > limit:
            raise self.damaged(f"a name of {length} bytes; the limit is {limit}")
        try:
            return self.read(length).decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"a name that is not UTF-8 ({error})") from None


def _read_counts(header: _Header) -> tuple[int, int]:
    """Skip the magic, check the version, and return the number of tensors and of keys."""
    header.skip(len(_MAGIC))
    version = header.number("I")
    if version and not version & 0xFFFF:
        raise ContainerError(
            f"{header.file.name}: a big-endian GGUF file, for other processors",
            "take the little-endian file, or convert it with the package gguf: gguf-convert-endian FILE little",
        )
    if version not in _VERSIONS:
        raise ContainerError(
            f"{header.file.name}: GGUF version {version}; supported are {' and '.join(map(str, _VERSIONS))}",
            "convert the model again with a current llama.cpp",
        )
    counts = header.number("Q"), header.number("Q")
    for count, what in zip(counts, ("tensors", "keys"), strict=True):
        if count > MAX_ENTRIES:
            raise header.damaged(f"{count} {what}; the limit is {MAX_ENTRIES}")
    return counts


def _read_keys(header: _Header, count: int) -> dict[str, tuple[int, int]]:
    """Read the keys and skip the values; return the offset and the length of each value, including its type."""
    keys: dict[str, tuple[int, int]] = {}
    for _ in range(count):
        key = header.text(_MAX_NAME)
        if key in keys:
            raise header.damaged(f"the key {key!r} is there twice")
        begin = header.pos
        _skip_value(header, key)
        keys[key] = begin, header.pos - begin
    return keys


def _read_alignment(header: _Header, keys: Mapping[str, tuple[int, int]]) -> int:
    """Return the alignment of the tensors."""
    if _ALIGNMENT_KEY not in keys:
        return _ALIGNMENT
    begin, length = keys[_ALIGNMENT_KEY]
    kind, alignment = struct.unpack("<II", header.file.read(begin, 8)) if length == 8 else (0, 0)
    if kind != _UINT32 or not alignment or alignment & (alignment - 1):
        raise header.damaged(f"{_ALIGNMENT_KEY} must be an unsigned 32-bit power of two")
    return int(alignment)


def _skip_value(header: _Header, key: str) -> None:
    kind, count = header.number("I"), 1
    if kind == _ARRAY:
        kind, count = header.number("I"), header.number("Q")
    if kind == _STRING:
        for _ in range(count):
            header.skip(header.number("Q"))
    elif kind in _SCALARS:
        header.skip(count * struct.calcsize(_SCALARS[kind]))
    else:
        what = "nested arrays" if kind == _ARRAY else f"the unknown type {kind}"
        raise header.damaged(f"the key {key!r} has {what}")


def _read_tensor(header: _Header) -> tuple[str, DType, tuple[int, ...], int]:
    """Read the entry of a tensor: its name, type, shape and offset."""
    name = header.text(_MAX_NAME)
    num_dimensions = header.number("I")
    if num_dimensions > MAX_DIMENSIONS:
        raise header.damaged(f"tensor {name!r} has {num_dimensions} dimensions; the limit is {MAX_DIMENSIONS}")
    shape = tuple(reversed([header.number("Q") for _ in range(num_dimensions)]))
    number = header.number("I")
    if number not in _DTYPES:
        raise ContainerError(
            f"{header.file.name}: tensor {name!r} has the unknown type {number}",
            f"supported are {', '.join(dtype.name for dtype in _DTYPES.values())}",
        )
    dtype = _DTYPES[number]
    if math.prod(shape) >= _MAX_NUMEL:
        raise header.damaged(f"tensor {name!r} has the impossible shape {list(shape)}")
    if dtype.block and (not shape or shape[-1] % dtype.block[0]):
        raise header.damaged(f"tensor {name!r} of shape {list(shape)} does not fill blocks of {dtype.name}")
    return name, dtype, shape, header.number("Q")


def _aligned(pos: int, alignment: int) -> int:
    return pos + -pos % alignment


# A value of a key: a string, a bool, an unsigned 32-bit integer, a 32-bit float, a list of floats, or the stored bytes
# of a value with its type.
Value = str | bool | int | float | list[float] | bytes


def write_gguf(
    fd: int, outputs: Outputs, keys: Mapping[str, Value], on_bytes: OnBytes, on_data: OnData | None = None
) -> None:
    """Write a GGUF file, version 3.

    Args:
        fd: Descriptor of the file, open for writing.
        outputs: The tensors by name, in the order in which they are written.
        keys: The keys and values of the header.
        on_bytes: Called with the number of bytes of tensor data that were written.
        on_data: Called with each chunk of tensor data, in order.

    Raises:
        ContainerError: A source file is damaged.
        OSError: The file cannot be written.
    """
    header = _make_header(outputs, keys)
    padding = [-nbytes(value) % _ALIGNMENT for value in outputs.values()]
    parts = [part for value, size in zip(outputs.values(), padding, strict=True) for part in (value, _zeros(size))]
    forward = _without_padding(on_data, map(nbytes, parts)) if on_data is not None else None
    write_tensors(fd, header + bytes(-len(header) % _ALIGNMENT), parts, on_bytes, forward)


def _zeros(size: int) -> LazyTensor:
    return Generated(BY_NAME["uint8"], (size,), lambda: bytes(size))


def _without_padding(on_data: OnData, sizes: Iterable[int]) -> OnData:
    """Return a callback that only forwards tensors; `sizes` are those of a tensor, its padding, the next tensor, ..."""
    parts = zip(sizes, cycle((True, False)), strict=False)
    left, is_tensor = 0, False

    def forward(data: memoryview) -> None:
        nonlocal left, is_tensor
        while data:
            while not left:
                left, is_tensor = next(parts)
            part, data = data[:left], data[left:]
            left -= len(part)
            if is_tensor:
                on_data(part)

    return forward


def _make_header(outputs: Outputs, keys: Mapping[str, Value]) -> bytes:
    parts = [_MAGIC, struct.pack("<IQQ", _VERSIONS[-1], len(outputs), len(keys))]
    for key, value in keys.items():
        parts += [_encode_string(key), _encode_value(value)]
    offset = 0
    for name, tensor in outputs.items():
        shape = tensor.shape[::-1]
        parts += [_encode_string(name), struct.pack(f"<I{len(shape)}Q", len(shape), *shape)]
        parts.append(struct.pack("<IQ", _TYPE_NUMBERS[tensor.dtype], offset))
        offset = _aligned(offset + nbytes(tensor), _ALIGNMENT)
    return b"".join(parts)


def _encode_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _encode_value(value: Value) -> bytes:
    """Return the type and the bytes of a value; stored bytes unchanged."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _encode_string(value)
    if isinstance(value, list):
        return struct.pack(f"<IIQ{len(value)}f", _ARRAY, _FLOAT32, len(value), *value)
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    return struct.pack("<II", _UINT32, value) if isinstance(value, int) else struct.pack("<If", _FLOAT32, value)

"""Reads and writes safetensors: 8 bytes of header length, a JSON header, and the bytes of the tensors without gaps.

The format is documented at https://github.com/huggingface/safetensors#format. The reader is as strict as the document,
stricter than the format's own library: docs/differential.md lists the differences.
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any

from converter.errors import ContainerError
from converter.formats import strict_json
from converter.storage.byte_range import damaged
from converter.storage.local_file import SourceFile
from converter.storage.stream import OnBytes, OnData
from converter.tensors.dtypes import BY_CODE
from converter.tensors.lazy_tensor import nbytes
from converter.tensors.serialize import Outputs, write_tensors
from converter.tensors.tensor_info import MAX_DIMENSIONS, Contents, TensorInfo, are_sizes, plain_tensor_info

CONTAINER = "safetensors"
MAX_HEADER = strict_json.MAX_BYTES  # the format allows three times as much, which would need gigabytes of memory


def can_read(file: SourceFile) -> bool:
    if file.size < 9:
        return False
    head = file.read(0, 9)
    # The first 8 bytes of a text file are a larger number. `load` raises the error for a header that is too long.
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40


def load(file: SourceFile) -> Contents:
    header, data_start = _read_header(file)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(file, "__metadata__ is not an object of strings")
    # `pop` frees each entry of the header, which limits the memory.
    tensors = {key: _parse_tensor(file, data_start, key, header.pop(key)) for key in list(header)}
    _check_coverage(file, data_start, tensors)
    return dict(tensors)


def _damaged(file: SourceFile, why: str) -> ContainerError:
    return damaged(f"{file.name}: damaged safetensors file: {why}")


def _read_header(file: SourceFile) -> tuple[dict[str, Any], int]:
    """Return the parsed header, and the offset of the first tensor's bytes."""
    length = int.from_bytes(file.read(0, 8), "little")
    if length > MAX_HEADER:
        raise _damaged(file, f"a header of {length} bytes; the limit is {MAX_HEADER}")
    try:
        header = strict_json.parse(file.read(8, length))
        # Raises ValueError for a lone surrogate in a name.
        "".join(header).encode()
    except ValueError as error:
        raise _damaged(file, f"its header cannot be read ({error})") from None
    return header, 8 + length


def _parse_tensor(file: SourceFile, data_start: int, key: str, entry: Any) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(file, f"tensor {key!r} is not described by dtype, shape and data_offsets")
    code = entry["dtype"]
    if not isinstance(code, str) or code not in BY_CODE:
        raise ContainerError(
            f"{file.name}: tensor {key!r} has the unknown dtype {code!r}", f"supported are {', '.join(BY_CODE)}"
        )
    shape, offsets = (_integers(file, key, entry[name]) for name in ("shape", "data_offsets"))
    if len(shape) > MAX_DIMENSIONS or len(offsets) != 2:
        raise _damaged(file, f"tensor {key!r} has {len(shape)} dimensions and {len(offsets)} data_offsets")
    dtype, (begin, end) = BY_CODE[code], offsets
    if math.prod(shape) * dtype.bits != (end - begin) * 8:
        raise _damaged(file, f"tensor {key!r}: {dtype.name} of shape {shape} does not take {end - begin} bytes")
    return plain_tensor_info(file, key, dtype, shape, data_start + begin)


def _integers(file: SourceFile, key: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not are_sizes(values):
        raise _damaged(file, f"tensor {key!r}: shape and data_offsets must be lists of integers, from 0 to 2**63 - 1")
    return tuple(values)


def _check_coverage(file: SourceFile, data_start: int, tensors: dict[str, TensorInfo]) -> None:
    """Raise ContainerError unless every byte after the header belongs to exactly one tensor."""
    pos = data_start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.storage.offset, tensor.storage.length)):
        if tensor.storage.offset != pos:
            problem = "overlaps the one before it" if tensor.storage.offset < pos else "leaves a gap before it"
            raise _damaged(file, f"tensor {tensor.key!r} {problem}")
        pos += tensor.storage.length
    if pos != file.size:
        problem = "truncated" if pos > file.size else "extra bytes at the end"
        raise _damaged(file, f"{problem}: expected {pos} bytes, found {file.size}")


def write_safetensors(
    fd: int, outputs: Outputs, metadata: dict[str, str], on_bytes: OnBytes, on_data: OnData | None = None
) -> None:
    """Write a safetensors file.

    Args:
        fd: Descriptor of the file, open for writing.
        outputs: The tensors by name, in the order in which they are written.
        metadata: The header's `__metadata__`.
        on_bytes: Called with the number of bytes of tensor data that were written.
        on_data: Called with each chunk of tensor data, in order.
    """
    write_tensors(fd, _make_header(outputs, metadata), outputs.values(), on_bytes, on_data)


def _make_header(outputs: Outputs, metadata: dict[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, value in outputs.items():
        end = offset + nbytes(value)
        header[name] = {"dtype": value.dtype.code, "shape": list(value.shape), "data_offsets": [offset, end]}
        offset = end
    return add_header_length(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())


def add_header_length(header: bytes) -> bytes:
    """Pad a JSON header to a multiple of eight bytes and put its length before it."""
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header

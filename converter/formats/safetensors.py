"""safetensors: 8 bytes of header length, a JSON header, and the tensors' bytes without a gap.

The format is documented at https://github.com/huggingface/safetensors#format. What its own library refuses is refused
here, but for halves of surrogate pairs in metadata and `-0`. The reverse does not hold where it is more lenient than
that document: names that stand there twice, further fields, lists for tables, white space before the header.
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any

from converter.errors import ContainerError
from converter.formats import strict_json
from converter.storage.byte_range import Storage
from converter.storage.local_file import SourceFile
from converter.storage.stream import OnBytes, OnData
from converter.tensors.dtypes import BY_CODE, DType
from converter.tensors.lazy_tensor import nbytes
from converter.tensors.serialize import Outputs, write_tensors
from converter.tensors.tensor_info import Contents, TensorInfo, contiguous_strides

CONTAINER = "safetensors"

MAX_HEADER = strict_json.MAX_BYTES  # the format allows three times that, which would take gigabytes of memory
MAX_DIMENSIONS = 64
MAX_SIZE = 1 << 63  # torch's own limit


def can_read(file: SourceFile) -> bool:
    if file.size < 9:
        return False
    head = file.read(0, 9)
    # JSON or text would give a length beyond any file's; a true header that is too long is left to `load` to name.
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40


def load(file: SourceFile) -> Contents:
    header, start = _header(file)
    _check_metadata(file, header.pop("__metadata__", {}))
    # Taken out of the header, so that the memory of its entries becomes that of the tensors.
    tensors = {key: _tensor(file, start, key, header.pop(key)) for key in list(header)}
    _check_cover(file, start, tensors)
    return dict(tensors)


def _error(file: SourceFile, why: str) -> ContainerError:
    return ContainerError(f"{file.name}: damaged safetensors file: {why}", "download or copy it again")


def _header(file: SourceFile) -> tuple[dict[str, Any], int]:
    """The JSON header, and where the tensors' bytes begin."""
    length = int.from_bytes(file.read(0, 8), "little")
    if length > MAX_HEADER:
        raise _error(file, f"a header of {length} bytes, where at most {MAX_HEADER} are read")
    try:
        header = strict_json.parse(file.read(8, length))
        # Halves of surrogate pairs are no text: this is a ValueError.
        "".join(header).encode()
    except ValueError as error:
        raise _error(file, f"its header cannot be read ({error})") from None
    return header, 8 + length


def _check_metadata(file: SourceFile, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _error(file, "__metadata__ is not a table of strings")


def _tensor(file: SourceFile, start: int, key: str, entry: Any) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _error(file, f"tensor {key!r} is not described by dtype, shape and data_offsets")
    dtype, shape = _dtype(file, key, entry["dtype"]), _integers(file, key, entry["shape"])
    offsets = _integers(file, key, entry["data_offsets"])
    if len(shape) > MAX_DIMENSIONS or len(offsets) != 2:
        raise _error(file, f"tensor {key!r} has {len(shape)} dimensions and {len(offsets)} data_offsets")
    begin, end = offsets
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise _error(file, f"tensor {key!r}: {dtype.name} of shape {shape} does not take {end - begin} bytes")
    storage = Storage(file, (start + begin, start + end), end - begin, end - begin, key)
    return TensorInfo(key, dtype, shape, storage, 0, contiguous_strides(shape))


def _dtype(file: SourceFile, key: str, code: Any) -> DType:
    if not isinstance(code, str) or code not in BY_CODE:
        raise ContainerError(
            f"{file.name}: tensor {key!r} has dtype {code!r}, which is not known", f"known are {', '.join(BY_CODE)}"
        )
    return BY_CODE[code]


def _integers(file: SourceFile, key: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < MAX_SIZE for value in values):
        raise _error(file, f"tensor {key!r}: shape and data_offsets must be lists of integers, from 0 to 2**63 - 1")
    return tuple(values)


def _check_cover(file: SourceFile, start: int, tensors: dict[str, TensorInfo]) -> None:
    """Every byte after the header belongs to one tensor, and to no more than one."""
    at = start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.storage.offset, tensor.storage.length)):
        if tensor.storage.offset != at:
            what = "overlaps the one before it" if tensor.storage.offset < at else "leaves a gap before it"
            raise _error(file, f"tensor {tensor.key!r} {what}")
        at += tensor.storage.length
    if at != file.size:
        what = "truncated" if at > file.size else "bytes are left over"
        raise _error(file, f"{what}: it should be {at} bytes long and is {file.size}")


def write_safetensors(
    fd: int, outputs: Outputs, metadata: dict[str, str], count: OnBytes, seen: OnData | None = None
) -> None:
    """Write a safetensors file: length of the header, header, then the tensors in the header's order.

    The format is documented at https://github.com/huggingface/safetensors#format. ContainerError where a source is
    damaged, OSError where the system refuses to write.
    """
    write_tensors(fd, safetensors_header(outputs, metadata), outputs.values(), count, seen)


def safetensors_header(outputs: Outputs, metadata: dict[str, str]) -> bytes:
    """The header of these tensors, with its length before it."""
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, value in outputs.items():
        end = offset + nbytes(value)
        header[name] = {"dtype": value.dtype.code, "shape": list(value.shape), "data_offsets": [offset, end]}
        offset = end
    return with_length(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())


def with_length(header: bytes) -> bytes:
    """The JSON of a header after its length, padded so that the data begins at a multiple of eight."""
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header

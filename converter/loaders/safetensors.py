"""safetensors: 8 bytes of header length, a JSON header, and the tensors' bytes without a gap.

The format is documented at https://github.com/huggingface/safetensors#format; what is refused here, its own library
refuses too.
"""

from __future__ import annotations

import json
import math
from typing import Any

from converter.checkpoint import Contents, Storage, Tensor, contiguous_strides
from converter.dtypes import BY_CODE, DType
from converter.errors import ContainerError
from converter.files import SourceFile

CONTAINER = "safetensors"

MAX_HEADER = 100_000_000  # bytes; the format's own limit
MAX_DIMENSIONS = 64


def recognises(file: SourceFile) -> bool:
    if file.size < 9:
        return False
    head = file.read(0, 9)
    # JSON or text would give a length beyond any file's; a true header that is too long is left to `load` to name.
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40


def load(file: SourceFile) -> Contents:
    header, start = _header(file)
    _check_metadata(file, header.pop("__metadata__", {}))
    tensors = {key: _tensor(file, start, key, entry) for key, entry in header.items()}
    _check_cover(file, start, tensors)
    return dict(tensors)


def _error(file: SourceFile, why: str) -> ContainerError:
    return ContainerError(f"{file.name}: damaged safetensors file: {why}\ndownload or copy it again")


def _header(file: SourceFile) -> tuple[dict[str, Any], int]:
    """The JSON header, and where the tensors' bytes begin."""
    length = int.from_bytes(file.read(0, 8), "little")
    if length > MAX_HEADER:
        raise _error(file, f"a header of {length} bytes, where the format allows {MAX_HEADER}")
    text = file.read(8, length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise _error(file, f"its header cannot be read ({error})") from None
    if not isinstance(header, dict):
        raise _error(file, "its header is no JSON object")
    return header, 8 + length


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{double!r} stands there twice")
    return result


def _check_metadata(file: SourceFile, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _error(file, "__metadata__ is not a table of strings")


def _tensor(file: SourceFile, start: int, key: str, entry: Any) -> Tensor:
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
    return Tensor(key, dtype, shape, storage, 0, contiguous_strides(shape))


def _dtype(file: SourceFile, key: str, code: Any) -> DType:
    if not isinstance(code, str) or code not in BY_CODE:
        raise ContainerError(
            f"{file.name}: tensor {key!r} has dtype {code!r}, which is not known\nknown are {', '.join(BY_CODE)}"
        )
    return BY_CODE[code]


def _integers(file: SourceFile, key: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        raise _error(file, f"tensor {key!r}: shape and data_offsets must be lists of integers from 0 on")
    return tuple(values)


def _check_cover(file: SourceFile, start: int, tensors: dict[str, Tensor]) -> None:
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

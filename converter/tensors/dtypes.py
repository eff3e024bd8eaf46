"""Element types of tensors, by their names in torch and safetensors."""

from __future__ import annotations

from typing import NamedTuple


class DType(NamedTuple):
    """An element type.

    Attributes:
        name: Torch's name.
        itemsize: Bytes per element.
        code: The name in safetensors files.
        storage: Torch's storage class, or None.
    """

    name: str
    itemsize: int
    code: str
    storage: str | None

    @property
    def is_float(self) -> bool:
        return self.name.startswith(("float", "bfloat"))


# Tensors of types without a storage class are saved by torch as untyped storages.
_ALL = (
    DType("float64", 8, "F64", "DoubleStorage"),
    DType("float32", 4, "F32", "FloatStorage"),
    DType("float16", 2, "F16", "HalfStorage"),
    DType("bfloat16", 2, "BF16", "BFloat16Storage"),
    DType("float8_e4m3fn", 1, "F8_E4M3", None),
    DType("float8_e5m2", 1, "F8_E5M2", None),
    DType("int64", 8, "I64", "LongStorage"),
    DType("int32", 4, "I32", "IntStorage"),
    DType("int16", 2, "I16", "ShortStorage"),
    DType("int8", 1, "I8", "CharStorage"),
    DType("uint64", 8, "U64", None),
    DType("uint32", 4, "U32", None),
    DType("uint16", 2, "U16", None),
    DType("uint8", 1, "U8", "ByteStorage"),
    DType("bool", 1, "BOOL", "BoolStorage"),
)

BY_NAME = {dtype.name: dtype for dtype in _ALL}
BY_CODE = {dtype.code: dtype for dtype in _ALL}
BY_STORAGE = {dtype.storage: dtype for dtype in _ALL if dtype.storage}

FLOAT32 = BY_NAME["float32"]
INT64 = BY_NAME["int64"]

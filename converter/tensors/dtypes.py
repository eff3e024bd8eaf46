"""Element types of tensors, with their names in torch and safetensors."""

from __future__ import annotations

from typing import NamedTuple


class DType(NamedTuple):
    """An element type."""

    name: str  # the name in torch, if torch has the type
    bits: int  # the number of bits of an element; 0 if the elements are not plain bytes in the file
    code: str = ""  # the name in safetensors files; empty if the format lacks the type
    storage: str | None = None  # the storage class in torch; None if torch saves an untyped storage
    block: tuple[int, int] | None = None  # the elements and the bytes of a block, for quantised types of ggml

    @property
    def itemsize(self) -> int:
        """Bytes per element, rounded down."""
        return self.bits // 8

    @property
    def is_float(self) -> bool:
        """Whether weights may have this type; False for scales (float8_e8m0fnu) and packed numbers."""
        return self.name in BY_NAME and self.name.startswith(("float", "bfloat"))

    def nbytes(self, numel: int) -> int:
        """Bytes of `numel` elements."""
        if self.block is not None:
            return numel // self.block[0] * self.block[1]
        return numel * self.bits // 8


_SUPPORTED = (
    DType("float64", 64, "F64", "DoubleStorage"),
    DType("float32", 32, "F32", "FloatStorage"),
    DType("float16", 16, "F16", "HalfStorage"),
    DType("bfloat16", 16, "BF16", "BFloat16Storage"),
    DType("float8_e4m3fn", 8, "F8_E4M3"),
    DType("float8_e5m2", 8, "F8_E5M2"),
    DType("float8_e4m3fnuz", 8, "F8_E4M3FNUZ"),
    DType("float8_e5m2fnuz", 8, "F8_E5M2FNUZ"),
    DType("int64", 64, "I64", "LongStorage"),
    DType("int32", 32, "I32", "IntStorage"),
    DType("int16", 16, "I16", "ShortStorage"),
    DType("int8", 8, "I8", "CharStorage"),
    DType("uint64", 64, "U64"),
    DType("uint32", 32, "U32"),
    DType("uint16", 16, "U16"),
    DType("uint8", 8, "U8", "ByteStorage"),
    DType("bool", 8, "BOOL", "BoolStorage"),
)
# Types that no tensor of a layout has. `inspect` lists such tensors, and --into copies them.
_SAFETENSORS_ONLY = (
    DType("float6_e2m3", 6, "F6_E2M3"),
    DType("float6_e3m2", 6, "F6_E3M2"),
    DType("float4_e2m1", 4, "F4"),
)
_OTHERS = (
    DType("float8_e8m0fnu", 8, "F8_E8M0"),
    # One element is a byte with two numbers.
    DType("float4_e2m1fn_x2", 8),
    DType("complex32", 32),
    DType("complex64", 64, "C64", "ComplexFloatStorage"),
    DType("complex128", 128, "", "ComplexDoubleStorage"),
)

BY_NAME = {dtype.name: dtype for dtype in _SUPPORTED}
BY_CODE = {dtype.code: dtype for dtype in (*_SUPPORTED, *_OTHERS, *_SAFETENSORS_ONLY) if dtype.code}
IN_TORCH = {dtype.name: dtype for dtype in (*_SUPPORTED, *_OTHERS)}
BY_STORAGE = {dtype.storage: dtype for dtype in IN_TORCH.values() if dtype.storage}

FLOAT32 = BY_NAME["float32"]
INT64 = BY_NAME["int64"]


def dtype_name(dtype: object) -> str:
    """Return the name of a torch.dtype without "torch.", such as "float32"."""
    return str(dtype).removeprefix("torch.")


# For tensors that are not plain bytes in the file: the beginning of the type's name, and a Python expression that makes
# a plain tensor of the tensor `t`. It leaves plain tensors unchanged.
_EXPRESSIONS = {
    "conjugated or negated view": "t.resolve_conj().resolve_neg()",
    "sparse": "t.to_dense()",
    "quantized": "t.dequantize() if t.is_quantized else t",
    "nested": "t.to_padded_tensor(0) if t.is_nested else t",
    "DTensor": "t.full_tensor() if hasattr(t, 'full_tensor') else t",
    "numpy array": "torch.as_tensor(t)",
    "object of ": "torch.as_tensor(numpy.asarray(t))",
    "tuple of ": "t[0] if isinstance(t, tuple) else t",
    "wrapper tensor of ": "t if type(t) is torch.Tensor else t.dequantize()",
    "tensor of ": "t.as_subclass(torch.Tensor)",
}
# The next step for types without such an expression.
_STEPS = {
    "meta": "the file holds no values of these tensors: convert one that does",
    "ShardedTensor": "save a whole state dict in the training, of FSDP with StateDictType.FULL_STATE_DICT",
    "torch.": "convert the original weights from before quantisation",
}

_DEQUANTISE = (
    "take the F16, BF16 or F32 file of the same model, or dequantise its tensors with the package gguf: "
    "gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(FILE).tensors"
)


def remedy(dtype: DType) -> str:
    """Return the next step for tensors of a type that is not plain bytes in the file."""
    kind = dtype.name
    if dtype.block is not None:
        return _DEQUANTISE
    for name, step in _STEPS.items():
        if kind.startswith(name):
            return step
    expression = next((text for name, text in _EXPRESSIONS.items() if kind.startswith(name)), "t.clone()")
    return (
        f"where you trust the file, convert them: torch.save({{k: {expression} for k, t in STATE_DICT.items()}}, "
        "'weights.pth'), with the state dict of torch.load(PATH, map_location='cpu', weights_only=False), which runs "
        "code of the file"
    )


def unreadable(kind: str) -> DType:
    """Return the type of tensors that are listed but cannot be read; `kind` says why, such as "sparse"."""
    return DType(kind, 0)


def quantised(name: str, block_numel: int, block_nbytes: int) -> DType:
    """Return the type of tensors that are stored in blocks.

    Args:
        name: The name of the type.
        block_numel: The number of elements of a block.
        block_nbytes: The number of bytes of a block.
    """
    return DType(name, 0, block=(block_numel, block_nbytes))

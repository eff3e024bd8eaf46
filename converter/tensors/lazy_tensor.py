"""Lazy tensors: expressions over the tensors of a checkpoint, with known shape and dtype.

If `byte_ranges` is not None for a lazy tensor, its bytes are copied. Otherwise `converter.tensors.evaluate` computes it
with torch.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from converter.storage.byte_range import ByteRange, Segment, cut
from converter.tensors.dtypes import BY_NAME, INT64, DType
from converter.tensors.tensor_info import TensorInfo

# Rows (and columns) of the largest grid of patches: 8190 pixels for CLIP-L's patch size 14, 1.4 GB of embeddings.
MAX_GRID_SIZE = 585
# Kinds of position embeddings for n x n patches, with their shapes.
POSITIONS = {
    "tokens": "a class token and a square grid, [1 + n*n, width]",
    "grid": "a square grid, [1, n, n, width]",
    "relative": "offsets from -(n - 1) to n - 1, [2*n - 1, width]",
}
# The codes of element types in `struct`, to generate position indices; bfloat16 is rounded from float32.
_STRUCT_CODES = {"float64": "d", "float32": "f", "float16": "e", "bfloat16": "f", "int64": "q", "int32": "i"} | {
    "int16": "h", "int8": "b", "uint64": "Q", "uint32": "I", "uint16": "H", "uint8": "B",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Lazy:
    dtype: DType
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Read(_Lazy):
    """A tensor of the checkpoint, unchanged."""

    tensor: TensorInfo


@dataclass(frozen=True, slots=True)
class Concat(_Lazy):
    """The tensors `parts` concatenated along `dim`."""

    parts: tuple[LazyTensor, ...]
    dim: int


@dataclass(frozen=True, slots=True)
class Slice(_Lazy):
    """The elements `start` to `start + shape[dim]` of `base` along `dim`."""

    base: LazyTensor
    dim: int
    start: int


@dataclass(frozen=True, slots=True)
class View(_Lazy):
    """The same elements in the same order in another shape."""

    base: LazyTensor


@dataclass(frozen=True, slots=True)
class Transpose(_Lazy):
    """A permutation of dimensions: dimension i of the result is dimension `dims[i]` of `base`."""

    base: LazyTensor
    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cast(_Lazy):
    """The values rounded to another dtype."""

    base: LazyTensor
    # After evaluation, the number of finite values that became infinite or NaN.
    overflows: list[int] = field(default_factory=list, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Resample(_Lazy):
    """Position embeddings of one of the kinds in POSITIONS, resampled for `grid_size` x `grid_size` patches."""

    base: LazyTensor
    kind: str
    grid_size: int


@dataclass(frozen=True, slots=True)
class AddProduct(_Lazy):
    """The weights `base` + `scale` * `b` @ `a`, computed in float32 and rounded once; LoRA's sum.

    For convolutions, `a` is [rank, in, height, width] and `b` is [out, rank, 1, 1].
    """

    base: LazyTensor
    a: LazyTensor
    b: LazyTensor
    scale: float
    rounds_product: bool = False  # whether the product is rounded before the sum too, as peft does for embeddings
    overflows: list[int] = field(default_factory=list, compare=False, repr=False)  # as in Cast


@dataclass(frozen=True, slots=True)
class Generated(_Lazy):
    """A tensor that is not in a checkpoint; `make` returns its bytes, little-endian and row-major."""

    make: Callable[[], bytes]


LazyTensor = Read | Concat | Slice | View | Transpose | Cast | Resample | AddProduct | Generated


def nbytes(value: LazyTensor) -> int:
    """Return the size of a tensor in bytes."""
    return value.dtype.nbytes(math.prod(value.shape))


def lazy_read(tensor: TensorInfo) -> LazyTensor:
    """Return the lazy tensor for a tensor of a checkpoint."""
    return Read(tensor.dtype, tensor.shape, tensor)


def arange(shape: tuple[int, ...]) -> LazyTensor:
    """Return a generated int64 tensor of 0, 1, 2, ..."""
    numel = math.prod(shape)
    return Generated(INT64, shape, lambda: struct.pack(f"<{numel}q", *range(numel)))


def is_arange(value: LazyTensor) -> bool:
    """Read a tensor, and return whether its values are 0, 1, 2, ..., rounded to its type."""
    numel, name = math.prod(value.shape), value.dtype.name
    ranges = byte_ranges(value)
    if ranges is None or name not in _STRUCT_CODES or numel > MAX_GRID_SIZE**2 + 1:
        return False
    data = b"".join(part if isinstance(part, bytes) else part.read() for part in ranges)
    try:
        expected = struct.pack(f"<{numel}{_STRUCT_CODES[name]}", *range(numel))
    except struct.error:  # more positions than the type has values
        return False
    if name == "bfloat16":
        bits = struct.unpack(f"<{numel}I", expected)
        expected = struct.pack(f"<{numel}H", *((n + 0x7FFF + (n >> 16 & 1)) >> 16 for n in bits))
    return data == expected


def source_tensors(value: LazyTensor) -> Iterator[TensorInfo]:
    """Yield the checkpoint tensors that a lazy tensor is made of, in order."""
    return (node.tensor for node in _nodes(value) if isinstance(node, Read))


def all_source_tensors(values: Iterable[LazyTensor]) -> list[TensorInfo]:
    """Return the checkpoint tensors that several lazy tensors are made of."""
    return [tensor for value in values for tensor in source_tensors(value)]


def stored_parts(tensor: TensorInfo) -> Iterator[TensorInfo]:
    """Yield the chunks that a tensor is stored in, or the tensor itself if it is stored in one piece."""
    return source_tensors(lazy_read(tensor) if tensor.assemble is None else tensor.assemble())


def is_resampled(value: LazyTensor) -> bool:
    """Return whether the tensor or a part of it is resampled."""
    return any(isinstance(node, Resample) for node in _nodes(value))


def _nodes(value: LazyTensor) -> Iterator[LazyTensor]:
    """Yield all nodes of the expression tree of a lazy tensor, the root first."""
    yield value
    if isinstance(value, Concat):
        for part in value.parts:
            yield from _nodes(part)
    elif not isinstance(value, Read | Generated):
        yield from _nodes(value.base)
    if isinstance(value, AddProduct):
        yield from _nodes(value.a)
        yield from _nodes(value.b)


def count_overflows(outputs: Mapping[str, LazyTensor]) -> dict[str, int]:
    """Return the number of finite values that became infinite or NaN, by tensor name, without zeros."""
    counts = {}
    for name, value in outputs.items():
        count = sum(sum(node.overflows) for node in _nodes(value) if isinstance(node, Cast | AddProduct))
        if count:
            counts[name] = count
    return counts


def concatenated(parts: tuple[LazyTensor, ...], dim: int) -> LazyTensor:
    """Concatenate tensors of one dtype along `dim`. All slices of one tensor, in order, give that tensor."""
    *starts, size = _part_starts(parts, dim)
    first = parts[0]
    if isinstance(first, Slice) and first.base.shape[dim] == size:
        base, consecutive = first.base, zip(parts, starts, strict=True)
        if all(
            isinstance(part, Slice) and part.base is base and (part.dim, part.start) == (dim, start)
            for part, start in consecutive
        ):
            return base
    return Concat(first.dtype, (*first.shape[:dim], size, *first.shape[dim + 1 :]), parts, dim)


def _part_starts(parts: tuple[LazyTensor, ...], dim: int) -> list[int]:
    """Return the index of the first element of each part along a dimension, and then the total size."""
    return list(accumulate((part.shape[dim] for part in parts), initial=0))


def sliced(base: LazyTensor, dim: int, start: int, size: int) -> LazyTensor:
    """Slice a tensor. A slice that is exactly one part of a concatenation gives that part.

    Args:
        base: The tensor to slice.
        dim: The dimension to slice along.
        start: Index of the first element along `dim`.
        size: Number of elements along `dim`.
    """
    if isinstance(base, Concat) and base.dim == dim:
        for part, part_start in zip(base.parts, _part_starts(base.parts, dim), strict=False):
            if (part_start, part.shape[dim]) == (start, size):
                return part
    return Slice(base.dtype, (*base.shape[:dim], size, *base.shape[dim + 1 :]), base, dim, start)


def reshaped(base: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    """Reshape a tensor. A reshape back to the original shape gives the original tensor."""
    if isinstance(base, View):
        base = base.base
    return base if base.shape == shape else View(base.dtype, shape, base)


def permuted(base: LazyTensor, dims: tuple[int, ...]) -> LazyTensor:
    """Permute dimensions. The inverse of a permutation gives the original tensor."""
    if isinstance(base, Transpose) and tuple(base.dims[dim] for dim in dims) == tuple(range(len(dims))):
        return base.base
    return Transpose(base.dtype, tuple(base.shape[dim] for dim in dims), base, dims)


def cast(base: LazyTensor, dtype: str) -> LazyTensor:
    """Cast a floating-point tensor; ValueError for other types."""
    if not base.dtype.is_float:
        raise ValueError(f"cannot cast {base.dtype.name} to {dtype}")
    return base if base.dtype.name == dtype else Cast(BY_NAME[dtype], base.shape, base)


def add_product(
    base: LazyTensor, a: LazyTensor, b: LazyTensor, scale: float, rounds_product: bool = False
) -> LazyTensor:
    """Add a product of two factors to weights; ValueError if shapes do not fit, or for weights that are no floats.

    Args:
        base: The weights [out, in], or [out, in, height, width].
        a: The factor [rank, in], or [rank, in, height, width].
        b: The factor [out, rank], or [out, rank, 1, 1].
        scale: The multiplier of the product.
        rounds_product: Whether to also round the product to the type of the weights before the sum.
    """
    if b.shape[2:] not in ((), (1, 1)) or (b.shape[0], *a.shape[1:]) != base.shape or a.shape[0] != b.shape[1]:
        raise ValueError(f"factors A {list(a.shape)} and B {list(b.shape)} do not fit the shape {list(base.shape)}")
    if not base.dtype.is_float or base.dtype.bits < 16:
        raise ValueError(f"cannot add to weights of the type {base.dtype.name}")
    return AddProduct(base.dtype, base.shape, base, a, b, scale, rounds_product)


def resampled(base: LazyTensor, kind: str, grid_size: int) -> LazyTensor:
    """Resample position embeddings; ValueError if the shape does not fit, or the grid exceeds MAX_GRID_SIZE.

    Args:
        base: The embeddings.
        kind: One of POSITIONS.
        grid_size: The new number of rows and columns of patches.
    """
    if grid_size > MAX_GRID_SIZE:
        raise ValueError(f"cannot resample to a grid of {grid_size}: larger than {MAX_GRID_SIZE}")
    current, width = grid_size_of(kind, base.shape), base.shape[-1:]
    if current is None:
        raise ValueError(f"cannot resample shape {list(base.shape)}: not {POSITIONS[kind]}")
    if current == grid_size:
        return base
    sizes = {"tokens": (1 + grid_size**2,), "grid": (1, grid_size, grid_size), "relative": (2 * grid_size - 1,)}
    return Resample(base.dtype, sizes[kind] + width, base, kind, grid_size)


def grid_size_of(kind: str, shape: tuple[int, ...]) -> int | None:
    """Return the rows (and columns) of the grid of patches of position embeddings; None if the shape does not fit."""
    match kind, shape:
        case "tokens", (rows, _) if rows > 1 and math.isqrt(rows - 1) ** 2 == rows - 1:
            return math.isqrt(rows - 1)
        case "grid", (1, rows, columns, _) if rows == columns > 0:
            return rows
        case "relative", (length, _) if length % 2:
            return (length + 1) // 2
    return None


def byte_ranges(value: LazyTensor) -> list[Segment] | None:
    """Return the segments whose bytes are the tensor's, in order, or None if the tensor must be computed."""
    match value:
        case Read(tensor=tensor) if tensor.assemble is not None:
            return byte_ranges(tensor.assemble())
        case Read(tensor=tensor) if tensor.is_raw_contiguous:
            return [ByteRange(tensor.storage, tensor.byte_offset, tensor.nbytes)]
        case View(base=base):
            return byte_ranges(base)
        case Concat(parts=parts, dim=0):
            ranges = [byte_ranges(part) for part in parts]
            return None if None in ranges else [segment for part in ranges for segment in part or ()]
        case Slice(base=base, dim=0, start=start):
            row_nbytes = nbytes(base) // max(base.shape[0], 1)
            segments = byte_ranges(base)
            return None if segments is None else cut(segments, start * row_nbytes, nbytes(value))
        case Generated(make=make):
            return [make()]
    return None

"""Evaluation of lazy tensors with torch, one output tensor at a time."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import torch

from converter.tensors.lazy_tensor import (
    AddProduct,
    Cast,
    Concat,
    Generated,
    LazyTensor,
    Read,
    Resample,
    Slice,
    Transpose,
    View,
)
from converter.tensors.tensor_info import TensorInfo


def tensor_bytes(value: LazyTensor) -> memoryview:
    """Evaluate a lazy tensor to bytes, little-endian and row-major; ContainerError if the source data is damaged."""
    return as_bytes(evaluate(value))


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a CPU tensor in row-major order, without a copy if the tensor is contiguous."""
    tensor = tensor.detach().contiguous()
    if not tensor.numel():
        return memoryview(b"")
    array = (ctypes.c_char * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())
    # Keep the memory alive as long as the view.
    array.tensor = tensor  # type: ignore[attr-defined]
    return memoryview(array).cast("B")


def bit_view(tensor: torch.Tensor) -> torch.Tensor:
    """View the elements as integers, to compare their bits: a NaN equals itself, and 0.0 does not equal -0.0."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.element_size()])


def read_tensor(tensor: TensorInfo) -> torch.Tensor:
    """Read a tensor of a checkpoint into memory."""
    if tensor.assemble is not None:
        return evaluate(tensor.assemble())
    dtype = torch_dtype(tensor.dtype.name)
    if not math.prod(tensor.shape):
        return torch.empty(tensor.shape, dtype=dtype)
    data, byte_offset = _tensor_data(tensor)
    if tensor.storage.big_endian:
        data = byte_swapped(data, tensor.dtype.itemsize)
    # In a hostile file, the byte offset may not be a multiple of the element size; frombuffer accepts that.
    numel = (len(data) - byte_offset) // tensor.dtype.itemsize
    flat = torch.frombuffer(data, dtype=dtype, count=numel, offset=byte_offset)
    return flat.as_strided(tensor.shape, tensor.strides)


def _tensor_data(tensor: TensorInfo) -> tuple[bytearray, int]:
    """Read the bytes of a tensor; return a buffer that contains them, and the byte offset of the first element.

    A storage that must be decompressed, checked or byte-swapped is read as a whole.
    """
    storage = tensor.storage
    if storage.deflated or storage.big_endian or storage.crc32 is not None:
        return bytearray(storage.read()), tensor.byte_offset
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    data = bytearray((last + 1) * tensor.dtype.itemsize)
    storage.file.readinto(memoryview(data), storage.offset + tensor.byte_offset)
    return data, 0


def evaluate(value: LazyTensor, load: Callable[[TensorInfo], torch.Tensor] = read_tensor) -> torch.Tensor:
    """Evaluate a lazy tensor on the CPU; `load` reads the tensors of checkpoints."""
    match value:
        case Read(tensor=tensor):
            return load(tensor)
        case Concat(parts=parts, dim=dim):
            return torch.cat([evaluate(part, load) for part in parts], dim)
        case Slice(base=base, dim=dim, start=start):
            return evaluate(base, load).narrow(dim, start, value.shape[dim])
        case View(base=base):
            return evaluate(base, load).reshape(value.shape)
        case Transpose(base=base, dims=dims):
            return evaluate(base, load).permute(dims)
        case Cast(base=base):
            before = evaluate(base, load)
            result = before.to(torch_dtype(value.dtype.name))
            value.overflows[:] = [_count_overflows(before, result)]
            return result
        case Resample(base=base, kind=kind, grid_size=grid_size):
            return _RESAMPLE[kind](evaluate(base, load), grid_size)
        case AddProduct(base=base, a=a, b=b):
            weight = evaluate(base, load)
            product = _scaled_product(weight, evaluate(a, load), evaluate(b, load), value.scale)
            if value.rounds_product:
                product = product.to(weight.dtype).to(product.dtype)
            exact = product.add_(weight)
            result = exact.to(weight.dtype)
            value.overflows[:] = [_count_overflows(exact, result)]
            return result
        case Generated(make=make):
            data, dtype = bytearray(make()), torch_dtype(value.dtype.name)
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            return flat.reshape(value.shape)


def _scaled_product(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Return scale * b @ a in float32, or in float64 if the weight has that type.

    As in peft's `merge_and_unload`, the product is computed before the scale, so that the results are equal bit by bit.
    """
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    a, b = a.to(dtype), b.to(dtype)
    if weight.dim() == 2:
        product = b @ a
    elif a.shape[2:] == (1, 1):
        product = (b[:, :, 0, 0] @ a[:, :, 0, 0])[:, :, None, None]
    else:
        product = torch.nn.functional.conv2d(a.transpose(0, 1), b).transpose(0, 1)
    return product.mul_(scale)


def _count_overflows(before: torch.Tensor, after: torch.Tensor) -> int:
    """Return the number of finite values that a cast made infinite or NaN."""
    if torch.finfo(before.dtype).max <= torch.finfo(after.dtype).max:
        return 0
    # float8 types lack most operations.
    after = after.float() if after.element_size() == 1 else after
    # One pass without new memory: the extrema are not finite if any element is not.
    if not after.numel() or all(extremum.isfinite() for extremum in after.aminmax()):
        return 0
    return int((before.double().isfinite() & ~after.isfinite()).sum())


def byte_swapped(data: bytearray, itemsize: int) -> bytearray:
    """Return the data with the bytes of each element reversed."""
    result = bytearray(len(data))
    for i in range(itemsize):
        result[i::itemsize] = data[itemsize - 1 - i :: itemsize]
    return result


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype with this name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _resample_tokens(pos_embed: torch.Tensor, grid_size: int) -> torch.Tensor:
    """Resample [1 + n*n, width] to [1 + grid_size*grid_size, width]; the class token, the first row, is unchanged."""
    n = math.isqrt(pos_embed.shape[0] - 1)
    grid = _resample_grid(pos_embed[1:].reshape(1, n, n, -1), grid_size)
    return torch.cat([pos_embed[:1], grid.flatten(0, 2)])


def _resample_grid(pos_embed: torch.Tensor, grid_size: int) -> torch.Tensor:
    """Resample [1, n, n, width] to [1, grid_size, grid_size, width]: bicubic, with antialiasing, in float32."""
    image, size = pos_embed.float().permute(0, 3, 1, 2), (grid_size, grid_size)
    image = torch.nn.functional.interpolate(image, size, mode="bicubic", antialias=True, align_corners=False)
    return image.permute(0, 2, 3, 1).to(pos_embed.dtype)


def _resample_relative(rel_pos: torch.Tensor, grid_size: int) -> torch.Tensor:
    """Resample [2*n - 1, width] to [2*grid_size - 1, width]: linear, in float32."""
    rows = rel_pos.float().T[None]
    rows = torch.nn.functional.interpolate(rows, 2 * grid_size - 1, mode="linear", align_corners=False)
    return rows[0].T.to(rel_pos.dtype)


# By the kind of position embeddings: the interpolation that DeepSeek-OCR's SAM and CLIP use for other image sizes.
_RESAMPLE = {"tokens": _resample_tokens, "grid": _resample_grid, "relative": _resample_relative}

"""Expressions that take more than copying, evaluated with torch, one output tensor at a time."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import torch

from converter.tensors.lazy_tensor import Cast, Concat, Generated, LazyTensor, Permute, Read, Resample, Reshape, Slice
from converter.tensors.tensor_info import TensorInfo


def tensor_bytes(expr: LazyTensor) -> memoryview:
    """The bytes of the tensor, little-endian and row-major; ContainerError where what it is made of is damaged."""
    return as_bytes(evaluate(expr))


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The elements of a tensor on the CPU in order, as bytes: its own memory if it is contiguous."""
    tensor = tensor.detach().contiguous()
    if not tensor.numel():
        return memoryview(b"")
    # The array keeps the tensor alive, and spares a copy.
    array = (ctypes.c_char * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())
    array.tensor = tensor  # type: ignore[attr-defined]
    return memoryview(array).cast("B")


def read_tensor(tensor: TensorInfo) -> torch.Tensor:
    """A tensor of a checkpoint, read whole with the storage it lies in."""
    dtype = torch_dtype(tensor.dtype.name)
    data = bytearray(tensor.storage.read())
    if tensor.storage.big_endian:
        data = byte_swapped(data, tensor.dtype.itemsize)
    if not math.prod(tensor.shape):
        return torch.empty(tensor.shape, dtype=dtype)
    # `start` need not be a multiple of the element size in a hostile file; frombuffer would take it all the same.
    count = (len(data) - tensor.start) // tensor.dtype.itemsize
    flat = torch.frombuffer(data, dtype=dtype, count=count, offset=tensor.start)
    return flat.as_strided(tensor.shape, tensor.strides)


def evaluate(expr: LazyTensor, load: Callable[[TensorInfo], torch.Tensor] = read_tensor) -> torch.Tensor:
    """The tensor that an expression stands for, on the CPU; `load` gives the source's tensors."""
    match expr:
        case Read(tensor=tensor):
            return load(tensor)
        case Concat(parts=parts, dim=dim):
            return torch.cat([evaluate(part, load) for part in parts], dim)
        case Slice(of=of, dim=dim, start=start):
            return evaluate(of, load).narrow(dim, start, expr.shape[dim])
        case Reshape(of=of):
            return evaluate(of, load).reshape(expr.shape)
        case Permute(of=of, dims=dims):
            return evaluate(of, load).permute(dims)
        case Cast(of=of):
            return evaluate(of, load).to(torch_dtype(expr.dtype.name))
        case Resample(of=of, grid=grid):
            return resample_positions(evaluate(of, load), grid)
        case Generated(make=make):
            data, dtype = bytearray(make()), torch_dtype(expr.dtype.name)
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            return flat.reshape(expr.shape)


def byte_swapped(data: bytearray, itemsize: int) -> bytearray:
    """The elements with their bytes in reverse order."""
    result = bytearray(len(data))
    for i in range(itemsize):
        result[i::itemsize] = data[itemsize - 1 - i :: itemsize]
    return result


def torch_dtype(name: str) -> torch.dtype:
    """torch's own object for an element type."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def resample_positions(table: torch.Tensor, grid: int) -> torch.Tensor:
    """A table [1 + n*n, width] resampled to [1 + grid*grid, width]: bicubic, antialiased, in float32.

    As DeepSeek-OCR's CLIP does when it runs at another size; the class token, the first row, is kept.
    """
    token, positions = table[:1], table[1:].float()
    side = math.isqrt(positions.shape[0])
    image = positions.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    image = torch.nn.functional.interpolate(image, (grid, grid), mode="bicubic", antialias=True, align_corners=False)
    flat = image.permute(0, 2, 3, 1).reshape(grid * grid, -1)
    return torch.cat([token, flat.to(table.dtype)])

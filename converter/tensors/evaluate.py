"""Evaluation of lazy tensors with torch, one output tensor at a time."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import torch

from converter.tensors.lazy_tensor import Cast, Concat, Generated, LazyTensor, Permute, Read, Resample, Reshape, Slice
from converter.tensors.tensor_info import TensorInfo


def tensor_bytes(expr: LazyTensor) -> memoryview:
    """Evaluate to bytes, little-endian and row-major; ContainerError for damaged source data."""
    return as_bytes(evaluate(expr))


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor in row-major order, without a copy if it is contiguous."""
    tensor = tensor.detach().contiguous()
    if not tensor.numel():
        return memoryview(b"")
    array = (ctypes.c_char * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())
    # Keeps the memory alive as long as the view.
    array.tensor = tensor  # type: ignore[attr-defined]
    return memoryview(array).cast("B")


def bit_view(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as integers, for comparisons: a NaN equals itself, and 0.0 is not -0.0."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.element_size()])


def read_tensor(tensor: TensorInfo) -> torch.Tensor:
    """Read a tensor of a checkpoint into memory."""
    dtype = torch_dtype(tensor.dtype.name)
    if not math.prod(tensor.shape):
        return torch.empty(tensor.shape, dtype=dtype)
    data, start = _tensor_data(tensor)
    if tensor.storage.big_endian:
        data = byte_swapped(data, tensor.dtype.itemsize)
    # A hostile file may have a `start` that is not a multiple of the element size; frombuffer accepts it.
    count = (len(data) - start) // tensor.dtype.itemsize
    return torch.frombuffer(data, dtype=dtype, count=count, offset=start).as_strided(tensor.shape, tensor.strides)


def _tensor_data(tensor: TensorInfo) -> tuple[bytearray, int]:
    """Bytes that contain a tensor, and its first byte in them: its own, or all of a storage that must be checked."""
    storage = tensor.storage
    if storage.deflated or storage.big_endian or storage.crc32 is not None:
        return bytearray(storage.read()), tensor.start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    data = bytearray((last + 1) * tensor.dtype.itemsize)
    storage.file.readinto(memoryview(data), storage.offset + tensor.start)
    return data, 0


def evaluate(expr: LazyTensor, load: Callable[[TensorInfo], torch.Tensor] = read_tensor) -> torch.Tensor:
    """Evaluate a lazy tensor on the CPU; `load` reads the tensors of the checkpoint."""
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
    """Reverse the bytes of each element."""
    result = bytearray(len(data))
    for i in range(itemsize):
        result[i::itemsize] = data[itemsize - 1 - i :: itemsize]
    return result


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of that name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def resample_positions(table: torch.Tensor, grid: int) -> torch.Tensor:
    """Resample position embeddings [1 + n*n, width] to [1 + grid*grid, width]: bicubic, antialiased, in float32.

    The same as DeepSeek-OCR's CLIP at another image size; the class token, the first row, is kept.
    """
    token, positions = table[:1], table[1:].float()
    side = math.isqrt(positions.shape[0])
    image = positions.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    image = torch.nn.functional.interpolate(image, (grid, grid), mode="bicubic", antialias=True, align_corners=False)
    flat = image.permute(0, 2, 3, 1).reshape(grid * grid, -1)
    return torch.cat([token, flat.to(table.dtype)])

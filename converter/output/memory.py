"""Output tensors in memory, memory-mapped if a file stores them unchanged, else read or computed; uploads to a GPU."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from mmap import mmap

import torch

from converter.errors import UsageError
from converter.storage.byte_range import ByteRange, Segment, merge
from converter.storage.local_file import LocalFile, SourceFile
from converter.storage.range_set import RangeSet
from converter.storage.stream import BUFFER, CrcChecker
from converter.tensors.evaluate import as_bytes, evaluate, torch_dtype
from converter.tensors.lazy_tensor import LazyTensor, byte_ranges

_BUFFER_SIZE = 32 << 20  # bytes of pinned memory, twice


class Loader:
    """Loads lazy tensors onto a device.

    The source files may be closed while the tensors live: each memory map lives as long as its tensors.

    Args:
        device: The device of the tensors.
        check: Whether to check the CRC-32s of mapped tensors too.
    """

    def __init__(self, device: torch.device, check: bool) -> None:
        self._upload, self._check = Uploader(device), check
        self._checks = CrcChecker()
        self._maps: dict[SourceFile, mmap] = {}
        # Mapped byte ranges: a tensor that overlaps one is read, so that no two tensors share memory.
        self._taken = defaultdict[SourceFile, RangeSet](RangeSet)

    def __call__(self, value: LazyTensor) -> torch.Tensor:
        segments = byte_ranges(value)
        if segments is None:
            computed = evaluate(value).contiguous()
            # A view would keep the memory of the whole tensor.
            is_view = computed.untyped_storage().nbytes() != computed.nbytes
            return self._upload(computed.clone() if is_view else computed)
        segments = merge(segments)
        tensor = self._mapped(value, segments)
        return self._upload(tensor if tensor is not None else self._read(value, segments))

    def _mapped(self, value: LazyTensor, segments: list[Segment]) -> torch.Tensor | None:
        """The tensor as a memory map if it is one aligned range of a local file and overlaps no other, else None."""
        if len(segments) != 1 or not isinstance(segments[0], ByteRange) or not segments[0].length:
            return None
        storage, start, length = segments[0]
        file, offset = storage.file, storage.offset + start
        end, taken = offset + length, self._taken[file]
        if not isinstance(file, LocalFile) or offset % value.dtype.itemsize:
            return None
        if list(taken.missing(offset, end)) != [(offset, end)]:
            return None
        taken.add(offset, end)
        if self._check:
            self._checks.check(storage)
        if file not in self._maps:
            self._maps[file] = file.map()
        dtype, count = torch_dtype(value.dtype.name), math.prod(value.shape)
        return torch.frombuffer(self._maps[file], dtype=dtype, count=count, offset=offset).reshape(value.shape)

    def _read(self, value: LazyTensor, segments: list[Segment]) -> torch.Tensor:
        tensor = torch.empty(value.shape, dtype=torch_dtype(value.dtype.name))
        target = as_bytes(tensor)
        for segment in segments:
            length = segment.length if isinstance(segment, ByteRange) else len(segment)
            part, target = target[:length], target[length:]
            if isinstance(segment, ByteRange):
                self._checks.read(segment, (part[at : at + BUFFER] for at in range(0, length, BUFFER)))
            else:
                part[:] = segment
        return tensor


def checked_device(name: str | torch.device) -> torch.device:
    """The torch.device of a name; UsageError if torch cannot use it."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UsageError(
            f"device {name}: {str(error).splitlines()[0]}", "use cpu, or a device that torch finds"
        ) from error
    return device


class Uploader:
    """Copies tensors to a device; to a GPU through pinned memory.

    A copy directly from a memory-mapped file takes four times as long: the driver waits for the disk.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        pinned = device.type == "cuda"
        buffers = [torch.empty(_BUFFER_SIZE, dtype=torch.uint8, pin_memory=True) for _ in range(2 * pinned)]
        # An event for each buffer: recorded when its copy to the GPU is complete.
        self._buffers = itertools.cycle([(buffer, torch.cuda.Event()) for buffer in buffers])  # type: ignore[no-untyped-call]
        self._pinned = pinned

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self._pinned or tensor.device.type != "cpu":
            return tensor.to(self._device)
        result = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        source, target = _bytes(tensor.contiguous()), _bytes(result)
        for start in range(0, len(source), _BUFFER_SIZE):
            part = source[start : start + _BUFFER_SIZE]
            buffer, sent = next(self._buffers)
            sent.synchronize()
            buffer[: len(part)].copy_(part)
            target[start : start + len(part)].copy_(buffer[: len(part)], non_blocking=True)
            sent.record()
        return result


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)

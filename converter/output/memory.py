"""Loads output tensors into memory or onto a GPU. Tensors that a file stores unchanged are memory-mapped."""

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

_BUFFER_BYTES = 32 << 20  # The size of each of two buffers in pinned memory


class Loader:
    """Loads lazy tensors onto a device.

    The source files may be closed before the tensors are freed, as a memory map lives as long as its tensors.

    Args:
        device: The device of the tensors.
        check: Whether to check the CRC-32s of memory-mapped tensors too.
    """

    def __init__(self, device: torch.device, check: bool) -> None:
        self._upload, self._check_mapped = Uploader(device), check
        self._crc_checker = CrcChecker()
        self._maps: dict[SourceFile, mmap] = {}
        # A tensor that overlaps a mapped byte range is read, so that no two tensors share memory.
        self._mapped_ranges = defaultdict[SourceFile, RangeSet](RangeSet)

    def __call__(self, value: LazyTensor) -> torch.Tensor:
        segments = byte_ranges(value)
        if segments is None:
            computed = evaluate(value).contiguous()
            # A view would keep the memory of the whole tensor.
            is_view = computed.untyped_storage().nbytes() != computed.nbytes
            return self._upload(computed.clone() if is_view else computed)
        segments = merge(segments)
        tensor = self._map(value, segments)
        return self._upload(tensor if tensor is not None else self._read(value, segments))

    def _map(self, value: LazyTensor, segments: list[Segment]) -> torch.Tensor | None:
        """Memory-map a tensor; None unless it is one aligned range of a local file that no mapped tensor overlaps."""
        if len(segments) != 1 or not isinstance(segments[0], ByteRange) or not segments[0].length:
            return None
        storage, start, length = segments[0]
        file, offset = storage.file, storage.offset + start
        end, mapped_ranges = offset + length, self._mapped_ranges[file]
        if not isinstance(file, LocalFile) or offset % value.dtype.itemsize:
            return None
        if list(mapped_ranges.missing(offset, end)) != [(offset, end)]:
            return None
        mapped_ranges.add(offset, end)
        if self._check_mapped:
            self._crc_checker.check(storage)
        if file not in self._maps:
            self._maps[file] = file.map()
        dtype, count = torch_dtype(value.dtype.name), math.prod(value.shape)
        return torch.frombuffer(self._maps[file], dtype=dtype, count=count, offset=offset).reshape(value.shape)

    def _read(self, value: LazyTensor, segments: list[Segment]) -> torch.Tensor:
        tensor = torch.empty(value.shape, dtype=torch_dtype(value.dtype.name))
        remaining = as_bytes(tensor)
        for segment in segments:
            length = segment.length if isinstance(segment, ByteRange) else len(segment)
            target, remaining = remaining[:length], remaining[length:]
            if isinstance(segment, ByteRange):
                self._crc_checker.read(segment, (target[i : i + BUFFER] for i in range(0, length, BUFFER)))
            else:
                target[:] = segment
        return tensor


def checked_device(name: str | torch.device) -> torch.device:
    """Return a torch.device; UsageError if torch cannot use it."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UsageError(
            f"device {name}: {str(error).splitlines()[0]}", "use cpu, or a device that torch finds"
        ) from error
    return device


class Uploader:
    """Copies tensors to a device, through pinned memory if it is a GPU.

    A direct copy from a memory-mapped file takes four times as long, as the driver waits for the disk.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = device.type == "cuda"
        num_buffers = 2 if self._pinned else 0
        buffers = [torch.empty(_BUFFER_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(num_buffers)]
        # The event of a buffer is complete when the buffer has been copied to the GPU.
        self._buffers = itertools.cycle([(buffer, torch.cuda.Event()) for buffer in buffers])  # type: ignore[no-untyped-call]

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self._pinned or tensor.device.type != "cpu":
            return tensor.to(self._device)
        result = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        source, target = tensor.contiguous().view(-1).view(torch.uint8), result.view(-1).view(torch.uint8)
        for start in range(0, len(source), _BUFFER_BYTES):
            chunk = source[start : start + _BUFFER_BYTES]
            buffer, is_copied = next(self._buffers)
            is_copied.synchronize()
            buffer[: len(chunk)].copy_(chunk)
            target[start : start + len(chunk)].copy_(buffer[: len(chunk)], non_blocking=True)
            is_copied.record()
        return result

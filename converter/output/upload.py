"""Copies tensors to a GPU through pinned memory."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

_BUFFER_SIZE = 32 << 20  # bytes of pinned memory, twice


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

    def __call__(self, tensor: Tensor) -> Tensor:
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


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)

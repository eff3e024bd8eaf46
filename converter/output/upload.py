"""Weights on their way to the GPU, which should spend its time computing."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

_STAGING = 32 << 20  # bytes of pinned memory, twice


class Uploader:
    """Copies tensors to a device; to a GPU through pinned memory.

    A copy straight from a mapped file keeps the GPU busy while the driver reads the file: four times as long.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        pinned = device.type == "cuda"
        buffers = [torch.empty(_STAGING, dtype=torch.uint8, pin_memory=True) for _ in range(2 * pinned)]
        # An event for each buffer: it may be filled again when what it held has left it.
        self._staging = itertools.cycle([(buffer, torch.cuda.Event()) for buffer in buffers])  # type: ignore[no-untyped-call]
        self._pinned = pinned

    def __call__(self, tensor: Tensor) -> Tensor:
        if not self._pinned or tensor.device.type != "cpu":
            return tensor.to(self._device)
        result = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        source, target = _bytes(tensor.contiguous()), _bytes(result)
        for start in range(0, len(source), _STAGING):
            part = source[start : start + _STAGING]
            buffer, sent = next(self._staging)
            sent.synchronize()
            buffer[: len(part)].copy_(part)
            target[start : start + len(part)].copy_(buffer[: len(part)], non_blocking=True)
            sent.record()
        return result


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)

"""`converter.load`: loads converted tensors into memory, without writing a file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.checkpoint.open import check_unchanged
from converter.checkpoint.sources import open_sources
from converter.options import ConvertOptions, split_options
from converter.output.names import overflow_warning
from converter.output.record import function_warning
from converter.plan.planner import check_options, resolve
from converter.storage.progress import OnProgress
from converter.tensors.dtypes import dtype_name
from converter.tensors.lazy_tensor import all_source_tensors, count_overflows

if TYPE_CHECKING:
    import torch


def load(
    source: str | Path,
    family: str,
    *,
    dtype: str | torch.dtype = "keep",
    device: str | torch.device = "cpu",
    check: bool = False,
    on_progress: OnProgress = lambda what, done, total: None,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """Load the tensors that `convert` would write, with the same bits and in the same order.

    On the CPU, a tensor that is stored unchanged in a local file is a private memory map: nothing is read before its
    first use, and writes to it never reach the file. The file must not be modified in place while the tensors are in
    use; it may be replaced or removed. All other tensors are read or computed on load. On a GPU, all tensors are copied
    through 64 MiB of pinned memory. No two tensors share memory.

    Args:
        source: A checkpoint, as in `convert`. It may already have the DeepEncoder's layout.
        family: "sam", "clip" or "qwen2".
        dtype: As in `convert`, or a torch.dtype.
        device: The device of the tensors.
        check: Whether to check the CRC-32s of memory-mapped tensors too, which reads them once. Those of all other
            tensors are always checked.
        on_progress: Called after each tensor; for sources on a hub, as bytes are fetched, also from other threads.
        **options: The fields of `converter.options.ConvertOptions` and `HubOptions`, as in `convert`.

    Warns:
        UserWarning: A cast made finite values infinite, or the encoder computes another function than the source.
    """
    convert_options, hub_options = split_options(options, ConvertOptions, family=family, dtype=dtype_name(dtype))
    check_options(convert_options)
    # Only now, as it imports torch, which takes two seconds.
    from converter.output.memory import Loader, checked_device

    torch_device = checked_device(device)
    with open_sources(source, convert_options, hub_options) as (checkpoints, opened, donor):
        plan = resolve(opened, convert_options, donor).plan
        needed = all_source_tensors(plan.outputs.values())
        for checkpoint in checkpoints:
            checkpoint.prefetch(needed, on_progress)
        loader = Loader(torch_device, check)
        tensors = {}
        for name, value in plan.outputs.items():
            tensors[name] = loader(value)
            if not opened.remote:
                on_progress("loading", len(tensors), len(plan.outputs))
        check_unchanged(checkpoints)
        overflows = count_overflows(plan.outputs)
        messages = function_warning(plan, plan.layout)
        if overflows:
            messages.append(overflow_warning(overflows))
        for message in messages:
            warnings.warn(message, stacklevel=2)
        return tensors

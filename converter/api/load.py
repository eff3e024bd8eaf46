"""Converted tensors without a file: for those who only want to initialise a model."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.checkpoint.open import Checkpoint, check_hub_options, check_unchanged, open_checkpoint
from converter.options import ConvertOptions, split_options
from converter.plan.plan import Plan
from converter.plan.planner import check_options, resolve, resolve_to_canonical
from converter.storage.progress import OnProgress
from converter.tensors.lazy_tensor import source_tensors

if TYPE_CHECKING:
    import torch


def load(
    source: str | Path,
    family: str,
    *,
    fill_from: str | Path | None = None,
    dtype: str | torch.dtype = "keep",
    device: str | torch.device = "cpu",
    check: bool = False,
    on_progress: OnProgress = lambda what, done, total: None,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """The tensors that `convert` would write, bit by bit and in the same order, on `device`; no file is written.

    The options are `convert`'s; `dtype` may be torch's own object. A source in the DeepEncoder's layout is taken too.

    On the CPU, a tensor that lies in a local file as it is (any that is only renamed or reshaped) is a private map of
    that part of the file: nothing is read before it is used, and what is written to it never reaches the file. Such a
    file must not be changed in place while the tensors live; it may be replaced or removed. Fused q, k and v are read
    straight into one tensor. Everything that is read is checked against the file's CRC-32s where it has them (torch's
    zip; safetensors has none). What is mapped is not, unless `check` is set, which reads it once.

    A remote source is read, not mapped: the needed bytes alone are fetched. On a GPU, tensors arrive through 64 MiB of
    pinned memory. No two tensors share memory. `progress` is called as bytes are fetched, then also from other threads,
    or after each tensor. Raises a DsocrError.
    """
    convert_options, hub_options = split_options(family, {**options, "dtype": str(dtype).removeprefix("torch.")})
    check_options(convert_options)
    # Two seconds of torch, which a mistyped layout need not wait for.
    from converter.output.memory import Loader, checked_device

    place = checked_device(device)
    with ExitStack() as stack:
        sources = [name for name in (source, fill_from) if name is not None]
        both = [stack.enter_context(closing(open_checkpoint(name, hub_options))) for name in sources]
        check_hub_options(hub_options, both)
        opened, donor = both[0], both[1] if fill_from is not None else None
        outputs = _plan(opened, convert_options, donor).outputs
        for each in both:
            each.prefetch([tensor for value in outputs.values() for tensor in source_tensors(value)], on_progress)
        found = Loader(place, check)
        tensors = {}
        for done, (name, value) in enumerate(outputs.items()):
            tensors[name] = found(value)
            if not opened.remote:
                on_progress("loading", done + 1, len(outputs))
        check_unchanged(both)
        return tensors


def _plan(opened: Checkpoint, options: ConvertOptions, donor: Checkpoint | None) -> Plan:
    """The plan of a conversion; unlike that, of a source that is in the wanted layout already, too."""
    if options.layout == options.canonical and donor is None:
        return resolve_to_canonical(opened, options, options.dtype).plan
    return resolve(opened, options, donor).plan

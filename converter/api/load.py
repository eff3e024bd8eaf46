"""Converted tensors without a file: for those who only want to initialise a model."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

from converter.checkpoint.open import Checkpoint, check_unchanged, open_checkpoint
from converter.hub.address import HubOptions
from converter.plan.plan import Plan
from converter.plan.planner import ConvertOptions, resolve, resolve_to_canonical
from converter.storage.progress import OnProgress
from converter.tensors.lazy_tensor import source_tensors

if TYPE_CHECKING:
    import torch


def load(
    source: str | Path,
    family: str,
    *,
    to: str = "",
    whole: bool = False,
    fill_from: str | Path | None = None,
    mapping: str | Path | None = None,
    dtype: str | torch.dtype = "keep",
    image_size: int | None = None,
    state_dict: str | None = None,
    device: str | torch.device = "cpu",
    check: bool = False,
    revision: str | None = None,
    hub: str | None = None,
    download: bool = False,
    on_progress: OnProgress = lambda what, done, total: None,
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
    options = ConvertOptions(
        family, to, mapping, str(dtype).removeprefix("torch."), image_size, state_dict, whole
    ).checked()
    # Two seconds of torch, which a mistyped layout need not wait for.
    from converter.output.memory import Loader, checked_device

    place = checked_device(device)
    with ExitStack() as stack:
        opened = stack.enter_context(closing(open_checkpoint(source, HubOptions(revision, hub, download))))
        donor = stack.enter_context(closing(open_checkpoint(fill_from))) if fill_from is not None else None
        outputs = _plan(opened, options, donor).outputs
        both = [opened, donor] if donor else [opened]
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
    if options.to == options.canonical and donor is None:
        return resolve_to_canonical(opened, options, options.dtype).plan
    return resolve(opened, options, donor).plan

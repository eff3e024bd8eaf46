"""The sources of a conversion: the checkpoint, one that supplies missing tensors, and an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from converter.checkpoint.folder import ADAPTER_NAMES
from converter.checkpoint.open import Checkpoint, open_checkpoints
from converter.options import ConvertOptions, HubOptions


@contextmanager
def open_sources(
    source: str | Path, options: ConvertOptions, hub_options: HubOptions
) -> Iterator[tuple[list[Checkpoint], Checkpoint, Checkpoint | None]]:
    """Open the sources of a conversion: all, the checkpoint with its adapter, the donor; close them after the block.

    Args:
        source: The checkpoint to convert.
        options: The checkpoint that supplies missing tensors, and the adapter to merge.
        hub_options: How to read a hub.
    """
    donors = [options.fill_from] if options.fill_from is not None else []
    names = [source, *donors, *lora_files(options.lora, options.adapter_name)]
    with open_checkpoints(names, hub_options) as opened:
        donor, first = opened[1] if donors else None, opened[0]
        if options.lora is not None:
            from converter.checkpoint.adapter import with_adapter

            first = with_adapter(first, opened[-1], options.adapter_name)
        yield opened, first, donor


def lora_files(name: str | Path | None, adapter_name: str | None) -> list[str | Path]:
    """Return what to open for an adapter: its weights in a folder, which may hold other checkpoints, or the name.

    PEFT saves several adapters in folders of their names.
    """
    if name is None:
        return []
    folders = [Path(name) / adapter_name] if adapter_name else []
    files = (folder / file for folder in (*folders, Path(name)) for file in ADAPTER_NAMES)
    return [next((path for path in files if path.is_file()), name)]

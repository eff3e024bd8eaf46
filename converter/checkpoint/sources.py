"""Opens the sources of a conversion: the checkpoint, a donor of missing tensors (--fill-from), and an adapter."""

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
    """Open all sources of a conversion: yield them, the checkpoint with its adapter, and the donor (or None).

    Args:
        source: The checkpoint to convert.
        options: The conversion options, with the donor and the adapter.
        hub_options: The hub options.
    """
    donors = [options.fill_from] if options.fill_from is not None else []
    names = [source, *donors, *lora_files(options.lora, options.adapter_name)]
    with open_checkpoints(names, hub_options) as opened:
        checkpoint, donor = opened[0], opened[1] if donors else None
        if options.lora is not None:
            from converter.checkpoint.adapter import with_adapter

            checkpoint = with_adapter(checkpoint, opened[-1], options.adapter_name)
        yield opened, checkpoint, donor


def lora_files(name: str | Path | None, adapter_name: str | None) -> list[str | Path]:
    """Return the weights file of an adapter's folder, which may contain other checkpoints too, or `name` itself.

    PEFT saves each of several adapters in a folder of its name. The list is empty without an adapter.
    """
    if name is None:
        return []
    folders = [Path(name) / adapter_name] if adapter_name else []
    files = (folder / file for folder in (*folders, Path(name)) for file in ADAPTER_NAMES)
    return [next((path for path in files if path.is_file()), name)]

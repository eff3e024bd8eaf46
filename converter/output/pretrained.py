"""Writes folders that transformers loads with `from_pretrained`, with weights and config files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from converter.checkpoint.folder import WEIGHT_SUFFIXES, has_weight_suffix
from converter.errors import UsageError
from converter.storage.atomic_output import new_file, write_all

_WEIGHTS_FILE = "model.safetensors"
# Layouts whose folders transformers loads.
LAYOUTS = ("sam-hf", "clip-hf")


def is_folder_output(out: Path, layout: str) -> bool:
    """Return whether an output is a folder: its name has no weight suffix, and its layout is not canonical."""
    return not has_weight_suffix(out.name) and not layout.startswith("deepencoder-")


def check_folder_output(out: Path, layout: str, format: str) -> None:
    """Raise UsageError if transformers cannot load a folder with this layout and format.

    Args:
        out: The path of the folder.
        layout: The layout of the weights.
        format: safetensors or pth.
    """
    if layout not in LAYOUTS:
        raise UsageError(
            f"--output {out}: names a folder, but {layout} is written to one file",
            f"add one of the suffixes {', '.join(WEIGHT_SUFFIXES)}; folders are for {', '.join(LAYOUTS)}",
        )
    if format != "safetensors":
        raise UsageError(f"--output {out}: names a folder, which needs safetensors, not {format}", "leave out --format")


@contextmanager
def open_pretrained_folder(folder: Path, documents: Mapping[str, bytes]) -> Iterator[int]:
    """Write `documents` to a new folder, and yield a file descriptor to write the weights to."""
    for name, data in documents.items():
        with new_file(folder / name) as fd:
            write_all(fd, memoryview(data))
    with new_file(folder / _WEIGHTS_FILE) as fd:
        yield fd

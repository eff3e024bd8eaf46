"""Folders that transformers loads with `from_pretrained`: the weights, config.json and preprocessor_config.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from converter.checkpoint.locate import WEIGHT_SUFFIXES
from converter.errors import LayoutError, UsageError
from converter.plan.plan import Plan
from converter.storage.atomic_output import new_file, write_all

# The name of the weights in the folder.
_MODEL = "model.safetensors"
# Layouts whose folders transformers loads.
LAYOUTS = ("sam-hf", "clip-hf")


def wants_folder(out: Path, layout: str, format: str) -> bool:
    """Whether the output is a folder for transformers.

    Args:
        out: The output; a name without a suffix of weights is a folder, except for the DeepEncoder's own layouts.
        layout: The layout of the output.
        format: safetensors or pth.

    Raises:
        UsageError: transformers loads no folder of this layout or format.
    """
    if out.suffix in WEIGHT_SUFFIXES or layout.startswith("deepencoder-"):
        return False
    if layout not in LAYOUTS:
        raise UsageError(
            f"--output {out}: names a folder, and {layout} is one file",
            f"end its name in one of {', '.join(WEIGHT_SUFFIXES)}; folders are for {', '.join(LAYOUTS)}",
        )
    if format != "safetensors":
        raise UsageError(f"--output {out}: names a folder, which holds {_MODEL}, not {format}", "leave out --format")
    return True


def config_files(plan: Plan, full_model: bool) -> dict[str, bytes]:
    """The configuration files of a folder, by name; LayoutError if the shapes are of no model of the family."""
    # Only folders need it.
    from converter.output import pretrained_config as pretrained

    make = {"sam-hf": pretrained.sam, "clip-hf": pretrained.clip}[plan.layout]
    shapes = {name: value.shape for name, value in plan.canonical_tensors.items()}
    floats = [value.dtype.name for value in plan.outputs.values() if value.dtype.is_float]
    try:
        config, preprocessor = make(shapes, full_model)
    except LayoutError as error:
        raise LayoutError(f"{error}", "write the tensors alone: end --output in .safetensors") from error
    # The most frequent type: transformers loads all tensors with one type.
    config["torch_dtype"] = max(sorted(set(floats)), key=floats.count)
    return {"config.json": _json(config), "preprocessor_config.json": _json(preprocessor)}


@contextmanager
def pretrained_file(folder: Path, documents: Mapping[str, bytes]) -> Iterator[int]:
    """Write `documents` to a new folder, and yield a file descriptor for the weights."""
    for name, data in documents.items():
        with new_file(folder / name) as fd:
            write_all(fd, memoryview(data))
    with new_file(folder / _MODEL) as fd:
        yield fd


def _json(document: dict[str, object]) -> bytes:
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()

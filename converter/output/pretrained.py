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

# What the folder calls the tensors' file.
_MODEL = "model.safetensors"
# Layouts whose folders transformers loads.
LAYOUTS = ("sam-hf", "clip-hf")


def wants_folder(out: Path, layout: str, format: str) -> bool:
    """Whether `out` names a folder; UsageError where nothing loads the layout, or the format, from one.

    The DeepEncoder's own layouts are one file, whatever its name.
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


def config_files(plan: Plan, whole: bool) -> dict[str, bytes]:
    """What lies beside the weights in a folder, by name; LayoutError where the shapes are of no model of the family."""
    # Imported here, with its data classes, for folders alone.
    from converter.output import pretrained_config as pretrained

    make = {"sam-hf": pretrained.sam, "clip-hf": pretrained.clip}[plan.layout]
    shapes = {name: value.shape for name, value in plan.canonical_tensors.items()}
    floats = [value.dtype.name for value in plan.outputs.values() if value.dtype.is_float]
    try:
        config, preprocessor = make(shapes, whole)
    except LayoutError as error:
        raise LayoutError(f"{error}", "write the tensors alone: end --output in .safetensors") from error
    # The type that most tensors have: transformers loads all of them as one.
    config["torch_dtype"] = max(sorted(set(floats)), key=floats.count)
    return {"config.json": _json(config), "preprocessor_config.json": _json(preprocessor)}


@contextmanager
def pretrained_file(folder: Path, documents: Mapping[str, bytes]) -> Iterator[int]:
    """A file descriptor for the weights in a new folder, beside which `documents` are written."""
    for name, data in documents.items():
        with new_file(folder / name) as fd:
            write_all(fd, memoryview(data))
    with new_file(folder / _MODEL) as fd:
        yield fd


def _json(document: dict[str, object]) -> bytes:
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()

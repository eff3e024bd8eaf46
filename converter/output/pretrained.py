"""Folders that transformers loads with `from_pretrained`: the weights, config.json and preprocessor_config.json."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from converter.checkpoint.folder import WEIGHT_SUFFIXES, has_weight_suffix
from converter.errors import LayoutError, UsageError
from converter.plan.plan import Plan
from converter.storage.atomic_output import new_file, write_all

_WEIGHTS_FILE = "model.safetensors"
# Layouts whose folders transformers loads.
LAYOUTS = ("sam-hf", "clip-hf")


def is_folder_output(out: Path, layout: str) -> bool:
    """Return whether an output is a folder: its name has no suffix of weights, and its layout is not canonical."""
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


def config_files(plan: Plan, full_model: bool, normalization: Mapping[str, object]) -> dict[str, bytes]:
    """Return the configuration files of a folder by name.

    Args:
        plan: The planned conversion to one of `LAYOUTS`.
        full_model: Whether the tensors are of the full model, not only of the vision encoder.
        normalization: image_mean and image_std of the source, if it states them.

    Raises:
        LayoutError: The shapes do not belong to a model of the family.
    """
    # Only folders need it.
    from converter.output import pretrained_config as pretrained

    make = {"sam-hf": pretrained.sam, "clip-hf": pretrained.clip}[plan.layout]
    shapes = {name: value.shape for name, value in plan.canonical_tensors.items()}
    try:
        config, preprocessor = make(shapes, plan.assumptions, full_model)
    except LayoutError as error:
        raise LayoutError(f"{error}", "write the tensors alone: end --output in .safetensors") from error
    # The most frequent type, or the first by name of several: transformers loads all tensors with one type.
    floats = sorted(value.dtype.name for value in plan.outputs.values() if value.dtype.is_float)
    config["torch_dtype"] = Counter(floats).most_common(1)[0][0]
    return {"config.json": _json(config), "preprocessor_config.json": _json({**preprocessor, **normalization})}


@contextmanager
def open_pretrained_folder(folder: Path, documents: Mapping[str, bytes]) -> Iterator[int]:
    """Write `documents` to a new folder, and yield a file descriptor for the weights."""
    for name, data in documents.items():
        with new_file(folder / name) as fd:
            write_all(fd, memoryview(data))
    with new_file(folder / _WEIGHTS_FILE) as fd:
        yield fd


def _json(document: dict[str, object]) -> bytes:
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()

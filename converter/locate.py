"""From what a user names to the files that hold the tensors: a file, a folder, or the index of a sharded checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from converter.errors import ContainerError

# In a folder, the first of these that is there: transformers looks in the same order.
_STANDARD = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
# An index names a few thousand tensors; DeepSeek-OCR's has 250 KB.
_LARGEST_INDEX = 64 << 20


class Located(NamedTuple):
    """The files of one checkpoint; `weight_map` is tensor name -> file name, where an index gives it."""

    name: str
    files: tuple[Path, ...]
    weight_map: dict[str, str] | None = None


def locate(source: str) -> Located:
    """The files behind SOURCE; ContainerError where it is missing, or a folder that leaves a choice."""
    path = Path(source)
    if path.is_dir():
        path = _in_folder(path)
    elif not path.exists():
        raise ContainerError(f"{source}: no such file or folder\ngive a checkpoint file, its folder or its index")
    if path.name.endswith(".index.json"):
        return _sharded(path)
    return Located(source, (path,))


def _in_folder(folder: Path) -> Path:
    for name in _STANDARD:
        if (folder / name).is_file():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS and path.is_file())
    if len(found) == 1:
        return found[0]
    if not found:
        wanted = ", ".join((*_STANDARD, *(f"*{suffix}" for suffix in _WEIGHTS)))
        raise ContainerError(f"{folder}: holds no checkpoint\nlooked for {wanted}")
    names = ", ".join(path.name for path in found)
    raise ContainerError(f"{folder}: holds several checkpoints: {names}\nname the one to convert")


def _sharded(index: Path) -> Located:
    """The shards that an index lists, which must lie beside it."""
    try:
        if index.stat().st_size > _LARGEST_INDEX:
            raise ContainerError(f"{index}: larger than any index of a sharded checkpoint")
        weight_map = json.loads(index.read_bytes())["weight_map"]
        shards = sorted(set(weight_map.values()))
    except OSError as error:
        raise ContainerError(f"{index}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ContainerError(f"{index}: no index of a sharded checkpoint: expected a `weight_map` of names") from error
    if not shards or not all(isinstance(name, str) for name in (*weight_map, *shards)):
        raise ContainerError(f"{index}: its `weight_map` lists no files")
    for shard in shards:
        # Separators of any system: an index made to leave its folder on Windows is as hostile here.
        if shard in ("", ".", "..") or set(shard) & set("/\\:\0"):
            raise ContainerError(f"{index}: the shard {shard!r} is not a file beside the index")
        if not (index.parent / shard).is_file():
            raise ContainerError(f"{index}: the shard {shard!r} is missing\ndownload the rest of the checkpoint")
    return Located(str(index), tuple(index.parent / shard for shard in shards), weight_map)

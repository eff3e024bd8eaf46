"""Checkpoints read by the libraries that define their formats: what our own reading is checked against."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import safetensors
import torch

from converter import loaders
from converter.checkpoint import Tensor
from converter.errors import UsageError
from converter.files import SourceFile
from converter.source import Progress, Source
from converter.unwrap import StateDict

# Containers whose library reads the tensors that are asked for, where they lie; others are read whole.
_IN_PLACE = ("safetensors", "torch zip")

# Gives a source's tensor by the key it has in its state dict.
Reader = Callable[[str], torch.Tensor]


def open_independently(source: Source, state_dict: StateDict, wanted: Iterable[Tensor], progress: Progress) -> Reader:
    """A reader of one state dict of a checkpoint, through torch.load, torch.jit.load or safetensors.

    Of a remote checkpoint it reads the tensors `wanted` alone, which are fetched first.
    """
    source.fetch(wanted, progress)
    for file in source.remote:
        if source.containers[source.files.index(file)] not in _IN_PLACE:
            file.fetch_all([(0, file.size)])
    readers = [
        _READERS.get(container, partial(_outside, container))(file, state_dict)
        for container, file in zip(source.containers, source.files, strict=True)
    ]
    by_key = {key: read for keys, read in readers for key in keys}

    def read(key: str) -> torch.Tensor:
        return by_key[key](key).detach()

    return read


def _safetensors(file: SourceFile, state_dict: StateDict) -> tuple[list[str], Reader]:
    opened: Any = safetensors.safe_open(file.path, "pt")
    return list(opened.keys()), opened.get_tensor


def _torch(file: SourceFile, state_dict: StateDict) -> tuple[list[str], Reader]:
    # Mapped, a checkpoint's unused tensors cost nothing; torch's older format cannot be.
    found = torch.load(file.path, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    tensors = _at(found, state_dict.path)
    return [key for key in tensors if isinstance(key, str)], tensors.__getitem__


def _torchscript(file: SourceFile, state_dict: StateDict) -> tuple[list[str], Reader]:
    # Our loader has refused modules with code that restores them: what remains is deserialised, not run.
    tensors = torch.jit.load(file.path, map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
    return list(tensors), tensors.__getitem__


def _outside(container: str, file: SourceFile, state_dict: StateDict) -> tuple[list[str], Reader]:
    loader = loaders.outside(container)
    if not hasattr(loader, "reference"):
        raise UsageError(
            f"{file.name}: the loader of {container} has no `reference`, which reads it by the format's own library\n"
            "ask the package that brings the loader for one"
        )
    tensors = loader.reference(file.path)
    return list(tensors), tensors.__getitem__


_READERS: dict[str, Callable[[SourceFile, StateDict], tuple[list[str], Reader]]] = {
    "safetensors": _safetensors,
    "torch zip": _torch,
    "torch legacy": _torch,
    "TorchScript": _torchscript,
}


def _is_zip(file: SourceFile) -> bool:
    return file.read(0, 2) == b"PK"


def _at(contents: Any, path: str) -> Any:
    """The dict at a dotted path, whose keys may have dots of their own."""
    if not path:
        return contents
    for key, value in contents.items():
        if path == str(key):
            return value
        if path.startswith(f"{key}.") and isinstance(value, dict):
            return _at(value, path[len(str(key)) + 1 :])
    raise KeyError(path)


def checked_as(read: Reader) -> Callable[[Tensor], torch.Tensor]:
    """The reader for expressions, whose leaves are our own descriptions of tensors."""
    return lambda tensor: read(tensor.key)

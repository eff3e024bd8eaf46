"""Checkpoints read by the libraries that define their formats: what our own reading is checked against."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import safetensors
import torch

from converter.checkpoint.open import Checkpoint
from converter.checkpoint.state_dict import StateDict
from converter.errors import UsageError
from converter.formats import registry as formats_registry
from converter.storage.local_file import SourceFile
from converter.storage.progress import OnProgress
from converter.tensors.tensor_info import TensorInfo

# Containers whose library reads the tensors that are asked for, where they lie; others are read whole.
_IN_PLACE = ("safetensors", "torch zip")
_TORCH = ("torch zip", "torch legacy")

# Gives a source's tensor by the key it has in its state dict.
Reader = Callable[[str], torch.Tensor]


def open_independently(
    source: Checkpoint, state_dict: StateDict, wanted: Iterable[TensorInfo], on_progress: OnProgress
) -> Reader:
    """A reader of one state dict of a checkpoint, through the libraries that define its files' formats.

    Of a remote checkpoint it reads the tensors `wanted` alone, which are fetched first.
    """
    source.fetch(wanted, on_progress)
    for remote in source.remote:
        if source.containers[source.files.index(remote)] not in _IN_PLACE:
            remote.fetch_all([(0, remote.size)])
    by_key: dict[str, Reader] = {}
    for container, file in zip(source.containers, source.files, strict=True):
        keys, read = _opened(container, file, state_dict)
        by_key |= dict.fromkeys(keys, read)
    return lambda key: by_key[key](key).detach()


def _opened(container: str, file: SourceFile, state_dict: StateDict) -> tuple[Iterable[str], Reader]:
    """The keys in a file, and what gives their tensors."""
    if container == "safetensors":
        opened: Any = safetensors.safe_open(file.path, "pt")
        return opened.keys(), opened.get_tensor
    if container == "TorchScript":
        # Our loader has refused modules with code that restores them: what remains is deserialised, not run.
        tensors = torch.jit.load(file.path, map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
    elif container in _TORCH:
        # Mapped, a checkpoint's unused tensors cost nothing; torch's older format cannot be.
        in_place = container in _IN_PLACE
        found = torch.load(file.path, map_location="cpu", weights_only=True, mmap=in_place)
        tensors = _at(found, state_dict.path)
    else:
        tensors = _by_its_loader(container, file)
    return tensors.keys(), tensors.__getitem__


def _by_its_loader(container: str, file: SourceFile) -> dict[str, torch.Tensor]:
    loader: Any = formats_registry.find_plugin(container)
    if not hasattr(loader, "reference"):
        raise UsageError(
            f"{file.name}: the loader of {container} has no `reference`, which reads it by the format's own library",
            "ask the package that brings the loader for one",
        )
    found: dict[str, torch.Tensor] = loader.reference(file.path)
    return found


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

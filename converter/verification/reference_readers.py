"""Checkpoints read by the libraries that define their formats, as a check of our own readers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import safetensors
import torch

from converter.checkpoint.open import Checkpoint
from converter.checkpoint.state_dict import StateDict
from converter.errors import UsageError
from converter.formats import registry
from converter.hub.remote_file import RemoteFile
from converter.storage.local_file import SourceFile
from converter.storage.progress import OnProgress
from converter.tensors.tensor_info import TensorInfo

# Containers that the library reads tensor by tensor; others are read whole.
_IN_PLACE = ("safetensors", "torch zip")

# Returns the tensor of a state dict by its key.
Reader = Callable[[str], torch.Tensor]


def open_independently(
    source: Checkpoint, state_dict: StateDict, needed: Iterable[TensorInfo], on_progress: OnProgress
) -> Reader:
    """Open a state dict with the libraries that define its files' formats.

    Args:
        source: The opened checkpoint.
        state_dict: The state dict to read.
        needed: The tensors to fetch if the checkpoint is on a hub.
        on_progress: Called as they are fetched.

    Returns:
        A function from a key to its tensor.
    """
    source.fetch(needed, on_progress)
    readers: dict[str, Reader] = {}
    for container, file in zip(source.containers, source.files, strict=True):
        if isinstance(file, RemoteFile) and container not in _IN_PLACE:
            file.fetch_all([(0, file.size)])
        keys, read = _open(container, file, state_dict)
        readers |= dict.fromkeys(keys, read)
    return lambda key: readers[key](key).detach()


def _open(container: str, file: SourceFile, state_dict: StateDict) -> tuple[Iterable[str], Reader]:
    """The keys in a file, and a reader of their tensors."""
    if container == "safetensors":
        opened: Any = safetensors.safe_open(file.path, "pt")
        return opened.keys(), opened.get_tensor
    if container == "TorchScript":
        # Our reader has refused modules with code that runs on loading.
        tensors = torch.jit.load(file.path, map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
    elif container in ("torch zip", "torch legacy"):
        # torch's older format cannot be mapped.
        mapped = container in _IN_PLACE
        contents = torch.load(file.path, map_location="cpu", weights_only=True, mmap=mapped)
        tensors = _at(contents, state_dict.path)
    else:
        loader: Any = registry.find_plugin(container)
        if not hasattr(loader, "reference"):
            message = f"{file.name}: the loader of {container} has no `reference`, a reader by the format's own library"
            raise UsageError(message, "ask the package that provides the loader for one")
        tensors = loader.reference(file.path)
    return tensors.keys(), tensors.__getitem__


def _at(contents: Any, path: str) -> Any:
    """The dict at a dotted path, whose keys may contain dots."""
    if not path:
        return contents
    for key, value in contents.items():
        if path == str(key):
            return value
        if path.startswith(f"{key}.") and isinstance(value, dict):
            return _at(value, path[len(str(key)) + 1 :])
    raise KeyError(path)

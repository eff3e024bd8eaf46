"""Reads checkpoints with the libraries that define their formats, to check our own readers."""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from converter.checkpoint.open import Checkpoint
from converter.checkpoint.state_dict import state_dicts
from converter.errors import ContainerError, DsocrError, UsageError
from converter.formats import dcp_files, registry
from converter.hub.remote_file import RemoteFile
from converter.storage.local_file import SourceFile
from converter.storage.progress import OnProgress
from converter.tensors.tensor_info import TensorInfo
from converter.verification import restricted_pickle

# The attributes of a torch.nn.Module that hold its tensors.
_MODULE_ATTRIBUTES = {"_parameters", "_buffers", "_modules"}
# Containers whose libraries read one tensor at a time. Files of other containers are read as a whole.
_READ_BY_TENSOR = ("safetensors", "torch zip", "GGUF")

# Reads a tensor of a checkpoint.
Reader = Callable[[TensorInfo], Tensor]


def open_independently(source: Checkpoint, needed: Iterable[TensorInfo], on_progress: OnProgress) -> Reader:
    """Return a reader that uses the libraries of a checkpoint's formats. The files are opened at its first call.

    Args:
        source: The opened checkpoint.
        needed: The tensors to fetch if the checkpoint is on a hub.
        on_progress: Called as they are fetched.

    Raises:
        ContainerError: A library does not read its file. The returned reader raises it.
    """
    open_once = functools.cache(functools.partial(_open_all, source, list(needed), on_progress))
    return lambda tensor: open_once()(tensor)


def join_readers(sources: Iterable[Checkpoint], needed: Sequence[TensorInfo], on_progress: OnProgress) -> Reader:
    """Return one reader for the tensors of several checkpoints.

    Args:
        sources: The opened checkpoints.
        needed: The tensors to fetch from checkpoints on a hub.
        on_progress: Called as they are fetched.
    """
    readers: dict[SourceFile, Reader] = {}
    for source in sources:
        tensors = [tensor for tensor in needed if tensor.storage.file in source.files]
        readers |= dict.fromkeys(source.files, open_independently(source, tensors, on_progress))
    return lambda tensor: readers[tensor.storage.file](tensor)


def _open_all(source: Checkpoint, needed: Iterable[TensorInfo], on_progress: OnProgress) -> Reader:
    source.fetch(needed, on_progress)
    paths = {tensor: entry.path for entry in state_dicts(source.contents) for tensor in entry.tensors.values()}
    deflated = {tensor.storage.file for tensor in paths if tensor.storage.deflated}
    containers = dict(zip(source.files, source.containers, strict=True))
    readers: dict[SourceFile, Callable[[str, str], Tensor]] = {}
    for file, container in containers.items():
        if isinstance(file, RemoteFile) and container not in _READ_BY_TENSOR:
            if container == dcp_files.CONTAINER:
                raise UsageError(f"{source.name}: torch reads {container} from a whole folder alone", "add --download")
            file.fetch_all([(0, file.size)])
        with _library_errors(container, file):
            readers[file] = _open(container, file, mapped=file not in deflated)

    def read(tensor: TensorInfo) -> Tensor:
        file = tensor.storage.file
        with _library_errors(containers[file], file, f": tensor {tensor.key!r}"):
            return readers[file](paths[tensor], tensor.key).detach()

    return read


@contextmanager
def _library_errors(container: str, file: SourceFile, where: str = "") -> Iterator[None]:
    """Raise ContainerError for any exception of a library, which may not support every valid file."""
    try:
        yield
    except DsocrError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")[:200] or type(error).__name__
        raise ContainerError(
            f"{file.name}{where}: the library of the format {container} does not read it: {reason}",
            "this shows no error of the conversion; where you trust the file, load it with its own library, save the "
            "tensors with safetensors, and verify with that copy as --source",
        ) from error


def _open(container: str, file: SourceFile, mapped: bool) -> Callable[[str, str], Tensor]:
    """Open a file with the library of its container. Return a function from state dict path and key to the tensor."""
    if container == "safetensors":
        opened: Any = safetensors.safe_open(file.path, "pt")
        return lambda path, key: opened.get_tensor(key)
    if container == "TorchScript":
        # Our reader has refused modules with code that runs on loading.
        module = torch.jit.load(file.path, map_location="cpu")  # type: ignore[no-untyped-call]
        # state_dict() omits the buffers of modules that torch 1.4 saved, so tensors are read as attributes.
        return lambda path, key: operator.attrgetter(key)(module)
    if container == dcp_files.CONTAINER:
        return _open_dcp(Path(file.path).parent)
    if container == "GGUF":
        return _open_gguf(file.path)
    if container in ("torch zip", "torch legacy"):
        contents = _torch_load(file.path, mapped and container in _READ_BY_TENSOR)
        return lambda path, key: _state_dict_at(contents, path)[key]
    loader: Any = registry.find_plugin(container)
    if not hasattr(loader, "reference"):
        message = f"{file.name}: the loader of {container} has no `reference`, a reader by the format's own library"
        raise UsageError(message, "ask the package that provides the loader for one")
    tensors = loader.reference(file.path)
    return lambda path, key: tensors[key]


@functools.cache
def _open_dcp(folder: Path) -> Callable[[str, str], Tensor]:
    """Return a function that loads one tensor of a DCP folder with torch's own planner."""
    # The import takes a second, and fails in builds of torch without distributed.
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader: Any = FileSystemReader(folder)
    with (folder / dcp_files.METADATA).open("rb") as file:
        metadata: Any = restricted_pickle.load_dcp_metadata(file)
    reader.read_metadata = lambda: metadata

    def read(path: str, key: str) -> Tensor:
        name = f"{path}.{key}" if path else key
        tensor = metadata.state_dict_metadata[name]
        tensors = {name: torch.empty(tensor.size, dtype=tensor.properties.dtype)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            load(tensors, storage_reader=reader, no_dist=True)
        return tensors[name]

    return read


def _open_gguf(path: str) -> Callable[[str, str], Tensor]:
    """Return a function from the name of a tensor in a GGUF file to the memory-mapped tensor."""
    try:
        import gguf
    except ImportError as error:
        raise UsageError(f"{path}: GGUF files are verified with the package gguf", "run: pip install gguf") from error
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path, "c").tensors}

    def read(_: str, key: str) -> Tensor:
        data, shape = torch.from_numpy(tensors[key].data), tensors[key].shape.tolist()
        is_bfloat16 = tensors[key].tensor_type.name == "BF16"
        return (data.view(torch.bfloat16) if is_bfloat16 else data).reshape(shape[::-1])

    return read


def _torch_load(path: str, mapped: bool) -> Any:
    """Load a file with torch.load, without importing anything that the file names.

    `mapped` must be false for compressed zip members, whose bytes torch would take for weights.
    """
    load = functools.partial(torch.load, path, map_location="cpu", mmap=mapped)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")
        # torch looks for the source code of the classes of pickled modules.
        warnings.filterwarnings("ignore", "Couldn't retrieve source code")
        try:
            return load(weights_only=True)
        except Exception:
            # weights_only refuses pickle protocols other than 2 and 3, and objects of other classes in the file.
            return load(weights_only=False, pickle_module=restricted_pickle)


def _state_dict_at(contents: Any, path: str) -> Mapping[Any, Any]:
    """Return the items at a dotted path, whose keys may contain dots; empty if there is no such path."""
    if not path:
        return _items(contents)
    for key, value in _items(contents).items():
        if path == str(key):
            return _items(value)
        if path.startswith(f"{key}.") and (found := _state_dict_at(value, path[len(str(key)) + 1 :])):
            return found
    return {}


def _items(value: Any) -> Mapping[Any, Any]:
    """Return the items of a dict or a list, or the tensors of a module that was pickled as a whole."""
    if isinstance(value, dict):
        return dict(_module_tensors(value)) if value.keys() >= _MODULE_ATTRIBUTES else value
    return dict(enumerate(value)) if isinstance(value, (list, tuple)) else {}


def _module_tensors(module: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the tensors of a pickled module by the names of its `state_dict()`."""
    for name, tensor in {**module["_parameters"], **module["_buffers"]}.items():
        yield prefix + name, tensor
    for name, child in module["_modules"].items():
        if child is not None:
            yield from _module_tensors(child, f"{prefix}{name}.")

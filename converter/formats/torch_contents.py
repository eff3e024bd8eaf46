"""Makes the contents of a checkpoint from the value of a torch pickle: named tensors with their bytes in the file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from converter.errors import ContainerError
from converter.formats.pickle_opcodes import RESAVE
from converter.formats.pickle_reader import Placeholder
from converter.formats.torch_pickle import StorageRef, TensorRecord, packed_record, unreadable_record
from converter.storage.byte_range import Storage
from converter.storage.local_file import SourceFile
from converter.tensors.tensor_info import Contents, FileContents, TensorInfo, checked_tensor_info, plain_tensor_info

MAX_DEPTH = 16  # of nested dicts and lists, as a dict may contain itself. Deeper ones are left out
MAX_NAME = 10_000  # characters of a key
_MAX_MODULE_DEPTH = 100  # of nested modules
_MAX_ENTRIES = 200_000  # of all dicts with tensors together, as a dict may occur many times
# Bytes by which all tensors together may exceed their storages: expand() makes a tensor of any size from one element.
# Such a tensor is computed in memory. CLIP's token embedding, the largest tensor, takes 250 MB.
_MAX_REPEATED_NBYTES = 1 << 30
_DISTRUST = "no checkpoint needs that: do not trust this file"

StorageOf = Callable[[StorageRef], Storage]  # finds the bytes of a storage in the container

_SCALARS = (str, int, float, bool)
_NESTED = (dict, list, tuple, Placeholder)
_MODULE = ("_parameters", "_buffers", "_modules")


class Resolver:
    """Adds names and storages to the tensors of an unpickled value, within the limits above."""

    def __init__(self, file: SourceFile, storage_of: StorageOf) -> None:
        self._file, self._storage_of = file, storage_of
        self._storages: dict[StorageRef, Storage] = {}
        self._num_entries = 0
        self._repeated = 0  # bytes
        # By the id of a container in the pickle's value, which keeps it alive.
        self._items: dict[int, dict[Any, Any]] = {}
        self._without_tensors: dict[int, int] = {}

    def tensor(self, key: str, record: TensorRecord) -> TensorInfo:
        """Return the tensor with its name and storage; ContainerError if it does not fit into the storage."""
        if record.ref is None:
            return plain_tensor_info(self._file, key, record.dtype, record.shape, 0)
        storage = self._storages.get(record.ref)
        if storage is None:
            storage = self._storages[record.ref] = self._storage_of(record.ref)
        tensor = checked_tensor_info(key, record.dtype, record.shape, storage, record.offset, record.strides)
        self._repeated += max(tensor.nbytes - storage.size, 0)
        problem = ""
        if storage.big_endian and tensor.dtype.itemsize != record.ref.itemsize:
            # torch swaps the bytes of the storage's elements, not of the tensor's.
            problem = "big-endian, with another element type than its storage"
        elif self._repeated > _MAX_REPEATED_NBYTES:
            problem = f"the shape {tensor.shape} of {storage.size} bytes repeated"
        if problem:
            step = "where you trust the file, load it with torch and save the tensors' clones: t.clone()"
            raise ContainerError(f"{self._file.name}: tensor {key!r}: {problem}", step)
        return tensor

    def count_entries(self, num_entries: int, depth: int) -> None:
        """Add the entries of a dict or module to the total; ContainerError for a total or a depth above the limit."""
        self._num_entries += num_entries
        if depth > _MAX_MODULE_DEPTH or self._num_entries > _MAX_ENTRIES:
            limits = f"nested more than {_MAX_MODULE_DEPTH} deep, or dicts with more than {_MAX_ENTRIES} entries"
            raise ContainerError(f"{self._file.name}: modules {limits}", _DISTRUST)

    def checked_name(self, name: str) -> str:
        """Return `name`; ContainerError if it is too long."""
        if len(name) > MAX_NAME:
            raise ContainerError(f"{self._file.name}: a name of {len(name)} characters, {name[:40]!r}...", _DISTRUST)
        return name

    def contents(self, value: Any, depth: int = 0) -> Contents | None:
        """Return the nested dicts, lists and modules of `value` that have tensors, as dicts; None if none has any.

        Scalars are kept, and other values become None.
        """
        # A container without tensors is only searched again at a smaller depth, where more of it is within MAX_DEPTH.
        if depth > MAX_DEPTH or self._without_tensors.get(id(value), MAX_DEPTH + 1) <= depth:
            return None
        contents = {key: self._item(key, item, depth) for key, item in self._items_of(value).items()}
        if any(type(item) in (TensorInfo, dict) for item in contents.values()):
            self.count_entries(len(contents), depth)
            return contents
        self._without_tensors[id(value)] = depth
        return None

    def _items_of(self, value: Any) -> dict[Any, Any]:
        """Return the items of a container by key or index, or the tensors of a module by name."""
        content = value.content if type(value) is Placeholder else value
        if type(content) is dict:
            return content
        if id(value) not in self._items:
            items: dict[Any, Any]
            if type(value) is Placeholder:
                items = dict(self._module(value)) if _is_module(value) else {}
            else:
                items = {index: item for index, item in enumerate(value) if type(item) in _NESTED}
            self._items[id(value)] = items
        return self._items[id(value)]

    def _module(self, module: Placeholder, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, TensorRecord]]:
        """Yield the names and tensors of a module's `state_dict()`."""
        parameters, buffers, modules = (module.state[name] for name in _MODULE)
        self.count_entries(len(parameters) + len(buffers) + len(modules), depth)
        unsaved = module.state.get("_non_persistent_buffers_set")
        unsaved = unsaved if type(unsaved) is set else ()
        for name, tensor in [*parameters.items(), *buffers.items()]:
            if type(tensor) is TensorRecord and name not in unsaved:
                yield self.checked_name(f"{prefix}{name}"), tensor
        if "_packed_params" in module.state:  # a quantized layer's weight and bias
            yield f"{prefix}_packed_params", unreadable_record("quantized")
        for name, child in modules.items():
            if _is_module(child) and type(name) is str:
                yield from self._module(child, self.checked_name(f"{prefix}{name}."), depth + 1)

    def _item(self, key: Any, item: Any, depth: int) -> Any:
        record = item if type(item) is TensorRecord else packed_record(item)
        if record is not None:
            return self.tensor(self.checked_name(_key_name(key)), record)
        if type(item) in _NESTED and type(key) in _SCALARS:
            self.checked_name(str(key))
            return self.contents(item, depth + 1)
        return item if type(item) in _SCALARS else None


def _is_module(value: Any) -> bool:
    """Return whether a value is a torch.nn.Module with plain dicts of parameters, buffers and modules."""
    state = value.state if type(value) is Placeholder else None
    return type(state) is dict and all(type(state.get(name)) is dict for name in _MODULE)


def _key_name(key: Any) -> str:
    """Return the name of the tensor under `key`. The text of a tuple is not used, as its length has no limit."""
    if type(key) in _SCALARS:
        return str(key)
    return f"a {key.name if type(key) is Placeholder else type(key).__name__}"


def contents_of(file: SourceFile, value: Any, storage_of: StorageOf, ignored: Iterable[str] = ()) -> FileContents:
    """Convert an unpickled value to what a loader returns; ContainerError if it has no tensors or exceeds a limit.

    Args:
        file: The file, for messages.
        value: The value, in which tensors are of type `TensorRecord`.
        storage_of: Finds the bytes of a storage in the container.
        ignored: Full names of the classes and functions that were not imported.
    """
    found = Resolver(file, storage_of).contents(value) if type(value) in _NESTED else None
    if found is None and type(value) is not dict:
        raise ContainerError(f"{file.name}: holds {_what(value)}, not a dict of tensors", RESAVE)
    return FileContents(found or {}, ignored)


def _what(value: Any) -> str:
    if type(value) is Placeholder:
        return f"an object of {value.name}"
    return "a tensor" if type(value) is TensorRecord else f"a {type(value).__name__} without named tensors"

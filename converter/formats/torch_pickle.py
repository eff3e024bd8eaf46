"""The globals of torch's pickles, in every container format, and the tensors that they describe.

Tensors are built in two steps. Reading the pickle gives a `TensorRecord` for each; a `Resolver` then adds its name and
its storage in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from converter.errors import ContainerError
from converter.formats.pickle_opcodes import NEXT_STEP, PickleError
from converter.formats.pickle_values import Refused, hashable, safe_frozenset
from converter.storage.byte_range import DAMAGED, Storage
from converter.storage.local_file import SourceFile
from converter.tensors.dtypes import BY_NAME, BY_STORAGE, DType
from converter.tensors.tensor_info import Contents, TensorInfo, checked_tensor_info

MAX_DIMENSIONS = 64  # torch's own limit
MAX_DEPTH = 100  # of nested dicts: a dict may contain itself
MAX_ENTRIES = 200_000  # of all dicts together: a dict may occur many times
MAX_NAME = 10_000  # characters of a key: names of nested keys repeat the outer ones
MAX_INT = 2**63 - 1  # of torch's sizes, strides and offsets
# Bytes by which all tensors together may exceed their storages: expand() makes a tensor of any size from one element.
# Such a tensor is computed in memory. CLIP's token table, the largest tensor, takes 250 MB.
MAX_REPEATED = 1 << 30

_UNTYPED = "UntypedStorage"


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A storage that a pickle refers to.

    Attributes:
        key: Name of the storage in the container.
        dtype: Element type; None for an untyped storage, which consists of bytes.
        numel: Number of elements.
        first: Index of the first element of a view. torch before 0.4 saved views of storages; otherwise 0.
    """

    key: str
    dtype: DType | None
    numel: int
    first: int

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize if self.dtype else 1

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor as a pickle describes it. `offset` and `strides` are in elements."""

    ref: StorageRef
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def storage_ref(pid: Any) -> StorageRef:
    """The storage of a persistent id: ("storage", class, key, device, numel[, view])."""
    kind, type_, key, _device, numel, *view = pid
    if kind != "storage" or not (isinstance(type_, DType) or type_ == _UNTYPED):
        raise PickleError("a reference to something other than a tensor's storage", NEXT_STEP)
    first = view[0][1] if view and view[0] else 0
    if type(key) is not str or not (_is_int64(numel) and _is_int64(first)) or min(numel, first) < 0:
        raise PickleError("a storage of an impossible name or size", DAMAGED)
    return StorageRef(key, None if type_ == _UNTYPED else type_, numel, first)


def _is_int64(number: Any) -> bool:
    return type(number) is int and -MAX_INT <= number <= MAX_INT


class StorageRefs(dict[str, StorageRef]):
    """The storages that a pickle refers to, by key. As in torch, the first reference decides dtype and size."""

    def load(self, pid: Any) -> StorageRef:
        """The storage of a persistent id."""
        ref = storage_ref(pid)
        return replace(self.setdefault(ref.key, replace(ref, first=0)), first=ref.first)


# ---- functions that a pickle may call; none of them does more than describe


def _rebuild_v3(
    ref: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> TensorRecord:
    """A tensor with an element type of its own, apart from that of its storage."""
    if metadata:
        raise PickleError("a conjugated or negated view", "save it again after .resolve_conj() and .resolve_neg()")
    if (type(ref), type(dtype), type(shape), type(strides)) != (StorageRef, DType, tuple, tuple):
        raise PickleError("a tensor without a storage, an element type or a shape", DAMAGED)
    if max(len(shape), len(strides)) > MAX_DIMENSIONS or not all(map(_is_int64, (offset, *shape, *strides))):
        raise PickleError("a tensor of an impossible shape", DAMAGED)
    if ref.first and dtype != ref.dtype:
        raise PickleError("a view of a storage in another element type", "load it with torch and save it again")
    return TensorRecord(ref, dtype, offset + ref.first, shape, strides)


def _rebuild_v2(
    ref: Any, offset: Any, shape: Any, strides: Any, grad: Any = None, hooks: Any = None, metadata: Any = None
) -> TensorRecord:
    """A tensor of its storage's element type; of bytes if the storage is untyped."""
    dtype = (ref.dtype or BY_NAME["uint8"]) if type(ref) is StorageRef else None
    return _rebuild_v3(ref, offset, shape, strides, grad, hooks, dtype, metadata)


def first_argument(value: Any, *_: Any) -> Any:
    """The value without attributes, such as requires_grad of a parameter."""
    return value


def _ordered_dict(pairs: Iterable[Any] = ()) -> dict[Any, Any]:
    return {hashable(key): value for key, value in pairs}


def _counter(counts: Any = None) -> dict[Any, Any]:
    return dict(counts) if type(counts) is dict else {}


def _set(items: Iterable[Any] = ()) -> set[Any]:
    return set(map(hashable, items))


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    # Protocols 0 to 2 have no opcode for bytes and write this call instead.
    if type(text) is not str or encoding != "latin1":
        raise PickleError("a call of _codecs.encode other than for bytes", NEXT_STEP)
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


def _device(*names: Any) -> None:
    return None


GLOBALS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_v2,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
    ("torch._utils", "_rebuild_parameter"): first_argument,
    ("torch._utils", "_rebuild_parameter_with_state"): first_argument,
    ("torch.storage", _UNTYPED): _UNTYPED,
    ("torch", "Size"): first_argument,
    ("torch", "device"): _device,
    ("collections", "OrderedDict"): _ordered_dict,
    ("collections", "Counter"): _counter,
    ("_codecs", "encode"): _encode,
    **{("torch", storage): dtype for storage, dtype in BY_STORAGE.items()},
    **{("torch", name): dtype for name, dtype in BY_NAME.items()},
    # Protocols 0 to 2 use the names of Python 2.
    **{(module, "set"): _set for module in ("builtins", "__builtin__")},
    **{(module, "frozenset"): safe_frozenset for module in ("builtins", "__builtin__")},
    **{(module, "bytes"): _no_bytes for module in ("builtins", "__builtin__")},
}

# Kinds of tensors that cannot be copied as plain bytes.
_REFUSED = {
    "complex numbers": "ComplexFloatStorage ComplexDoubleStorage complex32 complex64 complex128",
    "a quantized tensor": "_rebuild_qtensor QInt8Storage QUInt8Storage QInt32Storage QUInt4x2Storage QUInt2x4Storage",
    "a sparse tensor": "_rebuild_sparse_tensor _rebuild_sparse_csr_tensor",
    "a nested tensor": "_rebuild_nested_tensor",
    "a tensor on the meta device, which has no data": "_rebuild_meta_tensor_no_storage",
    "a tensor kept as a numpy array": "_rebuild_device_tensor_from_numpy _rebuild_xla_tensor",
    "a tensor of an accelerator": "_rebuild_device_tensor_from_cpu_tensor",
    "a tensor of a subclass": "_rebuild_wrapper_subclass _rebuild_from_type_v2",
}
for _what, _names in _REFUSED.items():
    for _name in _names.split():
        for _module in ("torch", "torch._utils", "torch._tensor"):
            GLOBALS[_module, _name] = Refused(f"{_what}: only plain tensors can be converted")


# ---- from records to the contents of a checkpoint

# Finds the bytes of a storage in the container.
StorageOf = Callable[[StorageRef], Storage]

_SCALARS = (str, int, float, bool)


class Resolver:
    """Adds names and storages to the tensors of an unpickled value, within the limits above."""

    def __init__(self, file: SourceFile, storage_of: StorageOf) -> None:
        self._file, self._storage_of = file, storage_of
        self._storages: dict[StorageRef, Storage] = {}
        self._entries = 0
        self._repeated = 0

    def tensor(self, key: str, record: TensorRecord) -> TensorInfo:
        """The tensor with its name and storage; ContainerError where it does not fit into the storage."""
        storage = self._storages.get(record.ref)
        if storage is None:
            storage = self._storages[record.ref] = self._storage_of(record.ref)
        tensor = checked_tensor_info(key, record.dtype, record.shape, storage, record.offset, record.strides)
        if storage.big_endian and tensor.dtype.itemsize != record.ref.itemsize:
            # torch swaps the bytes of the storage's elements, not of the tensor's.
            raise self._error(tensor, "big-endian, with another element type than its storage")
        self._repeated += max(tensor.nbytes - storage.size, 0)
        if self._repeated > MAX_REPEATED:
            raise self._error(tensor, f"the shape {tensor.shape} of {storage.size} bytes repeated")
        return tensor

    def _error(self, tensor: TensorInfo, why: str) -> ContainerError:
        return ContainerError(
            f"{self._file.name}: tensor {tensor.key!r}: {why}",
            "where you trust the file, load it with torch and save its tensors' clones",
        )

    def count(self, entries: int, depth: int) -> None:
        """Count the entries of a dict; ContainerError where dicts are nested too deep or have too many entries."""
        self._entries += entries
        if depth > MAX_DEPTH or self._entries > MAX_ENTRIES:
            raise ContainerError(
                f"{self._file.name}: dicts nested more than {MAX_DEPTH} deep, or with more than {MAX_ENTRIES} entries",
                "no checkpoint needs that: do not trust this file",
            )

    def checked_name(self, name: str) -> str:
        """Return `name`; ContainerError where it is too long."""
        if len(name) > MAX_NAME:
            raise ContainerError(
                f"{self._file.name}: a name of {len(name)} characters, {name[:40]!r}...",
                "no checkpoint needs that: do not trust this file",
            )
        return name

    def contents(self, value: dict[Any, Any], depth: int = 0) -> Contents:
        """The nested dicts of `value` with their tensors. Values other than tensors, dicts and scalars become None."""
        self.count(len(value), depth)
        return {key: self._item(key, item, depth) for key, item in value.items()}

    def _item(self, key: Any, item: Any, depth: int) -> Any:
        if type(item) is TensorRecord:
            return self.tensor(self.checked_name(_key_name(key)), item)
        if type(item) is dict and type(key) in _SCALARS:
            self.checked_name(str(key))
            return self.contents(item, depth + 1)
        return item if type(item) in _SCALARS else None


def _key_name(key: Any) -> str:
    """Name of the tensor under `key`. The text of a tuple is not used: it has no bound."""
    return str(key) if type(key) in _SCALARS else f"a {type(key).__name__}"


def contents(file: SourceFile, value: Any, storage_of: StorageOf) -> Contents:
    """Convert an unpickled value to what a loader returns.

    Args:
        file: The file, for messages.
        value: The value, in which tensors are of type `TensorRecord`.
        storage_of: Finds the bytes of a storage in the container.

    Raises:
        ContainerError: The value is not a dict, exceeds a limit, or has a tensor outside of its storage.
    """
    if type(value) is not dict:
        kind = "tensor" if type(value) is TensorRecord else type(value).__name__
        raise ContainerError(
            f"{file.name}: holds a {kind}, not a dict of tensors",
            "save the weights as one: torch.save(model.state_dict(), 'weights.pth')",
        )
    return Resolver(file, storage_of).contents(value)

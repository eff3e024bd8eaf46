"""What torch's pickles may name, whichever container holds them, and what becomes of each name.

Tensors are rebuilt in two steps. While the pickle is read they are records; where their bytes lie is asked for once
the keys under which they stand are known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from converter.errors import ContainerError
from converter.formats.pickle_opcodes import NEXT_STEP, PickleError
from converter.formats.pickle_reader import Refused, hashable
from converter.storage.byte_range import Storage
from converter.storage.local_file import SourceFile
from converter.tensors.dtypes import BY_NAME, BY_STORAGE, DType
from converter.tensors.tensor_info import Contents, TensorInfo, make_tensor

MAX_DIMENSIONS = 64  # torch's own limit
MAX_DEPTH = 100  # of dicts in dicts: a dict may hold itself
MAX_ENTRIES = 200_000  # of all dicts together: one dict may stand in many places
MAX_NAME = 10_000  # characters of a key: names of keys in dicts in dicts repeat the outer ones
MAX_INT = 2**63 - 1  # of torch's sizes, strides and offsets
# Bytes by which all tensors together may exceed their storages: expand() makes tensors of any size of one element.
# They are written out, and each takes its whole size in memory. CLIP's token table, the largest tensor, takes 250 MB.
MAX_REPEATED = 1 << 30

_UNTYPED = "UntypedStorage"


class StorageRef(NamedTuple):
    """A storage as the pickle names it: `numel` elements of `dtype`, or bytes where it is None.

    Where an old torch saved a view of another storage, `first` is the element of the whole at which the view starts.
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


class TensorRecord(NamedTuple):
    """A tensor as the pickle describes it: `offset` and `strides` count elements."""

    ref: StorageRef
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def storage_ref(pid: Any) -> StorageRef:
    """The storage that a persistent id names: ("storage", class, key, device, numel[, view])."""
    kind, type_, key, _device, numel, *view = pid
    if kind != "storage" or not (isinstance(type_, DType) or type_ == _UNTYPED):
        raise PickleError("a reference to something other than a tensor's storage", NEXT_STEP)
    first = view[0][1] if view and view[0] else 0
    if type(key) is not str or not (_is_int64(numel) and _is_int64(first)) or min(numel, first) < 0:
        raise PickleError("a storage of an impossible name or size", "download or copy the file again")
    return StorageRef(key, None if type_ == _UNTYPED else type_, numel, first)


def _is_int64(number: Any) -> bool:
    return type(number) is int and -MAX_INT <= number <= MAX_INT


class StorageRefs(dict[str, StorageRef]):
    """The storages a pickle names, by key. As in torch, the first mention of one says what it holds."""

    def load(self, pid: Any) -> StorageRef:
        """The storage that a persistent id names."""
        ref = storage_ref(pid)
        return self.setdefault(ref.key, ref._replace(first=0))._replace(first=ref.first)


# ---- the functions that the table below gives a pickle; each returns a description


def _rebuild_v3(
    ref: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> TensorRecord:
    """A tensor whose element type is given beside its storage."""
    if metadata:
        raise PickleError("a conjugated or negated view", "save it again after .resolve_conj() and .resolve_neg()")
    if (type(ref), type(dtype), type(shape), type(strides)) != (StorageRef, DType, tuple, tuple):
        raise PickleError("a tensor without a storage, an element type or a shape", "download or copy the file again")
    if max(len(shape), len(strides)) > MAX_DIMENSIONS or not all(map(_is_int64, (offset, *shape, *strides))):
        raise PickleError("a tensor of an impossible shape", "download or copy the file again")
    if ref.first and dtype != ref.dtype:
        raise PickleError("a view of a storage in another element type", "load it with torch and save it again")
    return TensorRecord(ref, dtype, offset + ref.first, shape, strides)


def _rebuild_v2(
    ref: Any, offset: Any, shape: Any, strides: Any, grad: Any = None, hooks: Any = None, metadata: Any = None
) -> TensorRecord:
    """A tensor of its storage's element type; torch takes an untyped one for bytes."""
    dtype = (ref.dtype or BY_NAME["uint8"]) if type(ref) is StorageRef else None
    return _rebuild_v3(ref, offset, shape, strides, grad, hooks, dtype, metadata)


def _parameter(data: Any, requires_grad: Any, hooks: Any, state: Any = None) -> Any:
    return data


def _ordered_dict(pairs: Iterable[Any] = ()) -> dict[Any, Any]:
    return {hashable(key): value for key, value in pairs}


def _counter(counts: Any = None) -> dict[Any, Any]:
    return dict(counts) if type(counts) is dict else {}


def _set(items: Iterable[Any] = ()) -> set[Any]:
    return set(map(hashable, items))


def _frozenset(items: Iterable[Any] = ()) -> frozenset[Any]:
    return frozenset(map(hashable, items))


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    # Protocols 0 to 2 have no opcode for bytes and write them as this call.
    if type(text) is not str or encoding != "latin1":
        raise PickleError("a call of _codecs.encode other than for bytes", NEXT_STEP)
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


def _size(items: Any) -> Any:
    return items


def _device(*names: Any) -> None:
    return None


GLOBALS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_v2,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch.storage", _UNTYPED): _UNTYPED,
    ("torch", "Size"): _size,
    ("torch", "device"): _device,
    ("collections", "OrderedDict"): _ordered_dict,
    ("collections", "Counter"): _counter,
    ("_codecs", "encode"): _encode,
    **{("torch", storage): dtype for storage, dtype in BY_STORAGE.items()},
    **{("torch", name): dtype for name, dtype in BY_NAME.items()},
    # Protocols 0 to 2 write Python 2's name.
    **{(module, "set"): _set for module in ("builtins", "__builtin__")},
    **{(module, "frozenset"): _frozenset for module in ("builtins", "__builtin__")},
    **{(module, "bytes"): _no_bytes for module in ("builtins", "__builtin__")},
}

# Known, and not to be had as plain bytes.
_REFUSED = {
    "complex numbers": "ComplexFloatStorage ComplexDoubleStorage complex32 complex64 complex128",
    "a quantized tensor": "_rebuild_qtensor QInt8Storage QUInt8Storage QInt32Storage QUInt4x2Storage QUInt2x4Storage",
    "a sparse tensor": "_rebuild_sparse_tensor _rebuild_sparse_csr_tensor",
    "a nested tensor": "_rebuild_nested_tensor",
    "a tensor on the meta device, which has no data": "_rebuild_meta_tensor_no_storage",
    "a tensor kept as a numpy array": "_rebuild_device_tensor_from_numpy _rebuild_xla_tensor",
    "a tensor of an accelerator": "_rebuild_device_tensor_from_cpu_tensor",
    "a tensor of a class of its own": "_rebuild_wrapper_subclass _rebuild_from_type_v2",
}
for _what, _names in _REFUSED.items():
    for _name in _names.split():
        for _module in ("torch", "torch._utils", "torch._tensor"):
            GLOBALS[_module, _name] = Refused(f"{_what}: only plain tensors can be converted")


# ---- from records to a checkpoint's contents

# Finds in the container the bytes of a storage that the pickle names.
StorageOf = Callable[[StorageRef], Storage]

_LEAVES = (str, int, float, bool)


class Resolver:
    """Gives every tensor of an unpickled value its key and its storage."""

    def __init__(self, file: SourceFile, storage_of: StorageOf) -> None:
        self._file, self._storage_of = file, storage_of
        self._storages: dict[StorageRef, Storage] = {}
        self._entries = 0
        self._repeated = 0

    def tensor(self, key: str, record: TensorRecord) -> TensorInfo:
        """A tensor of the file under its key; ContainerError where its bytes are not to be had."""
        storage = self._storages.get(record.ref)
        if storage is None:
            storage = self._storages[record.ref] = self._storage_of(record.ref)
        tensor = make_tensor(key, record.dtype, record.shape, storage, record.offset, record.strides)
        if storage.big_endian and tensor.dtype.itemsize != record.ref.itemsize:
            # torch turns round the storage's elements, not the tensor's.
            raise self._error(tensor, "big-endian, and of another element type than its storage")
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
        """ContainerError once there are too many dicts in dicts, or entries in all."""
        self._entries += entries
        if depth > MAX_DEPTH or self._entries > MAX_ENTRIES:
            raise ContainerError(
                f"{self._file.name}: dicts nested more than {MAX_DEPTH} deep, or of more than {MAX_ENTRIES} entries",
                "no checkpoint needs that: do not trust this file",
            )

    def checked(self, name: str) -> str:
        """`name`; ContainerError where it is one that no checkpoint has."""
        if len(name) > MAX_NAME:
            raise ContainerError(
                f"{self._file.name}: a name of {len(name)} characters, {name[:40]!r}...",
                "no checkpoint needs that: do not trust this file",
            )
        return name

    def contents(self, value: dict[Any, Any], depth: int = 0) -> Contents:
        """The dicts in `value` with each tensor under its key; all but tensors and scalars becomes None."""
        self.count(len(value), depth)
        return {key: self._leaf(key, item, depth) for key, item in value.items()}

    def _leaf(self, key: Any, item: Any, depth: int) -> Any:
        if type(item) is TensorRecord:
            return self.tensor(self.checked(_key_name(key)), item)
        if type(item) is dict and type(key) in _LEAVES:
            self.checked(str(key))
            return self.contents(item, depth + 1)
        return item if type(item) in _LEAVES else None


def _key_name(key: Any) -> str:
    """What a tensor under `key` is called; a tuple could make this as long as it likes."""
    return str(key) if type(key) in _LEAVES else f"a {type(key).__name__}"


def contents(file: SourceFile, value: Any, storage_of: StorageOf) -> Contents:
    """What a loader returns for an unpickled `value`; `storage_of` finds a storage's bytes in the container."""
    if type(value) is not dict:
        kind = "tensor" if type(value) is TensorRecord else type(value).__name__
        raise ContainerError(
            f"{file.name}: holds a {kind}, not a dict of tensors",
            "save the weights as one: torch.save(model.state_dict(), 'weights.pth')",
        )
    return Resolver(file, storage_of).contents(value)

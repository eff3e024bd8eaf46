"""The globals that torch's pickles refer to, in every container format, and the tensors that they describe.

Tensors are described in two steps. Reading the pickle gives a `TensorRecord` for each one; `torch_contents` then adds
its name and its storage in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from converter.formats.pickle_gadgets import is_gadget
from converter.formats.pickle_opcodes import NEXT_STEP, PickleError, full_name, hostile_error
from converter.formats.pickle_reader import Placeholder, hashable, safe_frozenset
from converter.storage.byte_range import DAMAGED
from converter.tensors.dtypes import BY_NAME, BY_STORAGE, IN_TORCH, DType, unreadable
from converter.tensors.tensor_info import MAX_DIMENSIONS, MAX_INT, are_sizes, contiguous_strides

_UNTYPED = "UntypedStorage"


class StorageRef(NamedTuple):
    """A storage that a pickle refers to."""

    key: str  # the name of the storage in the container
    dtype: DType | None  # None for an untyped storage, which consists of bytes
    numel: int
    first: int  # the first element of a view of a storage, which torch before 0.4 saved; otherwise 0

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize if self.dtype else 1

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize


class TensorRecord(NamedTuple):
    """A tensor as a pickle describes it. `offset` and `strides` are in elements."""

    ref: StorageRef | None  # None if the elements are not plain bytes in one storage; `dtype` then says why
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def storage_ref(pid: Any) -> StorageRef | Placeholder:
    """Return the storage of a persistent id ("storage", class, key, device, numel[, view]).

    The legacy format also has ("module", class, file, source) for the class of a module, which is returned.
    """
    if type(pid) is tuple and len(pid) > 1 and type(pid[1]) is Placeholder and pid[0] == "module":
        return pid[1]
    kind, class_, key, _device, numel, *view = pid
    if kind != "storage" or not (isinstance(class_, DType) or class_ == _UNTYPED):
        raise PickleError("a reference to something other than a tensor's storage", NEXT_STEP)
    first = view[0][1] if view and view[0] else 0
    if type(key) is not str or not are_sizes((numel, first)):
        raise PickleError("a storage of an impossible name or size", DAMAGED)
    return StorageRef(key, None if class_ == _UNTYPED else class_, numel, first)


class StorageRefs(dict[str, StorageRef]):
    """The storages that a pickle refers to, by key. As in torch, the first reference decides dtype and size."""

    def load(self, pid: Any) -> StorageRef | Placeholder:
        """Return the storage of a persistent id, or the class of a module."""
        ref = storage_ref(pid)
        if isinstance(ref, Placeholder):
            return ref
        return self.setdefault(ref.key, ref._replace(first=0))._replace(first=ref.first)


def _rebuild_v3(
    ref: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> TensorRecord:
    """Return a tensor whose element type is an argument, as its storage may have another one."""
    if type(dtype) is Placeholder:  # such as torch.int4
        return unreadable_record(dtype.name, shape)
    if metadata:
        return unreadable_record("conjugated or negated view", shape)
    if (type(ref), type(dtype), type(shape), type(strides)) != (StorageRef, DType, tuple, tuple):
        raise PickleError("a tensor without a storage, an element type or a shape", DAMAGED)
    if max(len(shape), len(strides)) > MAX_DIMENSIONS or not all(
        type(number) is int and abs(number) <= MAX_INT for number in (offset, *shape, *strides)
    ):
        raise PickleError("a tensor of an impossible shape", DAMAGED)
    if ref.first and dtype != ref.dtype:
        raise PickleError("a view of a storage in another element type", "load it with torch and save it again")
    return TensorRecord(ref, dtype, offset + ref.first, shape, strides)


def _rebuild_v2(
    ref: Any, offset: Any, shape: Any, strides: Any, grad: Any = None, hooks: Any = None, metadata: Any = None
) -> TensorRecord:
    """Return a tensor of the element type of its storage; uint8 if the storage is untyped."""
    dtype = (ref.dtype or BY_NAME["uint8"]) if type(ref) is StorageRef else None
    return _rebuild_v3(ref, offset, shape, strides, grad, hooks, dtype, metadata)


def unreadable_record(kind: str, shape: Any = None) -> TensorRecord:
    """Return a tensor that cannot be read; `kind` says why. The shape is () if it is unknown or invalid."""
    sizes = shape if type(shape) is tuple and len(shape) <= MAX_DIMENSIONS and are_sizes(shape) else ()
    return TensorRecord(None, unreadable(kind), 0, sizes, contiguous_strides(sizes))


def _unreadable_with(kind: str, shape_index: int) -> Callable[..., TensorRecord]:
    """Return a function for tensors that cannot be read, whose argument at `shape_index` is the shape."""
    return lambda *arguments: unreadable_record(kind, arguments[shape_index] if shape_index < len(arguments) else None)


def _rebuild_sparse(layout: Any, data: Any) -> TensorRecord:
    """Return a sparse tensor of (indices, values, shape, ...), or of (rows, columns, values, shape)."""
    return unreadable_record("sparse", next((item for item in data if type(item) is tuple), None))


def _rebuild_wrapper(class_: Any, dtype: Any, shape: Any, *_: Any) -> TensorRecord:
    """Return a tensor of a subclass that wraps other tensors, such as DTensor."""
    kind = _tensor_class(class_)
    return unreadable_record(f"wrapper {kind}" if kind.startswith("tensor of ") else kind, shape)


def _rebuild_from_type(function: Any, class_: Any, arguments: Any, state: Any = None) -> TensorRecord:
    """Return a tensor with attributes, or of a subclass."""
    if type(arguments) is not tuple or type(class_) is not Placeholder:
        raise PickleError("a tensor without a class or arguments", DAMAGED)
    if function not in _REBUILD.values():  # such as that of jagged tensors
        return unreadable_record(_tensor_class(class_))
    tensor: TensorRecord = function(*arguments)
    if class_.name in _PLAIN_CLASSES or type(tensor) is not TensorRecord or tensor.ref is None:
        return tensor
    return unreadable_record(_tensor_class(class_), tensor.shape)


def _tensor_class(class_: Any) -> str:
    name = class_.name if type(class_) is Placeholder else "a subclass"
    _, _, last = name.rpartition(".")
    return _TENSOR_CLASSES.get(last, f"tensor of {name}")


def _rebuild_device_tensor(data: Any, dtype: Any, *_: Any) -> TensorRecord:
    """Return a tensor of an accelerator, which was saved as a CPU tensor or as a numpy array."""
    if type(data) is TensorRecord and data.dtype == dtype:
        return data
    return unreadable_record("tensor of an accelerator", _array_shape(data))


def _array_shape(value: Any) -> Any:
    """Return the shape of an array of numpy or jax; None for other values."""
    if type(value) is not Placeholder or value.arguments is None:
        return None
    state, count = value.state, len(value.arguments)
    if value.name.endswith("._reconstruct_array") and count == 4:
        state = value.arguments[2]
    elif not value.name.startswith("numpy."):
        return None
    if value.name.endswith("._frombuffer") and count == 4:
        return value.arguments[2]
    return state[1] if type(state) is tuple and len(state) == 5 else None  # version, shape, dtype, order, data


def packed_record(value: Any) -> TensorRecord | None:
    """Return a tensor that cannot be read for a numpy array, or for a tuple or object made of a tensor or an array.

    A quantized layer has a tuple of weight and bias; a tensor of TensorFlow is an object made of an array. None for
    other values.
    """
    shape = _array_shape(value)
    if shape is not None:
        return unreadable_record("numpy array", shape) if type(shape) is tuple and shape else None
    if type(value) is tuple:
        items, kind = value, "tuple of tensors"
    elif type(value) is Placeholder and value.arguments:
        items, kind = value.arguments, f"object of {value.name}"
    else:
        return None
    first = items[0] if items else None
    if type(first) is TensorRecord:
        return unreadable_record("quantized" if first.dtype.name == "quantized" else kind, first.shape)
    shape = _array_shape(first)
    return unreadable_record(kind, shape) if type(shape) is tuple else None


def first_argument(value: Any, *_: Any) -> Any:
    """Return the first argument; the others are attributes, such as requires_grad of a parameter."""
    return value


def _ordered_dict(pairs: Iterable[Any] = ()) -> dict[Any, Any]:
    return {hashable(key): value for key, value in pairs}


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    # Protocols 0 to 2 have no opcode for bytes and use this call instead.
    if type(text) is not str or encoding != "latin1":
        raise PickleError("a call of _codecs.encode other than for bytes", NEXT_STEP)
    return text.encode("latin1")


def _none(*_: Any) -> None:
    """Return None for a value that no tensor depends on."""


def _counter(counts: Any = None) -> dict[Any, Any]:
    return dict(counts) if type(counts) is dict else {}


# Classes of tensors without other data than a plain tensor's.
_PLAIN_CLASSES = frozenset({"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"})
# Kinds of tensors that cannot be read, by the name of their class.
_TENSOR_CLASSES = {"DTensor": "DTensor", "ShardedTensor": "ShardedTensor", "NestedTensor": "nested"}
_REBUILD: dict[str, Callable[..., Any]] = {
    "_rebuild_tensor": _rebuild_v2,
    "_rebuild_tensor_v2": _rebuild_v2,
    "_rebuild_tensor_v3": _rebuild_v3,
    "_rebuild_parameter": first_argument,
    "_rebuild_parameter_with_state": first_argument,
    "_rebuild_sparse_tensor": _rebuild_sparse,
    "_rebuild_sparse_csr_tensor": _rebuild_sparse,
    "_rebuild_qtensor": _unreadable_with("quantized", 2),
    "_rebuild_nested_tensor": _unreadable_with("nested", 4),
    "_rebuild_meta_tensor_no_storage": _unreadable_with("meta", 1),
    "_rebuild_device_tensor_from_numpy": _rebuild_device_tensor,
    "_rebuild_device_tensor_from_cpu_tensor": _rebuild_device_tensor,
    "_rebuild_xla_tensor": _rebuild_device_tensor,
    "_rebuild_wrapper_subclass": _rebuild_wrapper,
}
# The bits of an element by the storage class of quantized tensors.
_QUANTIZED = {"QInt8Storage": 8, "QUInt8Storage": 8, "QInt32Storage": 32, "QUInt4x2Storage": 8, "QUInt2x4Storage": 8}
_BUILTINS: dict[str, Callable[..., Any]] = {
    "set": lambda items=(): set(map(hashable, items)),
    "frozenset": safe_frozenset,
    "bytes": lambda *_: b"",
}
_BUILTINS |= dict.fromkeys(("bytearray", "complex", "range", "slice", "xrange"), _none)

GLOBALS: dict[tuple[str, str], Any] = {
    **{("torch._utils", name): function for name, function in _REBUILD.items()},
    **{("torch._tensor", name): _rebuild_from_type for name in ("_rebuild_from_type", "_rebuild_from_type_v2")},
    ("torch.storage", _UNTYPED): _UNTYPED,
    ("torch", "Size"): first_argument,
    ("torch", "device"): _none,
    ("torch.serialization", "_get_layout"): _none,
    ("collections", "OrderedDict"): _ordered_dict,
    ("collections", "Counter"): _counter,
    ("_codecs", "encode"): _encode,
    **{("torch", name): DType("quantized", bits) for name, bits in _QUANTIZED.items()},
    **{("torch", storage): dtype for storage, dtype in BY_STORAGE.items()},
    **{("torch", name): dtype for name, dtype in IN_TORCH.items()},
    # Protocols 0 to 2 use the names of Python 2.
    **{(module, name): function for module in ("builtins", "__builtin__") for name, function in _BUILTINS.items()},
}


def _getattr(shown: str) -> Callable[..., Any]:
    """Return a `getattr` for nested classes. For a method of an object, it returns a function that raises."""

    def refuse(*_: Any) -> Any:
        raise hostile_error(shown)

    def attribute(value: Any = None, name: Any = None, *default: Any) -> Any:
        if type(value) is not Placeholder or type(name) is not str or not name.isidentifier() or default:
            return refuse()
        if value.arguments is not None:
            return refuse
        module, _, last = value.name.rpartition(".")
        if is_gadget(module, f"{last}.{name}"):
            raise hostile_error(shown, full_name(value.name, name))
        return Placeholder(full_name(value.name, name))

    return attribute


class TorchGlobals(dict[tuple[str, str], Any]):
    """The globals of one file: those of the table, and placeholders for all others, whose names are in `ignored`."""

    def __init__(self) -> None:
        super().__init__(GLOBALS)
        self.ignored: list[str] = []
        self._suspects: list[str] = []

    def __missing__(self, key: tuple[str, str]) -> Any:
        shown = full_name(*key)
        value: Any = Placeholder(shown)
        if key in (("builtins", "getattr"), ("__builtin__", "getattr")):
            self._suspects.append(shown)
            value = _getattr(shown)
        elif is_gadget(*key):
            raise hostile_error(*self._suspects, shown)
        elif shown not in _PLAIN_CLASSES:
            self.ignored.append(shown)
        self[key] = value
        return value

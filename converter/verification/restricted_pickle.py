"""A `pickle_module` for torch.load: Python's unpickler, which imports nothing.

torch.load(weights_only=True) reads only protocols 2 and 3, and refuses objects of other classes next to the weights.
This module reads all protocols. Globals are looked up in torch's own table of safe classes and functions; every other
global is replaced by a placeholder that does nothing.
"""

from __future__ import annotations

import _compat_pickle
import pickle
from typing import Any, ClassVar

from torch._weights_only_unpickler import _get_allowed_globals


class _Placeholder(dict[Any, Any]):
    """An object of a class that is not in torch's table. It keeps its items and attributes, and runs nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Placeholder:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __call__(self, *args: Any, **kwargs: Any) -> _Placeholder:
        return _Placeholder()

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __setstate__(self, state: Any) -> None:
        # An object with slots has a tuple of two dicts as its state.
        for attributes in state if isinstance(state, tuple) else (state,):
            if isinstance(attributes, dict):
                self.update(attributes)

    def append(self, item: Any) -> None:
        """Ignore an item of a list or set."""

    add = append


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    """Return the tensor of a parameter, without requires_grad, hooks and state."""
    return data


def _rebuild_plain(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """Return a tensor of a subclass, or with attributes, as a plain tensor."""
    return function(*arguments)


_PLAIN_REBUILDS = [f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3")]


def _allowed_globals() -> dict[str, Any]:
    """Return torch's table, without the functions that rebuild tensors of other kinds, which no weights are."""
    allowed = _get_allowed_globals()
    return {name: value for name, value in allowed.items() if "._rebuild_" not in name or name in _PLAIN_REBUILDS} | {
        "torch._utils._rebuild_parameter": _rebuild_parameter,
        "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
        "torch._tensor._rebuild_from_type_v2": _rebuild_plain,
    }


# The unpickler in Python. The one in C allocates as much memory as an index in the file demands.
_Unpickler: Any = pickle._Unpickler


class Unpickler(_Unpickler):  # type: ignore[misc]
    """Python's unpickler with torch's table of globals."""

    dispatch: ClassVar[dict[int, Any]] = dict(_Unpickler.dispatch)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.table = _allowed_globals()

    def find_class(self, module: str, name: str) -> Any:
        """Return a global of the table, or a new placeholder class."""
        # Protocols 0 to 2 use the names of Python 2.
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        return self.table.get(f"{module}.{name}") or type(name, (_Placeholder,), {"__module__": "placeholder"})

    def load_build(self) -> None:
        """Set the state of an object; UnpicklingError for a function or class, which the whole process shares."""
        target = self.stack[-2]
        if callable(target) and not isinstance(target, _Placeholder):
            raise pickle.UnpicklingError("a state for a function or a class")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def load(file: Any, **options: Any) -> Any:
    """Read the next pickle of a file."""
    return Unpickler(file, **options).load()


def load_dcp_metadata(file: Any) -> Any:
    """Read the `.metadata` of a folder of torch.distributed.checkpoint, with that module's own classes."""
    from torch.distributed.checkpoint import filesystem, metadata

    reader = Unpickler(file)
    reader.table["torch.distributed.checkpoint.filesystem._StorageInfo"] = filesystem._StorageInfo
    for name in (*metadata.__all__, "_MEM_FORMAT_ENCODING"):
        reader.table[f"{metadata.__name__}.{name}"] = getattr(metadata, name)
    return reader.load()

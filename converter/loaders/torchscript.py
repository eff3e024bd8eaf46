"""TorchScript archives (torch.jit.save since torch 1.4): a torch zip with code, of which none is run.

data.pkl holds the module tree, each module an object of a class `__torch__.<...>` whose state is its attributes. The
classes are source text under <root>/code/. Two lines of each are read, as text: which attributes are parameters and
which are buffers, for the rest is not part of the state dict.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from converter.checkpoint import Contents, Tensor
from converter.errors import ContainerError
from converter.files import SourceFile
from converter.loaders.torch_pickle import GLOBALS, Resolver, TensorRecord, storage_ref
from converter.loaders.torch_zip import Archive
from converter.loaders.unpickler import Node, unpickle
from converter.loaders.zipdir import is_zip, read_directory, read_small

CONTAINER = "TorchScript"

MAX_CODE = 16 << 20  # bytes of one source file; CLIP's largest takes 50 KB


def recognises(file: SourceFile) -> bool:
    if not is_zip(file):
        return False
    names = read_directory(file)
    return f"{names.root}/constants.pkl" in names and f"{names.root}/data.pkl" in names


def load(file: SourceFile) -> Contents:
    archive = Archive(file)
    value, _ = unpickle(archive.pickle, archive.where, _ScriptGlobals(_GLOBALS), storage_ref)
    if type(value) is not Node:
        raise ContainerError(f"{file.name}: a TorchScript archive of a {type(value).__name__}, not of a module")
    tensors: Contents = {tensor.key: tensor for tensor in _Flattener(archive).tensors(value)}
    if not tensors:
        raise ContainerError(
            f"{file.name}: a TorchScript module without parameters: torch.jit.freeze leaves only nameless constants\n"
            "save the module as it was before it was frozen"
        )
    return tensors


# ---- what its pickle may name


def _first(value: Any, *_: Any) -> Any:
    """The value without the type that TorchScript tags it with."""
    return value


_TAGS = ("restore_type_tag", "build_intlist", "build_tensorlist", "build_doublelist", "build_boollist")
_GLOBALS = {**GLOBALS, **{("torch.jit._pickle", name): _first for name in _TAGS}}


class _ScriptGlobals(dict[tuple[str, str], Any]):
    """The table of globals, in which every `__torch__` class makes nodes that do nothing."""

    def __missing__(self, key: tuple[str, str]) -> Callable[[], Node]:
        module, name = key
        if module.partition(".")[0] != "__torch__":
            raise KeyError(key)

        def make() -> Node:
            return Node(f"{module}.{name}")

        self[key] = make
        return make


# ---- from the module tree to a state dict


class _Class(NamedTuple):
    """What a class says of itself: whether it is a module, has code that restores it, and what are its tensors."""

    is_module: bool
    restores_itself: bool
    parameters: frozenset[str]
    buffers: frozenset[str] | None  # None where an old torch did not say: all tensors but parameters


class _Flattener:
    """Names tensors as `state_dict()` of the loaded module does: parameters, buffers, then modules, each in order."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._resolver = Resolver(archive.file, archive.storage)
        self._classes: dict[str, _Class] = {}
        self._texts: dict[str, str] = {}

    def tensors(self, node: Node, prefix: str = "", depth: int = 0) -> Iterator[Tensor]:
        """The tensors of a module and of the modules in it."""
        class_ = self._class(node.name)
        if not class_.is_module:
            return
        if class_.restores_itself or type(node.state) is not dict:
            raise ContainerError(
                f"{self._archive.file.name}: {node.name} restores itself by code of its own (__setstate__)\n"
                "nothing of it was executed; save the module's state_dict() instead"
            )
        self._resolver.count(len(node.state), depth)
        yield from self._own_tensors(class_, node.state, prefix)
        for name, value in node.state.items():
            if type(value) is Node:
                yield from self.tensors(value, f"{prefix}{name}.", depth + 1)

    def _own_tensors(self, class_: _Class, state: dict[Any, Any], prefix: str) -> Iterator[Tensor]:
        records = {name: value for name, value in state.items() if type(value) is TensorRecord}
        buffers = class_.buffers if class_.buffers is not None else records.keys() - class_.parameters
        for names in (class_.parameters, buffers):
            for name, record in records.items():
                if name in names:
                    yield self._resolver.tensor(f"{prefix}{name}", record)

    def _class(self, full_name: str) -> _Class:
        if full_name not in self._classes:
            module, _, name = full_name.rpartition(".")
            self._classes[full_name] = _parse_class(self._text(module), name)
        return self._classes[full_name]

    def _text(self, module: str) -> str:
        if module not in self._texts:
            name = f"{self._archive.root}/code/{module.replace('.', '/')}.py"
            if name not in self._archive.members:
                raise ContainerError(f"{self._archive.file.name}: no member {name!r}\ndownload or copy the file again")
            self._texts[module] = read_small(self._archive.members[name], MAX_CODE).decode(errors="replace")
        return self._texts[module]


def _parse_class(text: str, name: str) -> _Class:
    """What the class `name` in the source `text` says of itself; a class that is not there is no module."""
    head = re.search(rf"^class {re.escape(name)}\((.*)\):$", text, re.MULTILINE)
    if head is None or head[1] != "Module":
        return _Class(False, False, frozenset(), None)
    end = re.compile(r"^\S", re.MULTILINE).search(text, head.end() + 1)
    body = text[head.end() : end.start() if end else len(text)]
    parameters, buffers = _names(body, "__parameters__"), _names(body, "__buffers__")
    return _Class(True, "\n  def __setstate__(" in body, parameters or frozenset(), buffers)


def _names(body: str, field: str) -> frozenset[str] | None:
    """The strings in a line such as `__parameters__ = ["weight", "bias", ]`."""
    line = re.search(rf"^  {field} = \[(.*)\]$", body, re.MULTILINE)
    return frozenset(re.findall(r'"([^"]*)"', line[1])) if line else None

"""TorchScript archives (torch.jit.save since torch 1.4): a torch zip with code, of which none is run.

data.pkl holds the module tree, each module an object of a class `__torch__.<...>` whose state is its attributes. The
classes are source text under <root>/code/. Two lines of each are read, as text: which attributes are parameters and
which are buffers, for the rest is not part of the state dict.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from converter.errors import ContainerError
from converter.formats.pickle_reader import Node, unpickle
from converter.formats.torch_pickle import GLOBALS, Resolver, StorageRefs, TensorRecord
from converter.formats.torch_zip import Archive
from converter.formats.zip_directory import is_zip, read_directory, read_small
from converter.storage.local_file import SourceFile
from converter.tensors.tensor_info import Contents, TensorInfo

CONTAINER = "TorchScript"

MAX_CODE = 4 << 20  # bytes of source text in all; CLIP's takes 200 KB


def can_read(file: SourceFile) -> bool:
    if not is_zip(file):
        return False
    names = read_directory(file)
    return f"{names.root}/constants.pkl" in names and f"{names.root}/data.pkl" in names


def load(file: SourceFile) -> Contents:
    archive = Archive(file)
    value, _ = unpickle(archive.pickle, archive.where, _ScriptGlobals(_GLOBALS), StorageRefs().load)
    if type(value) is not Node:
        raise ContainerError(
            f"{file.name}: a TorchScript archive of a {type(value).__name__}, not of a module",
            "give a file that torch.jit.save or torch.save wrote",
        )
    tensors: Contents = {tensor.key: tensor for tensor in _Flattener(archive).tensors(value)}
    if not tensors:
        raise ContainerError(
            f"{file.name}: a TorchScript module without parameters: torch.jit.freeze leaves only nameless constants",
            "save the module as it was before it was frozen",
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
    """What a module's class says of itself: whether it has code that restores it, and which are its tensors."""

    restores_itself: bool
    parameters: frozenset[str]
    buffers: frozenset[str] | None  # None where an old torch did not say: all tensors but parameters


class _Flattener:
    """Names tensors as `state_dict()` of the loaded module does: parameters, buffers, then modules, each in order."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._resolver = Resolver(archive.file, archive.storage)
        self._modules: dict[str, dict[str, _Class]] = {}
        self._code_left = MAX_CODE

    def tensors(self, node: Node, prefix: str = "", depth: int = 0) -> Iterator[TensorInfo]:
        """The tensors of a module and of the modules in it."""
        class_ = self._class(node.name)
        if class_ is None:
            return
        if class_.restores_itself or type(node.state) is not dict:
            raise ContainerError(
                f"{self._archive.file.name}: {node.name!r} restores itself by code of its own (__setstate__)",
                "nothing of it was executed; save the module's state_dict() instead",
            )
        self._resolver.count(len(node.state), depth)
        yield from self._own_tensors(class_, node.state, prefix)
        for name, value in node.state.items():
            if type(value) is Node:
                yield from self.tensors(value, self._resolver.checked(f"{prefix}{name}."), depth + 1)

    def _own_tensors(self, class_: _Class, state: dict[Any, Any], prefix: str) -> Iterator[TensorInfo]:
        records = {name: value for name, value in state.items() if type(value) is TensorRecord}
        buffers = class_.buffers if class_.buffers is not None else records.keys() - class_.parameters
        for names in (class_.parameters, buffers):
            for name, record in records.items():
                if name in names:
                    yield self._resolver.tensor(f"{prefix}{name}", record)

    def _class(self, full_name: str) -> _Class | None:
        """What a class says of itself, or None where it is not a module's."""
        module, _, name = full_name.rpartition(".")
        if module not in self._modules:
            self._modules[module] = dict(_parse_classes(self._text(module)))
        return self._modules[module].get(name)

    def _text(self, module: str) -> str:
        name = f"{self._archive.root}/code/{module.replace('.', '/')}.py"
        if name not in self._archive.members:
            raise ContainerError(f"{self._archive.file.name}: no member {name!r}", "download or copy the file again")
        member = self._archive.members[name]
        text = read_small(member, self._code_left).decode(errors="replace")
        self._code_left -= member.size
        return text


def _parse_classes(text: str) -> Iterator[tuple[str, _Class]]:
    """The modules' classes in a source text, by name, and what each says of itself."""
    for head, after in pairwise(re.finditer(r"^\S.*|\Z", text, re.MULTILINE)):
        if found := re.fullmatch(r"class (.+)\(Module\):", head[0]):
            body = text[head.end() : after.start()]
            parameters, buffers = _names(body, "__parameters__"), _names(body, "__buffers__")
            restores = re.search(r"^ *def +__setstate__\b", body, re.MULTILINE) is not None
            yield found[1], _Class(restores, parameters or frozenset(), buffers)


def _names(body: str, field: str) -> frozenset[str] | None:
    """The strings in a line such as `__parameters__ = ["weight", "bias", ]`."""
    line = re.search(rf"^  {field} = \[(.*)\]$", body, re.MULTILINE)
    return frozenset(re.findall(r'"([^"]*)"', line[1])) if line else None

"""Reads TorchScript archives (torch.jit.save since torch 1.4): torch zips with code, which is never run.

data.pkl contains the module tree: each module is an object of a class `__torch__.<...>`, whose state is its attributes.
The source text of the classes is under <root>/code/. Only the lists of parameters and buffers are read from it: other
attributes are not in the state dict.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from converter.errors import ContainerError
from converter.formats.pickle_reader import Placeholder
from converter.formats.torch_contents import Resolver
from converter.formats.torch_pickle import GLOBALS, TensorRecord, first_argument
from converter.formats.torch_zip import Archive
from converter.formats.zip_directory import is_zip, read_directory, read_small
from converter.storage.byte_range import damaged
from converter.storage.local_file import SourceFile
from converter.tensors.tensor_info import Contents, TensorInfo

CONTAINER = "TorchScript"

MAX_CODE = 4 << 20  # bytes of source text in an archive; CLIP has 200 KB


def can_read(file: SourceFile) -> bool:
    if not is_zip(file):
        return False
    names = read_directory(file)
    return f"{names.root}/constants.pkl" in names and f"{names.root}/data.pkl" in names


def load(file: SourceFile) -> Contents:
    archive = Archive(file)
    value = archive.unpickled(_ScriptGlobals(_GLOBALS))
    if type(value) is not Placeholder:
        raise ContainerError(
            f"{file.name}: a TorchScript archive of a {type(value).__name__}, not of a module",
            "use a file that torch.jit.save or torch.save wrote",
        )
    tensors: Contents = {tensor.key: tensor for tensor in _Flattener(archive).tensors(value)}
    if not tensors:
        raise ContainerError(
            f"{file.name}: a TorchScript module without parameters: torch.jit.freeze leaves unnamed constants",
            "save the module as it was before it was frozen",
        )
    return tensors


# Functions that return their first argument with a type.
_TAGS = ("restore_type_tag", "build_intlist", "build_tensorlist", "build_doublelist", "build_boollist")
_GLOBALS = {**GLOBALS, **{("torch.jit._pickle", name): first_argument for name in _TAGS}}


class _ScriptGlobals(dict[tuple[str, str], Any]):
    """The table of globals, with placeholders for all `__torch__` classes."""

    def __missing__(self, key: tuple[str, str]) -> Placeholder:
        module, name = key
        if module.partition(".")[0] != "__torch__":
            raise KeyError(key)
        self[key] = placeholder = Placeholder(f"{module}.{name}")
        return placeholder


class _Class(NamedTuple):
    """The declarations in the source text of a module's class."""

    has_setstate: bool  # whether the class defines `__setstate__`, which restores the state by code
    parameters: frozenset[str]  # the names of the parameters
    buffers: (
        frozenset[str] | None
    )  # the names of the buffers; None if they are all other tensors (old versions of torch)


class _Flattener:
    """Lists the tensors of a module tree with the names and in the order of `state_dict()`."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._resolver = Resolver(archive.file, archive.storage)
        self._modules: dict[str, dict[str, _Class]] = {}
        self._code_nbytes_left = MAX_CODE

    def tensors(self, node: Placeholder, prefix: str = "", depth: int = 0) -> Iterator[TensorInfo]:
        """Yield the tensors of a module and of its submodules."""
        class_ = self._class(node.name)
        if class_ is None:
            return
        if class_.has_setstate or type(node.state) is not dict:
            raise ContainerError(
                f"{self._archive.file.name}: {node.name!r} restores itself by code (__setstate__)",
                "nothing of it was executed; save the module's state_dict() instead",
            )
        self._resolver.count_entries(len(node.state), depth)
        yield from self._own_tensors(class_, node.state, prefix)
        for name, value in node.state.items():
            if type(value) is Placeholder:
                yield from self.tensors(value, self._resolver.checked_name(f"{prefix}{name}."), depth + 1)

    def _own_tensors(self, class_: _Class, state: dict[Any, Any], prefix: str) -> Iterator[TensorInfo]:
        records = {name: value for name, value in state.items() if type(value) is TensorRecord}
        buffers = class_.buffers if class_.buffers is not None else records.keys() - class_.parameters
        for names in (class_.parameters, buffers):
            for name, record in records.items():
                if name in names:
                    yield self._resolver.tensor(f"{prefix}{name}", record)

    def _class(self, full_name: str) -> _Class | None:
        """Return the declarations of a class, or None if it is not the class of a module."""
        module, _, name = full_name.rpartition(".")
        if module not in self._modules:
            self._modules[module] = dict(_parse_classes(self._source(module)))
        return self._modules[module].get(name)

    def _source(self, module: str) -> str:
        name = f"{self._archive.root}/code/{module.replace('.', '/')}.py"
        member = self._archive.members.get(name)
        if member is None:
            raise damaged(f"{self._archive.file.name}: no member {name!r}")
        text = read_small(member, self._code_nbytes_left).decode(errors="replace")
        self._code_nbytes_left -= member.size
        return text


def _parse_classes(text: str) -> Iterator[tuple[str, _Class]]:
    """Yield the name and the declarations of each module class in a source text."""
    for head, next_head in pairwise(re.finditer(r"^\S.*|\Z", text, re.MULTILINE)):
        if match := re.fullmatch(r"class (.+)\(Module\):", head[0]):
            body = text[head.end() : next_head.start()]
            parameters, buffers = _names(body, "__parameters__"), _names(body, "__buffers__")
            has_setstate = re.search(r"^ *def +__setstate__\b", body, re.MULTILINE) is not None
            yield match[1], _Class(has_setstate, parameters or frozenset(), buffers)


def _names(body: str, field: str) -> frozenset[str] | None:
    """Return the strings in a line such as `__parameters__ = ["weight", "bias", ]`; None without such a line."""
    line = re.search(rf"^  {field} = \[(.*)\]$", body, re.MULTILINE)
    return frozenset(re.findall(r'"([^"]*)"', line[1])) if line else None

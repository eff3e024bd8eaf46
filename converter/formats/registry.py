"""Loaders: one module a container, each an entry point of the group `dsocr_convert.loaders`.

Outside packages add theirs in the same way; see `Loader` for what a module must have.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from converter.errors import ContainerError
from converter.storage.local_file import SourceFile
from converter.tensors.tensor_info import Contents

GROUP = "dsocr_convert.loaders"
DISTRIBUTION = "dsocr-convert"


class Loader(Protocol):
    """A module that reads one container. `CONTAINER` is what people call it, such as "torch zip".

    One of another distribution may have a function `reference(path)` too: a dict of torch tensors by name, as the
    format's own library reads them. dsocr-verify compares with these.
    """

    @property
    def CONTAINER(self) -> str: ...  # noqa: N802 (a module's constant)

    def can_read(self, file: SourceFile) -> bool:
        """Whether `load` is to read the file: judged by content, never by name, and by no more than is needed."""

    def load(self, file: SourceFile) -> Contents:
        """The tensors in the file, described but not read; ContainerError where it is damaged or hostile."""


def open_file(file: SourceFile) -> tuple[str, Contents]:
    """The container's name and what the file holds; ContainerError where no loader reads it, or it is damaged."""
    loader = _find(file, _built_in()) or _find(file, _plugins())
    if loader is None:
        from converter.formats import unrecognized

        raise unrecognized.error(file)
    return loader.CONTAINER, loader.load(file)


def outside(container: str) -> Loader:
    """The loader of another distribution that has read a file of this container."""
    found = (_import(name, module) for name, module in _plugins())
    return next(loader for loader in found if container == loader.CONTAINER)


def _find(file: SourceFile, entries: Iterable[tuple[str, str]]) -> Loader | None:
    for name, module in entries:
        loader = _import(name, module)
        if loader.can_read(file):
            return loader
    return None


def _built_in() -> list[tuple[str, str]]:
    """Names and modules of our own entry points, as our distribution's metadata lists them.

    `importlib.metadata` would tell too, but importing it takes 15 ms: a twentieth of a short conversion.
    """
    for folder in sys.path:
        for path in Path(folder).glob(f"{DISTRIBUTION.replace('-', '_')}-*.dist-info/entry_points.txt"):
            _, _, section = path.read_text(encoding="utf-8").partition(f"[{GROUP}]\n")
            lines = section.partition("[")[0].splitlines()
            return [
                (name.strip(), module.strip()) for name, _, module in (line.partition("=") for line in lines) if module
            ]
    raise ContainerError(
        f"{DISTRIBUTION} is not installed, so its loaders are not registered\n"
        "install it: pip install -e . in its repository, or pip install dsocr-convert"
    )


def _plugins() -> list[tuple[str, str]]:
    """Names and modules of all other distributions' entry points; looked up only where ours do not know the file."""
    from importlib.metadata import entry_points

    return [(e.name, e.value) for e in entry_points(group=GROUP) if not e.value.startswith("converter.")]


def _import(name: str, module: str) -> Loader:
    try:
        return cast(Loader, import_module(module))
    except Exception as error:  # whatever an outside package raises on import
        raise ContainerError(
            f"loader {name!r} ({module}) cannot be imported: {type(error).__name__}: {error}\n"
            "reinstall or remove the package that brings it"
        ) from error

"""Finds the loader of a file, which is a built-in module or an installed plug-in.

A plug-in is a module that an entry point of the group `dsocr_convert.loaders` names. docs/plugins.md shows one.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from itertools import chain
from typing import Protocol, cast

from converter.errors import ContainerError
from converter.formats import unrecognized
from converter.storage.local_file import SourceFile
from converter.tensors.tensor_info import Contents

GROUP = "dsocr_convert.loaders"


class Loader(Protocol):
    """A module that reads one container format.

    A plug-in may also define `reference(path)`, which returns a dict of torch tensors by name that the format's own
    library reads. dsocr-verify compares a conversion with these tensors.
    """

    CONTAINER: str  # the name of the format in messages, such as "torch zip"

    def can_read(self, file: SourceFile) -> bool:
        """Return whether the file has this format, by its first bytes or its directory, never by its name."""

    def load(self, file: SourceFile) -> Contents:
        """Describe the tensors of the file without reading them; ContainerError if it is damaged or hostile."""


# Modules of this package, in the order in which they are tried. Each is imported when it is reached.
_BUILT_IN = ("safetensors", "torchscript", "torch_zip", "torch_legacy", "gguf")


def open_file(file: SourceFile) -> tuple[str, Contents]:
    """Return the name of a file's format and its contents; ContainerError if no loader reads it, or it is damaged."""
    built_in = (cast(Loader, import_module(f"{__package__}.{name}")) for name in _BUILT_IN)
    for loader in chain(built_in, plugins()):
        if loader.can_read(file):
            return loader.CONTAINER, loader.load(file)
    raise unrecognized.error(file)


def find_plugin(container: str) -> Loader:
    """Return the plug-in for the format of a name."""
    return next(loader for loader in plugins() if container == loader.CONTAINER)


def plugins() -> Iterator[Loader]:
    """Import and yield the loaders of installed plug-ins one by one; ContainerError if an import fails."""
    from importlib.metadata import entry_points

    for entry in entry_points(group=GROUP):
        try:
            yield cast(Loader, entry.load())
        except Exception as error:  # a plug-in's import may raise anything
            raise ContainerError(
                f"loader {entry.name!r} ({entry.value}) cannot be imported: {type(error).__name__}: {error}",
                "reinstall or remove the package that provides it",
            ) from error

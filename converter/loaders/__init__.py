"""Loaders: one module a container, each an entry point of the group `dsocr_convert.loaders`.

Outside packages add theirs in the same way; see `Loader` for what a module must have.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol, cast

from converter.checkpoint import Contents
from converter.errors import ContainerError
from converter.files import SourceFile

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "dsocr_convert.loaders"
DISTRIBUTION = "dsocr-convert"


class Loader(Protocol):
    """A module that reads one container. `CONTAINER` is what people call it, such as "torch zip"."""

    @property
    def CONTAINER(self) -> str: ...  # noqa: N802 (a module's constant)

    def recognises(self, file: SourceFile) -> bool:
        """Whether `load` is to read the file: judged by content, never by name, and by no more than is needed."""

    def load(self, file: SourceFile) -> Contents:
        """The tensors in the file, described but not read; ContainerError where it is damaged or hostile."""


def open_file(file: SourceFile) -> tuple[str, Contents]:
    """The container's name and what the file holds."""
    loader = _find(file, _built_in())
    if loader is None:
        # Scanning every installed distribution costs some 10 ms of a 300 ms run: only where ours do not know the file.
        loader = _find(file, _plugins())
    if loader is None:
        from converter.loaders import unknown

        raise unknown.error(file)
    return loader.CONTAINER, loader.load(file)


def _find(file: SourceFile, entries: Iterable[EntryPoint]) -> Loader | None:
    for entry in entries:
        loader = _import(entry)
        if loader.recognises(file):
            return loader
    return None


def _built_in() -> Iterable[EntryPoint]:
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        return distribution(DISTRIBUTION).entry_points.select(group=GROUP)
    except PackageNotFoundError:
        raise ContainerError(
            f"{DISTRIBUTION} is not installed, so its loaders are not registered\n"
            "install it: pip install -e . in its repository, or pip install dsocr-convert"
        ) from None


def _plugins() -> Iterable[EntryPoint]:
    from importlib.metadata import entry_points

    return [entry for entry in entry_points(group=GROUP) if not entry.value.startswith("converter.")]


def _import(entry: EntryPoint) -> Loader:
    try:
        return cast(Loader, entry.load())
    except Exception as error:  # whatever an outside package raises on import
        raise ContainerError(
            f"loader {entry.name!r} ({entry.value}) cannot be imported: {type(error).__name__}: {error}\n"
            "reinstall or remove the package that brings it"
        ) from error

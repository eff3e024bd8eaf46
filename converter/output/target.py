"""Whether an output can be written where it is to stand: asked before anything is read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from converter.checkpoint.open import Checkpoint
from converter.errors import OutputError
from converter.storage.atomic_output import check_name, writing
from converter.storage.local_file import exists


def check_target(path: Path, force: bool, needed: int, option: str = "output") -> None:
    """OutputError if `path`, named by an option, cannot become a file of `needed` bytes; asked before reading."""
    check_name(path)
    with writing(path):
        if path.is_dir():
            raise OutputError(f"{path}: is a folder", f"give a file's path to --{option}")
        if path.exists() and not path.is_file():
            # A rename would put a file in the place of /dev/null.
            raise OutputError(f"{path}: is a device or a pipe, which --force does not replace", "give a file's path")
        _check_place(path, force, needed, option)


def check_folder(path: Path, force: bool, needed: int) -> None:
    """OutputError if `path` cannot become a folder of `needed` bytes, asked before anything is read.

    With `force` a folder is replaced with all that is in it: only one of files alone, and never the current one.
    """
    check_name(path)
    with writing(path):
        _check_place(path, force, needed, "output")
        if os.path.lexists(path):
            _check_replaced(path)


def _check_replaced(path: Path) -> None:
    if not path.is_dir():
        raise OutputError(f"{path}: is a file", "give a folder's path to --output, or a name that ends in .safetensors")
    if Path.cwd().is_relative_to(path.resolve()):
        raise OutputError(f"{path}: is the current folder, or holds it", "name a folder of its own with --output")
    inner = next((entry for entry in path.iterdir() if entry.is_dir() and not entry.is_symlink()), None)
    if inner is not None:
        raise OutputError(f"{path}: holds a folder, {inner.name}: not replaced", "remove it, or choose another path")


def _check_place(path: Path, force: bool, needed: int, option: str) -> None:
    folder = path.parent
    advice = f"choose another path with --{option}"
    if not folder.is_dir():
        raise OutputError(f"{path}: there is no folder {folder}", f"create it, or {advice}")
    if os.path.lexists(path) and not force:
        raise OutputError(f"{path}: exists already", f"{advice}, or replace it with --force")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{path}: the folder {folder} is not writable", f"{advice}")
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{path}: {needed} bytes are needed and {free} are free", "free some room, or write elsewhere"
        )


def check_not_source(target: Path, opened: Sequence[Checkpoint], mapping: str | Path | None = None) -> None:
    """OutputError if what is to be written is one of the sources, the folder of one, or the mapping file."""
    check_name(target)
    with writing(target):
        for file in (file for source in opened for file in source.files if file.identity and target.is_dir()):
            # A link lies in one folder and leads to another.
            if any(path.parent.samefile(target) for path in (Path(file.path), Path(file.path).resolve())):
                raise OutputError(f"{target}: holds the source, {file.name}", "choose another path with --output")
    if is_source(target, opened, mapping):
        raise OutputError(f"{target}: is the source itself", "choose another path with --output")


def is_source(path: Path, opened: Sequence[Checkpoint], *others: str | Path | None) -> bool:
    """Whether a path leads to a file of the sources, to an index of theirs, or to one of the other files."""
    # An index is a source's name; one on a hub has a name that is no path.
    names = [*(source.name for source in opened), *(other for other in others if other is not None)]
    with writing(path):
        try:
            stat = path.stat()
        except (FileNotFoundError, NotADirectoryError, ValueError):
            # There is no such file yet.
            return False
        if (stat.st_dev, stat.st_ino) in [file.identity for source in opened for file in source.files]:
            return True
        return any(exists(name) and path.samefile(name) for name in names)

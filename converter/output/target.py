"""Checks of an output before anything is read: whether it can be written, and that it replaces no input."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from converter.checkpoint.open import Checkpoint
from converter.errors import OutputError
from converter.storage.atomic_output import output_errors, temporary_path
from converter.storage.local_file import exists


def check_target(path: Path, force: bool, needed: int, option: str = "output") -> None:
    """Raise OutputError if a file cannot be written.

    Args:
        path: The file.
        force: Whether an existing file is replaced.
        needed: Bytes of disk space that it takes.
        option: The option that names the file.
    """
    with output_errors(path):
        if path.is_dir():
            raise OutputError(f"{path}: is a folder", f"give a file's path to --{option}")
        if path.exists() and not path.is_file():
            # A rename would replace /dev/null by a file.
            raise OutputError(f"{path}: is a device or a pipe, which --force does not replace", "give a file's path")
        _check_place(path, force, needed, option)


def check_folder(path: Path, force: bool, needed: int) -> None:
    """Raise OutputError if a folder cannot be written.

    Args:
        path: The folder.
        force: Whether an existing folder is replaced with all that is in it: only one that holds nothing but files, and
            never the current one.
        needed: Bytes of disk space that it takes.
    """
    with output_errors(path):
        _check_place(path, force, needed, "output")
        if os.path.lexists(path):
            _check_replaced(path)


def _check_replaced(path: Path) -> None:
    if not path.is_dir():
        raise OutputError(f"{path}: is a file", "give a folder's path to --output, or a name that ends in .safetensors")
    if Path.cwd().is_relative_to(path.resolve()):
        raise OutputError(f"{path}: is the current folder, or holds it", "name another folder with --output")
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
        raise OutputError(f"{path}: the folder {folder} is not writable", advice)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(f"{path}: {needed} bytes are needed and {free} are free", "free some space, or " + advice)


def check_not_source(target: Path, opened: Sequence[Checkpoint], mapping: str | Path | None = None) -> None:
    """Raise OutputError if an output would replace an input.

    Args:
        target: The output.
        opened: The sources; a folder that holds one is not replaced either.
        mapping: The mapping file.
    """
    with output_errors(target):
        for file in (file for source in opened for file in source.files if file.identity and target.is_dir()):
            # A link is in one folder and leads to another.
            if any(path.parent.samefile(target) for path in (Path(file.path), Path(file.path).resolve())):
                raise OutputError(f"{target}: holds the source, {file.name}", "choose another path with --output")
    if is_source(target, opened, mapping):
        raise OutputError(f"{target}: is the source itself", "choose another path with --output")


def is_source(path: Path, opened: Sequence[Checkpoint], mapping: str | Path | None) -> bool:
    """Whether a path, or the temporary file that it is written under, is an input.

    Args:
        path: The file to write.
        opened: The sources: their files, and the index of a sharded one.
        mapping: The mapping file.
    """
    names = [name for name in (*(source.name for source in opened), mapping) if name is not None and exists(name)]
    identities = [file.identity for source in opened for file in source.files]
    with output_errors(path):
        for candidate in (path, temporary_path(path)):
            try:
                stat = candidate.stat()
            except (FileNotFoundError, NotADirectoryError):
                continue
            if (stat.st_dev, stat.st_ino) in identities or any(candidate.samefile(name) for name in names):
                return True
    return False

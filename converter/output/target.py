"""Checks that an output can be written and replaces no input, before weights are read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from converter.checkpoint.open import Checkpoint
from converter.errors import OutputError
from converter.storage.atomic_output import output_errors, temporary_path
from converter.storage.local_file import exists


def check_target(path: Path, force: bool, needed_bytes: int, option: str = "output", is_folder: bool = False) -> None:
    """Raise OutputError if an output cannot be written.

    Args:
        path: The output.
        force: Whether an existing output is replaced. Folders with subfolders and the current folder never are.
        needed_bytes: The size of the output in bytes.
        option: The option that names the output, for messages.
        is_folder: Whether the output is a folder.
    """
    with output_errors(path):
        if path.is_dir() and not is_folder:
            raise OutputError(f"{path}: is a folder", f"give a file's path to --{option}")
        if path.exists() and not path.is_file() and not is_folder:
            # A rename would replace /dev/null by a file.
            raise OutputError(f"{path}: is a device or a pipe, which --force does not replace", "give a file's path")
        _check_writable(path, force, needed_bytes, f"choose another path with --{option}")
        if is_folder and os.path.lexists(path):
            _check_replaceable_folder(path)


def _check_replaceable_folder(path: Path) -> None:
    if not path.is_dir():
        raise OutputError(f"{path}: is a file", "give a folder's path to --output, or a name that ends in .safetensors")
    if Path.cwd().is_relative_to(path.resolve()):
        raise OutputError(f"{path}: is the current folder, or holds it", "name another folder with --output")
    subfolder = next((child for child in path.iterdir() if child.is_dir() and not child.is_symlink()), None)
    if subfolder is not None:
        raise OutputError(
            f"{path}: is not replaced, as it has the subfolder {subfolder.name}", "remove it, or choose another path"
        )


def _check_writable(path: Path, force: bool, needed_bytes: int, hint: str) -> None:
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"{path}: there is no folder {folder}", f"create it, or {hint}")
    if os.path.lexists(path) and not force:
        raise OutputError(f"{path}: exists already", f"{hint}, or replace it with --force")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{path}: the folder {folder} is not writable", hint)
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OutputError(f"{path}: {needed_bytes} bytes are needed and {free} are free", f"free some space, or {hint}")


def check_not_source(
    target: Path, opened: Sequence[Checkpoint], other: str | Path | None = None, option: str = "output"
) -> None:
    """Raise OutputError if an output would replace an input.

    Args:
        target: The output.
        opened: The sources. A folder that holds a source is not replaced either.
        other: Another input, such as a mapping file.
        option: The option that names the output, for messages.
    """
    hint = f"choose another path with --{option}"
    with output_errors(target):
        files = [file for source in opened for file in source.files if file.identity and target.is_dir()]
        for file in files:
            # A source may be a symbolic link: check the folders of the link and of the file.
            if any(path.parent.samefile(target) for path in (Path(file.path), Path(file.path).resolve())):
                raise OutputError(f"{target}: holds the source, {file.name}", hint)
    if is_source(target, opened, other):
        raise OutputError(f"{target}: is the source itself", hint)


def is_source(path: Path, opened: Sequence[Checkpoint], other: str | Path | None) -> bool:
    """Return whether a path, or its temporary file, is an input.

    Args:
        path: The file to write.
        opened: The sources, whose files and shard indices are inputs.
        other: Another input, such as a mapping file.
    """
    names = [name for name in (*(source.name for source in opened), other) if name is not None and exists(name)]
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

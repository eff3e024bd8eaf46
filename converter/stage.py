"""Output that appears whole or not at all: written to a file beside it, made durable, then renamed into place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from converter.errors import OutputError


def check_target(path: Path, force: bool, needed: int) -> None:
    """OutputError if `path` cannot become a file of `needed` bytes, asked before anything is read."""
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"{path}: there is no folder {folder}\ncreate it, or choose another path with --output")
    if path.is_dir():
        raise OutputError(f"{path}: is a folder\ngive a file's path to --output")
    if os.path.lexists(path) and not force:
        raise OutputError(f"{path}: exists already\nchoose another path with --output, or replace it with --force")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{path}: the folder {folder} is not writable\nchoose another path with --output")
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(f"{path}: {needed} bytes are needed and {free} are free\nfree some room, or write elsewhere")


@contextmanager
def staged(path: Path, force: bool) -> Iterator[int]:
    """A file descriptor to write to; when the block ends without an error, what was written stands at `path`.

    Otherwise nothing is left, and what stood at `path` before stands there still.
    """
    stage = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        # Mode 0666 less the umask, as any program's output: safetensors' own writer leaves files only the owner reads.
        fd = os.open(stage, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        try:
            yield fd
            os.fsync(fd)
        finally:
            os.close(fd)
        if os.path.lexists(path) and not force:
            raise OutputError(f"{path}: appeared while it was being written; it was left as it is")
        stage.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        _discard(stage)
        raise OutputError(f"{path}: could not be written: {error.strerror}") from error
    except BaseException:
        _discard(stage)
        raise


def _discard(stage: Path) -> None:
    # The error that led here is the one to tell, not that its remains could not be removed.
    with suppress(OSError):
        stage.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: memoryview) -> None:
    """Write every byte: a signal or a full disk may cut a write short."""
    while data:
        data = data[os.write(fd, data) :]

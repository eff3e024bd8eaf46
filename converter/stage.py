"""Output that appears whole or not at all: written to a file beside it, made durable, then renamed into place.

A folder likewise: its files are written to a folder beside it, which is renamed or changes places with an older one.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from converter.errors import OutputError


def check_target(path: Path, force: bool, needed: int) -> None:
    """OutputError if `path` cannot become a file of `needed` bytes, asked before anything is read."""
    check_name(path)
    if path.is_dir():
        raise OutputError(f"{path}: is a folder\ngive a file's path to --output")
    if path.exists() and not path.is_file():
        # A rename would put a file in the place of /dev/null.
        raise OutputError(f"{path}: is a device or a pipe, which --force does not replace\ngive a file's path")
    _check_place(path, force, needed)


def check_folder(path: Path, force: bool, needed: int) -> None:
    """OutputError if `path` cannot become a folder of `needed` bytes, asked before anything is read.

    With `force` a folder is replaced with all that is in it: only one of files alone, and never the current one.
    """
    check_name(path)
    _check_place(path, force, needed)
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise OutputError(f"{path}: is a file\ngive a folder's path to --output, or a name that ends in .safetensors")
    if Path.cwd().is_relative_to(path.resolve()):
        raise OutputError(f"{path}: is the current folder, or holds it\nname a folder of its own with --output")
    inner = next((entry for entry in path.iterdir() if entry.is_dir() and not entry.is_symlink()), None)
    if inner is not None:
        raise OutputError(f"{path}: holds a folder, {inner.name}: not replaced\nremove it, or choose another path")


def check_name(path: Path) -> None:
    """OutputError for a path that the system cannot even look at: too long, or with a NUL in it."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be written: {getattr(error, 'strerror', error)}") from error


def _check_place(path: Path, force: bool, needed: int) -> None:
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"{path}: there is no folder {folder}\ncreate it, or choose another path with --output")
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
    stage = _beside(path)
    try:
        fd = _create(stage)
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


@contextmanager
def staged_folder(path: Path, force: bool) -> Iterator[Path]:
    """A new folder to put files into; when the block ends without an error, it stands at `path`.

    Otherwise nothing is left, and what stood at `path` before stands there still.
    """
    path = path.absolute()
    stage = _beside(path)
    try:
        stage.mkdir()
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        yield stage
        _sync_folder(stage)
        if not os.path.lexists(path):
            stage.rename(path)
        elif force:
            _exchange(stage, path)
        else:
            raise OutputError(f"{path}: appeared while it was being written; it was left as it is")
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"{path}: could not be written: {error.strerror}") from error
    finally:
        # What was begun, or what stood at `path` before.
        _discard(stage)


@contextmanager
def new_file(path: Path) -> Iterator[int]:
    """A file descriptor to write to; a file in a staged folder, which has its name once all of it is durable."""
    part = path.with_name(f"{path.name}.part")
    fd = _create(part)
    try:
        yield fd
        os.fsync(fd)
    finally:
        os.close(fd)
    part.rename(path)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def _create(path: Path) -> int:
    # Mode 0666 less the umask, as any program's output: safetensors' own writer leaves files only the owner reads.
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0), 0o666)


def _exchange(new: Path, old: Path) -> None:
    """Put `new` in the place of `old`: at once on Linux, elsewhere with a moment in which there is no `old`.

    What `old` was is called `new` then, or is gone.
    """
    if _exchanged(new, old):
        return
    aside = new.with_suffix(".old")
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise
    _discard(aside)


def _exchanged(one: Path, other: Path) -> bool:
    """Whether the system could let two paths change names in one step, which Python has no function for."""
    import ctypes

    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if call is None:
        return False
    if call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    # What a system or a file system without this call answers.
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code))


def _discard(stage: Path) -> None:
    # The error that led here is the one to tell, not that its remains could not be removed.
    with suppress(OSError):
        if stage.is_dir() and not stage.is_symlink():
            shutil.rmtree(stage)
        else:
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

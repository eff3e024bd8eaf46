"""What lies beside an output while it is made, how it takes its place, and how what a dead run left is cleared.

    .NAME.<random>.part             what is being written; locked by the run that writes it
    .NAME.<output>.<new>.old|.new   while several files take their places: what stood at NAME, or that nothing did

A stage whose lock can be had belongs to a dead run and is removed. The second kind is a record. In it, `<output>` and
`<new>` identify the output, which takes its place last, and the file that is to stand at NAME. If the output does not
stand in its place, its run ended midway, and what stood at NAME is put back.

All this happens in one's turn: the folder is locked then, which leaves no lock file behind. Where a system or a file
system locks nothing (Windows, some network mounts), outputs appear as whole as elsewhere, but nothing is cleared: it
may be a live run's.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from converter.errors import OutputError

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

_PART, _OLD, _NEW = "part", "old", "new"
_DIGITS = frozenset("0123456789abcdef")
_RANDOM = 4  # bytes
# A turn takes a millisecond. Who waits longer does so for a stranger's lock on the folder, such as that of
# `flock FOLDER dsocr-convert ...`, which would never come free.
_WAIT_SECONDS = 1.0


def stage_of(path: Path) -> Path:
    """A name to write what is to stand at `path` under; no other run has it."""
    return path.with_name(f".{path.name}.{os.urandom(_RANDOM).hex()}.{_PART}")


def lock(fd: int, seconds: float = 0.0) -> bool:
    """Whether an open file is this process's own now, for as long as it is open; waits for it that long."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.002)
        except (OSError, AttributeError):
            # Nothing can be locked here.
            return False
        else:
            return True


@contextmanager
def turn(folder: Path) -> Iterator[bool]:
    """A time in which no other run changes what stands in a folder; whether it could be had."""
    try:
        fd = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except OSError:
        # A folder that may not be read may still be written to; one that is none is told of elsewhere.
        yield False
        return
    try:
        yield lock(fd, _WAIT_SECONDS)
    finally:
        # What was done in the turn is done.
        with suppress(OSError):
            os.close(fd)


def identity(path: Path) -> str:
    """What a file keeps when it is renamed, and no other has; empty if there is none. Sixteen digits at most."""
    try:
        stat = path.lstat()
    except OSError:
        return ""
    return f"{stat.st_ino ^ stat.st_mtime_ns:x}"


def clear(path: Path, output: Path) -> None:
    """Remove what dead runs left beside `path`, and put back what one replaced before `output` stood in its place.

    To be called in the folder's turn.
    """
    prefix = f".{path.name}."
    for name in os.listdir(path.parent):  # noqa: PTH208 (names are enough, and quicker)
        if not name.startswith(prefix):
            continue
        *tokens, kind = name.removeprefix(prefix).split(".")
        if not all(token and set(token) <= _DIGITS for token in tokens):
            continue
        if kind == _PART and len(tokens) == 1 and len(tokens[0]) == 2 * _RANDOM:
            _remove_dead(path.with_name(name))
        elif kind in (_OLD, _NEW) and len(tokens) == 2:
            roll_back(path.with_name(name), path, output)


def _remove_dead(stage: Path) -> None:
    # Another user's, or a device that somebody put there: not ours to remove.
    with suppress(OSError):
        fd = os.open(stage, (os.O_RDONLY if stage.is_dir() else os.O_RDWR) | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if lock(fd):
                discard(stage)
        finally:
            os.close(fd)


def record_of(path: Path, stage: Path, output: str) -> Path:
    """The name of the record of what stands at `path`, or of nothing, before the file that `output` identifies does."""
    kind = _OLD if os.path.lexists(path) else _NEW
    return path.with_name(f".{path.name}.{output}.{identity(stage)}.{kind}")


def keep(path: Path, kept: Path) -> None:
    """Make the record of what stands at `path`."""
    if kept.name.endswith(f".{_NEW}"):
        os.close(os.open(kept, os.O_CREAT | os.O_EXCL, 0o666))
        return
    try:
        os.link(path, kept, follow_symlinks=False)
    except OSError:
        # A folder, or a file system without hard links: there is a moment without anything at `path`.
        path.rename(kept)


def roll_back(kept: Path, path: Path, output: Path) -> None:
    """Undo what was done to `path` unless the output of a record stands in its place; then remove the record.

    Nothing is done where there is none.
    """
    if not os.path.lexists(kept):
        return
    _, wanted, new, kind = kept.name.rsplit(".", 3)
    if identity(output) != wanted and identity(path) in (new, ""):
        try:
            kept.replace(path) if kind == _OLD else path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(
                f"{path}: what a run replaced that did not end could not be put back: {error.strerror}",
                f"it lies in {kept.name}; the next run for the same files puts it back",
            ) from error
    discard(kept)


def place(stage: Path, path: Path, force: bool) -> None:
    """Let a staged file or folder stand at `path`; FileExistsError where something does, unless it is to be replaced.

    It is the system that decides so, in the same step. `stage` may still be there then: the same file under another
    name, or the folder that was replaced.
    """
    if stage.is_dir():
        _place_folder(stage, path, force)
        return
    try:
        os.link(stage, path)
    except OSError as error:
        # Other errors: a file system without hard links, where another run may come between the next two lines.
        if not force and (error.errno == errno.EEXIST or os.path.lexists(path)):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
        stage.replace(path)


def _place_folder(stage: Path, path: Path, force: bool) -> None:
    try:
        # A rename would replace an empty folder; it fails on any other.
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        stage.rename(path)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        if not force:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
        _exchange(stage, path)


def _exchange(new: Path, old: Path) -> None:
    """Put `new` in the place of `old`: at once on Linux, elsewhere with a moment in which there is no `old`.

    What `old` was is called `new` then, or is gone.
    """
    if _exchanged(new, old):
        return
    kept = record_of(old, new, identity(new))
    try:
        keep(old, kept)
        new.rename(old)
    finally:
        roll_back(kept, old, old)


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


def discard(path: Path) -> None:
    """Remove a file or a folder, as far as that can be done: the next run clears what is left."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            # Another run may be at it too.
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()

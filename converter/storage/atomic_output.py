"""Atomic output: files and folders are written under a temporary name and renamed when they are complete.

    .NAME.part       the temporary file or folder of NAME, locked (flock) by the run that writes it
    .NAME.part.old   the old folder NAME during its replacement, if the system cannot exchange two folders

A temporary file without a lock was left by a killed run; the next run for the same output removes it. On a system
without locks, a run whose temporary file was removed by another run fails at its commit. Guarantees: docs/faults.md.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from converter.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows, which also cannot open folders, nor rename or remove open files
    fcntl = None  # type: ignore[assignment]

_BACKUP = ".part.old"
_NEW_FILE_FLAGS = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0)
_STALE_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)

# The message and the next step for an error of the system.
_MESSAGES = {
    errno.EWOULDBLOCK: ("another run is writing it", "wait until it ends, or choose another path"),
    errno.EEXIST: ("was created meanwhile; not overwritten", "choose another path, or replace it with --force"),
    errno.ENOSPC: ("could not be written: No space left on device", "free some space, or write to another disk"),
    errno.EFBIG: ("could not be written: File too large", "raise the limit (ulimit -f), or write to another disk"),
}


class AtomicOutput:
    """Files and folders that are committed together when the `with` block ends without an error.

    At every moment, each path has either its old content or the complete new one. The commit renames in the order of
    the calls: a run that is killed in between leaves the first path new and the second old.

    Raises:
        OutputError: For an OSError in the block or the commit, and for an existing path if `force` is not set.
            Paths that were committed before the error stay.
    """

    def __init__(self, force: bool) -> None:
        self._force = force
        self._temporaries: list[_Temporary] = []
        self._stack = ExitStack()

    def file(self, path: Path) -> int:
        """Return the descriptor of a new file that will become `path`."""
        return self._add(path, is_folder=False).fd

    def folder(self, path: Path) -> Path:
        """Return a new folder that will become `path`."""
        return self._add(path, is_folder=True).name

    def _add(self, path: Path, is_folder: bool) -> _Temporary:
        remove_stale(path)
        temporary = _Temporary(path)
        self._temporaries.append(temporary)
        self._stack.callback(temporary.close)
        with output_errors(path):
            temporary.create(is_folder)
        return temporary

    def __enter__(self) -> AtomicOutput:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        with self._stack:
            if error is None:
                self._commit()
            elif isinstance(error, OSError):
                with output_errors(self._temporaries[0].path):
                    raise error

    def _commit(self) -> None:
        for temporary in self._temporaries:
            with output_errors(temporary.path):
                temporary.sync()
        first, hint = self._temporaries[0].path, ""
        for temporary in self._temporaries:
            with output_errors(temporary.path, hint):
                temporary.commit(self._force)
            hint = f"{first} is complete; write both again with --force"
        try:
            for folder in {temporary.path.parent for temporary in self._temporaries}:
                _sync_folder(folder)
        except OSError as error:
            raise OutputError(
                f"{first}: written, but syncing its folder failed: {error.strerror}",
                "it may be lost on power failure: check the disk, then write it again with --force",
            ) from error


class _Temporary:
    """The temporary file or folder of one output; open and locked from `create` to `close`."""

    def __init__(self, path: Path) -> None:
        self.path, self.name, self.fd = path, temporary_path(path), -1
        self._stat: os.stat_result | None = None

    def create(self, is_folder: bool) -> None:
        if is_folder:
            self.name.mkdir()
        if not is_folder or fcntl is not None:
            self.fd = _open_locked(self.name, os.O_RDONLY if is_folder else _NEW_FILE_FLAGS)
        self._stat = os.fstat(self.fd) if self.fd >= 0 else self.name.lstat()
        self._check_ownership()

    def _check_ownership(self) -> None:
        """Raise BlockingIOError if the temporary name belongs to another run."""
        with suppress(FileNotFoundError):
            if self._stat is not None and os.path.samestat(self.name.lstat(), self._stat):
                return
        raise BlockingIOError(errno.EWOULDBLOCK, "removed by another run")

    def sync(self) -> None:
        if not self.name.is_dir():
            os.fsync(self.fd)
        for folder, _, _ in os.walk(self.name):
            _sync_folder(Path(folder))

    def commit(self, force: bool) -> None:
        """Rename the temporary file; FileExistsError if `path` exists and `force` is not set."""
        self._check_ownership()
        if fcntl is None:
            self._release()
        if not force:
            _rename_new(self.name, self.path)
        elif self.name.is_dir() and os.path.lexists(self.path):
            self._replace_folder()
        else:
            self.name.replace(self.path)

    def _replace_folder(self) -> None:
        replaced = self.path.lstat()
        if not _exchange(self.name, self.path):
            try:
                self.path.rename(temporary_path(self.path, _BACKUP))
                self.name.rename(self.path)
            finally:
                # The next run puts back or removes what this one cannot.
                with suppress(OSError):
                    _put_back(self.path)
        # After an exchange, the old folder has the temporary name, so that `close` removes it.
        self._stat = replaced

    def close(self) -> None:
        """Remove the temporary file or folder if it belongs to this run, and release the lock."""
        if fcntl is None:
            self._release()
        try:
            # The next run removes what this one cannot.
            with suppress(OSError):
                self._check_ownership()
                _remove(self.name)
        finally:
            self._release()

    def _release(self) -> None:
        fd, self.fd = self.fd, -1
        _close(fd)


@contextmanager
def atomic_file(path: Path, force: bool) -> Iterator[int]:
    """Yield the descriptor of a new file that becomes `path` when the block ends without an error."""
    with AtomicOutput(force) as output:
        yield output.file(path)


def temporary_path(path: Path, suffix: str = ".part") -> Path:
    """Return the name under which `path` is written."""
    return path.parent / f".{path.name}{suffix}"


def remove_stale(path: Path) -> None:
    """Remove the temporary files of a killed run for `path`, and put back a folder that it was replacing.

    Raises:
        OutputError: Another run is writing `path`, or the system refuses.
    """
    temporary = temporary_path(path)
    with output_errors(path):
        with suppress(FileNotFoundError, NotADirectoryError):
            fd = -1 if fcntl is None else _open_locked(temporary, _STALE_FLAGS)
            try:
                _remove(temporary)
            finally:
                _close(fd)
        _put_back(path)


def _put_back(path: Path) -> None:
    """Rename the backup of a folder to `path`, or remove the backup if `path` exists."""
    backup = temporary_path(path, _BACKUP)
    if os.path.lexists(backup):
        _remove(backup) if os.path.lexists(path) else backup.rename(path)


@contextmanager
def output_errors(path: Path, hint: str = "") -> Iterator[None]:
    """Raise an OutputError that names `path` for an OSError in the block, or for a ValueError (a NUL in a name).

    The next step is `hint`, or by default one that fits the error.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        default = f"could not be written: {reason}", "check the disk and the permissions, or choose another path"
        message, step = _MESSAGES.get(getattr(error, "errno", 0), default)
        raise OutputError(f"{path}: {message}", hint or step) from error


@contextmanager
def new_file(path: Path) -> Iterator[int]:
    """Yield the descriptor of a new file in a temporary folder; it is durable when the block ends."""
    fd = os.open(path, _NEW_FILE_FLAGS, 0o666)
    try:
        yield fd
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: memoryview) -> None:
    """Write all bytes: a single write may be cut short by a signal or a full disk."""
    while data:
        data = data[os.write(fd, data) :]


def _open_locked(path: Path, flags: int) -> int:
    """Open a file or a folder, locked until it is closed; BlockingIOError where another run holds the lock."""
    # The system applies the umask to the mode. safetensors' own writer creates files that only the owner can read.
    fd = os.open(path, flags, 0o666)
    try:
        if fcntl is not None:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Any other error means a file system without locks.
        if isinstance(error, BlockingIOError):
            os.close(fd)
            raise
    return fd


def _close(fd: int) -> None:
    # After an fsync, an error loses no data. -1 means that no file is open.
    with suppress(OSError):
        os.close(fd)


def _sync_folder(folder: Path) -> None:
    if fcntl is None:
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        # Network file systems may refuse it for folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        _close(fd)


def _remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it, which another run may be removing too."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _rename_new(old: Path, new: Path) -> None:
    """Rename; FileExistsError if `new` exists. With hard links, the system checks this atomically."""
    try:
        os.link(old, new)
    except OSError:
        if os.path.lexists(new):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        old.rename(new)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one step with Linux's renameat2; return whether that was possible."""
    if sys.platform != "linux":
        return False
    import ctypes

    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    at_fdcwd, rename_exchange = -100, 2
    return renameat2 is not None and not renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange)

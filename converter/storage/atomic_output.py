"""Output that appears whole or not at all: written to a file beside it, made durable, then put in its place.

A folder likewise: its files are written to a folder beside it, which is renamed or changes places with an older one.
Several files appear together. docs/faults.md says what holds when.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from converter.errors import OutputError
from converter.storage.temp_files import (
    clear,
    discard,
    identity,
    keep,
    lock,
    place,
    record_of,
    roll_back,
    stage_of,
    turn,
)

_ROOM = "free some room, or write elsewhere"
_STEPS = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or write elsewhere",
}


def remove_stale(output: Path, others: Sequence[Path] = ()) -> None:
    """Remove what dead runs left beside the output and what appears with it, and finish or undo what they began.

    Before anything is checked: it takes room, and a file may stand there that is to be undone.
    """
    for path in (output, *others):
        check_name(path)
        with writing(path), turn(path.parent) as held:
            if held:
                clear(path, output)


def check_name(path: Path) -> None:
    """OutputError for a path that the system cannot even look at: too long, or with a NUL in it."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{path}: cannot be written: {getattr(error, 'strerror', error)}", "choose another path"
        ) from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """OutputError that names `path` for what the system refuses in the block."""
    try:
        yield
    except OSError as error:
        raise _refused(path, error) from error


def _refused(path: Path, error: OSError) -> OutputError:
    step = _STEPS.get(error.errno or 0, "look after the disk and the folder's permissions, or write elsewhere")
    return OutputError(f"{path}: could not be written: {error.strerror or error}", f"{step}")


class Staging:
    """Files and folders that appear together: the output, and what is to be there as soon as it is.

    The output is what is asked for first. It takes its place last: until then, whatever fails leaves all that stood in
    the other places before, and if the process is killed, the next run for the same files puts it back.
    """

    def __init__(self, force: bool) -> None:
        """`force` replaces what stands there."""
        self._force = force
        self._stages: list[_Stage] = []
        self._records: list[tuple[Path, Path]] = []

    def file(self, path: Path) -> int:
        """A file descriptor to write to what shall stand at `path`."""
        return self._begin(path, _create).fd

    def folder(self, path: Path) -> Path:
        """A new folder to put files into, which shall stand at `path`."""
        return self._begin(path, _create_folder).stage

    def _begin(self, path: Path, create: Callable[[Path], int]) -> _Stage:
        stage = _Stage(path)
        # Before there is any: a signal may come between any two steps.
        self._stages.append(stage)
        with writing(path), turn(path.parent) as held:
            if held:
                clear(path, self.output)
            stage.fd = create(stage.stage)
            lock(stage.fd)
        return stage

    @property
    def output(self) -> Path:
        return self._stages[0].path

    def appear(self) -> None:
        """Make all that was written durable, then let it take its places, one directly after the other."""
        for stage in self._stages:
            with writing(stage.path):
                stage.sync()
        output, *others = self._stages
        wanted = identity(output.stage)
        with ExitStack() as stack:
            for folder in sorted({stage.path.parent.resolve() for stage in self._stages}):
                stack.enter_context(turn(folder))
            try:
                for stage in others:
                    with writing(stage.path):
                        kept = record_of(stage.path, stage.stage, wanted)
                        # Before there is any: a signal may come between any two steps.
                        self._records.append((kept, stage.path))
                        keep(stage.path, kept)
                        stage.appear(self._force)
                output.appear(self._force)
            finally:
                self._roll_back()

    def _roll_back(self) -> None:
        """Undo what was done for nothing; what a signal keeps from it is done when this is called again."""
        while self._records:
            try:
                roll_back(*self._records[-1], self.output)
            except OutputError:
                self._records.pop()
                raise
            self._records.pop()

    def end(self) -> None:
        """Remove what has no place, or was replaced."""
        self._roll_back()
        for stage in self._stages:
            discard(stage.stage)
            stage.close()

    def sync(self) -> None:
        """Make it durable that they took their places."""
        for folder in {stage.path.parent for stage in self._stages}:
            try:
                _sync_folder(folder)
            except OSError as error:
                raise OutputError(
                    f"{self.output}: is written, whole, but may be gone after a power cut: {error.strerror}",
                    f"look after the disk that {folder} is on, then write it again with --force",
                ) from error


class _Stage:
    """One of them while it is written: its place, its name until then, and an open file that keeps it locked."""

    def __init__(self, path: Path) -> None:
        self.path, self.stage, self.fd = path, stage_of(path), -1

    def sync(self) -> None:
        for folder, inner, _ in os.walk(self.stage):
            for name in inner:
                _sync_folder(Path(folder, name))
        _sync(self.fd)

    def appear(self, force: bool) -> None:
        with writing(self.path):
            try:
                place(self.stage, self.path, force)
            except FileExistsError:
                raise OutputError(
                    f"{self.path}: appeared while it was being written; it was left as it is",
                    "choose another path, or replace it with --force",
                ) from None

    def close(self) -> None:
        # After fsync there is nothing that this could still tell.
        with suppress(OSError):
            fd, self.fd = self.fd, -1
            if fd >= 0:
                os.close(fd)


@contextmanager
def staging(force: bool) -> Iterator[Staging]:
    """What appears together when the block ends without an error.

    Otherwise nothing is left, and what stood in the places before stands there still. OutputError for what the system
    refuses, and where something stands in a place that is not to be replaced.
    """
    new = Staging(force)
    try:
        yield new
        new.appear()
    except OSError as error:
        raise _refused(new.output, error) from error
    finally:
        try:
            new.end()
        except BaseException:
            # A signal's, which came just now: another one would end the process at once.
            new.end()
            raise
    new.sync()


@contextmanager
def staged(path: Path, force: bool) -> Iterator[int]:
    """A file descriptor to write to; when the block ends without an error, what was written stands at `path`.

    Otherwise nothing is left, and what stood at `path` before stands there still; OutputError as for `staging`.
    """
    with staging(force) as new:
        yield new.file(path)


@contextmanager
def new_file(path: Path) -> Iterator[int]:
    """A file descriptor to write to; a file in a staged folder, durable when the block ends."""
    fd = _create(path)
    try:
        yield fd
        os.fsync(fd)
    finally:
        os.close(fd)


def _create(path: Path) -> int:
    # Mode 0666 less the umask, as any program's output: safetensors' own writer leaves files only the owner reads.
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0), 0o666)


def _create_folder(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        _sync(fd)
    finally:
        os.close(fd)


def _sync(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        # What some network file systems say of folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def write_all(fd: int, data: memoryview) -> None:
    """Write every byte: a signal or a full disk may cut a write short."""
    while data:
        data = data[os.write(fd, data) :]

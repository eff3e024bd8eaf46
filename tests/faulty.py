"""The program with a system call failed, or the process killed at it, without strace: functions of `os` are wrapped.

A process that has imported everything, and forks for every run: 20 ms each, where a start takes 200. A line of JSON on
stdin asks for a run: its arguments, the folder that it writes to, and which of the calls concerning that folder shall
fail, with which error. A line on stdout tells: exit code, stderr, and how many such calls there were.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import io
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from converter.cli import console, convert
from converter.output import model_card, pretrained_config
from converter.storage import temp_files

# Imported late by the program.
LATE = (pretrained_config, model_card, ctypes, hashlib)
CALLS = "open close write fsync link rename replace unlink mkdir rmdir ftruncate listdir posix_fadvise"


class Faults:
    """Counts calls that concern a folder, by a path in it or a descriptor opened there, and fails one of them."""

    def __init__(self, folder: str, at: int, error: int) -> None:
        self.folder, self.at, self.error = folder, at, error
        self.calls = 0
        self._open: set[int] = set()
        # The writing thread calls too.
        self._lock = threading.Lock()

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if not self._concerns(args):
                return real(*args, **options)
            self._fail()
            result = real(*args, **options)
            if name == "open":
                self._open.add(result)
            elif name == "close":
                self._open.discard(args[0])
            return result

        return call

    def _concerns(self, args: tuple[Any, ...]) -> bool:
        return any(
            arg in self._open if isinstance(arg, int) else os.fspath(arg).startswith(self.folder)
            for arg in args[:2]
            if isinstance(arg, (int, str, os.PathLike))
        )

    def _fail(self) -> None:
        with self._lock:
            self.calls += 1
            now = self.calls == self.at
        if now and self.error == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if now:
            raise OSError(self.error, os.strerror(self.error))


def run(arguments: list[str], folder: str, at: int, error: int, told: int) -> None:
    """The program, in a process of its own; `told` is where the count of calls goes."""
    faults = Faults(folder, at, error)
    for name in CALLS.split():
        setattr(os, name, faults.wrap(name, getattr(os, name)))
    fcntl.flock = faults.wrap("flock", fcntl.flock)  # type: ignore[assignment]
    temp_files._exchanged = faults.wrap("exchanged", temp_files._exchanged)
    sys.argv = ["dsocr-convert", *arguments]
    code = console.run(convert.app)
    os.pwrite(told, faults.calls.to_bytes(4, "little"), 0)
    os._exit(code)


@functools.cache
def warm(kind: str) -> None:
    """Have imported, and cached, what a run of this kind needs, for all forks to come."""
    sys.argv = ["dsocr-convert", *kind.split("\0"), "--dry-run"]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        console.run(convert.app)


def main() -> None:
    for line in sys.stdin:
        arguments, folder, at, error = json.loads(line)
        warm("\0".join(arguments))
        with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as told:
            child = os.fork()
            if child == 0:
                os.dup2(said.fileno(), 2)
                os.dup2(said.fileno(), 1)
                run(arguments, folder, at, error, told.fileno())
            _, status = os.waitpid(child, 0)
            said.seek(0)
            text = said.read().decode(errors="replace")
            calls = int.from_bytes(os.pread(told.fileno(), 4, 0), "little")
        print(json.dumps([os.waitstatus_to_exitcode(status), text, calls]), flush=True)


if __name__ == "__main__":
    main()

"""The program with a system call failed, or the process killed at it, without strace: functions of `os` are wrapped.

A process that has imported everything and forks for every run, which takes a tenth of a start. A line of JSON on stdin
requests a run: its arguments, the folder that it writes to, which of the calls that concern the folder fails, the error
number, or 0 for SIGKILL, and when it is killed. A line on stdout has the result: exit code, stderr, and the number of
such calls.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import faulting

import converter.api.convert
from converter.cli import convert
from converter.cli import main as program
from converter.output import model_card, pretrained
from converter.storage import atomic_output

# Imported before the fork: the program imports them when it needs them.
LATE = (converter.api.convert, convert, pretrained, model_card, ctypes, hashlib)
CALLS = "open close write fsync link rename replace unlink mkdir rmdir ftruncate posix_fadvise"


class Faults:
    """Counts the calls that concern a folder, by a path in it or a descriptor opened there, and fails one of them."""

    def __init__(self, folder: str, at: int, error: int, count_fd: int) -> None:
        self.folder, self.at, self.error, self.count_fd = folder, at, error, count_fd
        self.calls = 0
        self._open: set[int] = set()
        # The writing thread calls, too.
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
            os.pwrite(self.count_fd, self.calls.to_bytes(4, "little"), 0)
        if now and self.error == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if now:
            raise OSError(self.error, os.strerror(self.error))


def run(arguments: list[str], faults: Faults) -> None:
    for name in CALLS.split():
        setattr(os, name, faults.wrap(name, getattr(os, name)))
    fcntl.flock = faults.wrap("flock", fcntl.flock)  # type: ignore[assignment]
    atomic_output._exchange = faults.wrap("exchange", atomic_output._exchange)
    sys.argv = ["dsocr-convert", *arguments]
    os._exit(program.convert())


def main() -> None:
    faulting.warm_up()
    # A killed process loses nothing that it wrote: only the disk could.
    os.fsync = lambda fd: None
    for line in sys.stdin:
        arguments, folder, at, error, seconds = json.loads(line)
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as count:
            child = os.fork()
            if child == 0:
                os.dup2(output.fileno(), 2)
                os.dup2(output.fileno(), 1)
                run(arguments, Faults(folder, at, error, count.fileno()))
            if seconds:
                time.sleep(seconds)
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            output.seek(0)
            text = output.read().decode(errors="replace")
            calls = int.from_bytes(os.pread(count.fileno(), 4, 0), "little")
        print(json.dumps([os.waitstatus_to_exitcode(status), text, calls]), flush=True)


if __name__ == "__main__":
    main()

"""What both programs do at the terminal: exit codes, messages on stderr, results on stdout, the progress bar."""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from converter.cli.start import end_at_once, on_signal, unwind
from converter.errors import DsocrError, OutputError, printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

# A bar that is gone before it is read only flickers.
_BAR_AFTER_SECONDS = 0.5

# Characters of a line for people; a file may give its tensors names of megabytes.
_LONGEST = 1000


def main(app: Callable[[], object]) -> NoReturn:
    """A whole program, to its end or to that which a signal makes."""
    # torch says so as it is imported without NumPy, which nothing here needs.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    try:
        on_signal(unwind)
        code = run(app)
        on_signal(end_at_once)
    except KeyboardInterrupt:
        code = 130
    except SystemExit as stop:
        code = int(stop.code or 0)
    leave(code)


def run(app: Callable[[], object]) -> int:
    """Run a program; its exit code. Errors a user can cause are told in a few lines, bugs keep their traceback."""
    try:
        app()
    except DsocrError as error:
        first, *rest = str(error).split("\n")
        say(f"error: {first}", *(f"  {line}" for line in rest))
        return error.exit_code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def leave(code: int) -> NoReturn:
    """End the process without taking the interpreter apart: 15 ms, a tenth of a short conversion."""
    # What libraries have registered, such as the removal of their temporary folders.
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        # A reader that has gone away does not change what was done.
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def say(*lines: str) -> None:
    """Lines for people, on stderr: of a very long one the beginning and the end."""
    for line in map(printable, lines):
        short = line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
        print(short, file=sys.stderr)


def result(*lines: str) -> None:
    """The command's result, on stdout."""
    _put("\n".join(map(printable, lines)))


def result_json(document: dict[str, Any]) -> None:
    """The command's result as one JSON document, on stdout."""
    _put(json.dumps(document, indent=2))


def _put(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # A reader that has gone away does not change what was done.
        return
    except OSError as error:
        raise OutputError(
            f"standard output: could not be written: {error.strerror}", "what was to be told there was done"
        ) from error


class Bar:
    """A progress bar on stderr, drawn only at a terminal and only where the work takes a while.

    rich is imported when it is first drawn: 50 ms that short conversions do not pay.
    """

    def __init__(self, enabled: bool, unit: Literal["bytes", "steps"] = "bytes") -> None:
        self._unit = unit
        self._enabled = enabled and sys.stderr.isatty()
        self._begin = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show `done` of `total`, and what is being done."""
        if not self._enabled or time.monotonic() - self._begin < _BAR_AFTER_SECONDS:
            return
        if self._bar is None or self._task is None:
            self._bar = self._make()
            self._task = self._bar.add_task(what, total=total)
        # Again, if the stage before has ended.
        self._bar.start()
        self._bar.update(self._task, description=what, completed=done, total=total)
        if done >= total:
            # Another bar may follow.
            self._bar.stop()

    def _make(self) -> Progress:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TransferSpeedColumn,
        )

        # Markup off: a file's name may look like it.
        columns = (TextColumn("{task.description}", markup=False), BarColumn())
        counts = (DownloadColumn(), TransferSpeedColumn()) if self._unit == "bytes" else (MofNCompleteColumn(),)
        return Progress(*columns, *counts, console=Console(stderr=True), transient=True)

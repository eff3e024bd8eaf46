"""Output of both programs: messages and progress bars on stderr, results on stdout, exit codes."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from converter.errors import DsocrError, OutputError, printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

# A bar that disappears at once only flickers.
_BAR_DELAY = 0.5  # seconds
# Characters of a line on stderr: tensor names in a file may have megabytes.
_MAX_LINE = 1000


def run(app: Callable[[], object]) -> int:
    """Run a command and return its exit code; a DsocrError is printed in a few lines, a bug keeps its traceback."""
    try:
        app()
    except DsocrError as error:
        first, *rest = str(error).split("\n")
        say(f"error: {first}", *(f"  {line}" for line in rest))
        return error.exit_code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def say(*lines: str) -> None:
    """Print lines on stderr; a very long one is shortened in the middle."""
    for line in map(printable, lines):
        short = line if len(line) <= _MAX_LINE else f"{line[: _MAX_LINE // 2]} ... {line[-_MAX_LINE // 2 :]}"
        print(short, file=sys.stderr)


def result(*lines: str) -> None:
    """Print the command's result on stdout."""
    _put("\n".join(map(printable, lines)))


def result_json(document: dict[str, Any]) -> None:
    """Print the command's result as one JSON document on stdout."""
    _put(json.dumps(document, indent=2))


def _put(text: str) -> None:
    try:
        print(text, flush=True)
    except OSError as error:
        # Otherwise Python writes the rest of the buffer again when it exits, and fails again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # A reader that has closed the pipe, such as `head`, is no error.
        if not isinstance(error, BrokenPipeError):
            raise OutputError(
                f"standard output: could not be written: {error.strerror}", "the command itself succeeded"
            ) from error


class Bar:
    """A progress bar on stderr, shown on a terminal if the work takes a while."""

    def __init__(self, enabled: bool, unit: Literal["bytes", "steps"] = "bytes") -> None:
        """Create a bar that is not shown yet.

        Args:
            enabled: Whether to show it at all.
            unit: What is counted.
        """
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
        """Show that `done` of `total` is done of `what`."""
        if not self._enabled or time.monotonic() - self._begin < _BAR_DELAY:
            return
        if self._bar is None or self._task is None:
            self._bar = self._make()
            self._task = self._bar.add_task(what, total=total)
        # Again, if another task has ended before.
        self._bar.start()
        self._bar.update(self._task, description=what, completed=done, total=total)
        if done >= total:
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

        # No markup: a file name may look like it.
        columns = (TextColumn("{task.description}", markup=False), BarColumn())
        counts = (DownloadColumn(), TransferSpeedColumn()) if self._unit == "bytes" else (MofNCompleteColumn(),)
        return Progress(*columns, *counts, console=Console(stderr=True), transient=True)

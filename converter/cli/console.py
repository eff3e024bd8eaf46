"""Output of both programs: messages and progress bars on stderr, results on stdout, exit codes."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from converter.errors import DsocrError, OutputError, printable, shortened

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

# Seconds of work before a bar is shown, as a bar for less would only flicker.
_BAR_DELAY = 0.5
# Characters of a line on stderr, as tensor names in a file may have megabytes.
_MAX_LINE_LENGTH = 1000
# Commands that are printed for a choice of sources.
_MAX_COMMANDS = 8


def run(app: Callable[[], object]) -> int:
    """Run a command and return its exit code; print a DsocrError as a message, and let other errors pass."""
    try:
        app()
    except DsocrError as error:
        first, *rest = str(error).split("\n")
        say(f"error: {first}", *(f"  {line}" for line in [*rest, *_commands(*error.choices)]))
        return error.exit_code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _commands(source: str, choices: Sequence[str]) -> list[str]:
    """Return the command of this program with each of the last choices in place of a source."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    if source not in map(os.path.normpath, words):
        return []
    return [
        shlex.join(choice if os.path.normpath(word) == source else word for word in words)
        for choice in choices[-_MAX_COMMANDS:]
    ]


def say(*lines: str) -> None:
    """Print lines on stderr, very long ones shortened in the middle."""
    for line in map(printable, lines):
        print(shortened(line, _MAX_LINE_LENGTH), file=sys.stderr)


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
        # Otherwise Python tries to write the rest of the buffer when it exits, and fails again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # It is not an error if the reader of a pipe, such as `head`, has closed it.
        if not isinstance(error, BrokenPipeError):
            raise OutputError(
                f"standard output: could not be written: {error.strerror}", "the command itself succeeded"
            ) from error


class Bar:
    """A progress bar on stderr, shown only on a terminal and if the work takes longer than `_BAR_DELAY`."""

    def __init__(self, enabled: bool, unit: Literal["bytes", "steps"] = "bytes") -> None:
        """Create a bar that is not shown yet.

        Args:
            enabled: Whether to show a bar at all.
            unit: The unit of the counts.
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

    def __call__(self, description: str, done: int, total: int) -> None:
        """Show `description`, and a bar of which `done` of `total` units are filled."""
        if not self._enabled or time.monotonic() - self._begin < _BAR_DELAY:
            return
        if self._bar is None or self._task is None:
            self._bar = self._make_bar()
            self._task = self._bar.add_task(description, total=total)
        # The bar was stopped if an earlier task is complete.
        self._bar.start()
        self._bar.update(self._task, description=description, completed=done, total=total)
        if done >= total:
            self._bar.stop()

    def _make_bar(self) -> Progress:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TransferSpeedColumn,
        )

        # Without markup, as a file name may contain brackets.
        columns = (TextColumn("{task.description}", markup=False), BarColumn())
        counts = (DownloadColumn(), TransferSpeedColumn()) if self._unit == "bytes" else (MofNCompleteColumn(),)
        return Progress(*columns, *counts, console=Console(stderr=True), transient=True)

"""The programs dsocr-convert and dsocr-verify."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType

from converter.cli import console

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def convert() -> int:
    """Run dsocr-convert and return its exit code."""
    return main(lambda: import_module("converter.cli.convert").app)


def verify() -> int:
    """Run dsocr-verify and return its exit code."""
    return main(lambda: import_module("converter.cli.verify").app)


def main(load: Callable[[], Callable[[], object]]) -> int:
    """Run a program and return its exit code: 130 after SIGINT, 143 after SIGTERM.

    Args:
        load: Imports and returns the program. It is called after signal handlers are set, as imports take a while.
    """
    # torch warns where NumPy is not installed; nothing here needs NumPy.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    try:
        with _signals_raise():
            return console.run(load())
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SystemExit as stop:
        return int(stop.code or 0)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Turn signals that end the process into exceptions, so that temporary files are removed."""
    # A signal that is ignored at the start, as under nohup, stays ignored.
    handled = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    for number in handled:
        signal.signal(number, _raise)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


def _raise(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

"""Where the programs start, and how a signal ends them: nothing is left behind, and the exit code is 128 + its number.

Imports nothing that takes time. Until the rest is there, a signal ends the process at once and without a word.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

_NUMBERS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def convert() -> None:
    """The program dsocr-convert."""
    on_signal(end_at_once)
    from converter.cli.console import main
    from converter.cli.convert import app

    main(app)


def verify() -> None:
    """The program dsocr-verify."""
    on_signal(end_at_once)
    from converter.cli.console import main
    from converter.cli.verify import app

    main(app)


def on_signal(act: Callable[[int, FrameType | None], None]) -> None:
    """Have signals that end a process do this first, unless whoever started it has them ignored."""
    for number in _NUMBERS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, act)


def end_at_once(number: int, frame: FrameType | None) -> None:
    """End the process at once."""
    os._exit(128 + number)


def unwind(number: int, frame: FrameType | None) -> None:
    """End what is under way, which cleans up after itself; a second signal is not waited for."""
    on_signal(end_at_once)
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, lambda *_: unwind(number, None))
        sys.unraisablehook = _again
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def _again(ignored: sys.UnraisableHookArgs) -> None:
    """Raise it once more, a moment later: what a signal raises inside of a destructor, Python ignores."""
    if isinstance(ignored.exc_value, KeyboardInterrupt | SystemExit):
        signal.setitimer(signal.ITIMER_REAL, 0.001)
    else:
        sys.__unraisablehook__(ignored)

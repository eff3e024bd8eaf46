"""Runs one target under atheris: harness.py TARGET [option of libFuzzer ...] [folder of inputs ...].

It ends at the first escape: an exception that is no DsocrError, more time or memory than an input may take, or anything
that a reader has no business doing (running code, importing, writing, opening connections), which audit events tell.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# For one input of at most 64 KiB. Instrumented code takes a few times as long.
SECONDS = 5.0
MEMORY = 256 << 20
# Of a message.
LINES = 12
# libFuzzer's own bounds, for what would not return or not be counted.
OPTIONS = ("-timeout=60", "-rss_limit_mb=2048", "-max_len=65536", "-print_final_stats=1")

# Audit events by how their names begin.
_FORBIDDEN = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile", "os.kill", "os.putenv"),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate"),
    *("subprocess.", "pty.", "exec", "compile", "import", "pickle.", "marshal.", "ctypes.", "code.", "function."),
    *(
        "socket.",
        "urllib.",
        "http.",
        "ftplib.",
        "smtplib.",
        "webbrowser.",
        "shutil.",
        "tempfile.",
        "sqlite3.",
        "builtins.input",
    ),
)


class Escape(BaseException):
    """What must not happen did; no `except Exception` hides it."""


class Guard:
    """Watches what Python does while an input is read."""

    def __init__(self) -> None:
        self._on = False
        self._seen = ""
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._on:
            return
        if _forbidden(event, arguments):
            self._seen = self._seen or f"{event}{arguments!r}"[:500]
            raise Escape(self._seen)

    def run(self, target: Callable[[Any], object], data: bytes | Path) -> None:
        """Have `target` read `data`; Escape or the exception itself where that is not as it should be."""
        from converter.errors import DsocrError

        began = time.process_time()
        self._on = True
        try:
            target(data)
        except DsocrError as error:
            if len(lines := str(error).splitlines()) > LINES:
                raise Escape(f"a message of {len(lines)} lines") from error
        finally:
            self._on = False
        if self._seen:
            raise Escape(self._seen)
        seconds = time.process_time() - began
        if seconds > SECONDS:
            raise Escape(f"{seconds:.1f} s for one input")


def _forbidden(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        # The low bits of the flags: 0 to read, 1 to write, 2 for both.
        return bool(arguments[2] & 3)
    return event.startswith(_FORBIDDEN)


def main() -> None:
    name = sys.argv.pop(1)
    with atheris.instrument_imports(include=["converter"], exclude=["converter.encoders"]):
        targets = import_module("fuzzing.targets")
        # An import while an input is read would be an escape: what is imported late is imported here.
        for module in ("cards.card", "loaders.unknown", "pretrained.configs", *(["verify.carded"] * (name == "card"))):
            import_module(f"converter.{module}")
    for codec in ("utf_16_be", "utf_16_le", "utf_32_be", "utf_32_le", "utf_8_sig", "raw_unicode_escape"):
        import_module(f"encodings.{codec}")
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp(prefix="dsocr-fuzz-"))
    targets.prepare(folder)
    target, guard, path = targets.TARGETS[name], Guard(), folder / targets.TARGETS[name].file

    def one(data: bytes) -> None:
        _limit_memory()
        if target.file:
            path.write_bytes(data)
        guard.run(target.run, path if target.file else data)

    def mutated(data: bytes, most: int, seed: int) -> bytes:
        result: bytes = target.mutate(data, most, Random(seed), atheris.Mutate)
        return result

    atheris.Setup([sys.argv[0], *OPTIONS, *sys.argv[1:]], one, custom_mutator=mutated)
    atheris.Fuzz()


@cache
def _limit_memory() -> None:
    """From the first input on, when all is imported, let the process grow by no more than one may take."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()

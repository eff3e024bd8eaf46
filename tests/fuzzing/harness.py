"""Fuzzes one target with atheris: harness.py TARGET [libFuzzer option ...] [folder of inputs ...].

Stops at the first escape: an exception other than DsocrError, excessive time or memory, or an audit event of an action
that no reader may take (running code, importing, writing, opening connections).
"""

from __future__ import annotations

import pkgutil
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Limits for one input of at most 64 KiB. Instrumented code takes about four times as long as the program: a pickle of
# as many opcodes as the reader accepts takes 1.7 s there and 6.7 s here.
SECONDS = 15.0
MEMORY = 256 << 20  # bytes
LINES = 12  # of a message
# libFuzzer's own limits, for endless loops (wall-clock seconds, on a machine that may be busy) and for memory that is
# allocated outside of Python.
OPTIONS = ("-timeout=600", "-report_slow_units=600", "-rss_limit_mb=2048", "-max_len=65536", "-print_final_stats=1")

# Prefixes of audit events.
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
    """A forbidden action; not caught by `except Exception`."""


class Guard:
    """Detects forbidden actions and excessive time while a target runs."""

    def __init__(self) -> None:
        self._active = False
        self._event = ""
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._active:
            return
        if _forbidden(event, arguments):
            self._event = self._event or f"{event}{arguments!r}"[:500]
            raise Escape(self._event)

    def run(self, target: Callable[[Any], object], data: bytes | Path) -> None:
        """Run `target` on `data`; raises Escape, or the target's exception if it is not a DsocrError."""
        from converter.errors import DsocrError

        began = time.process_time()
        self._active = True
        try:
            target(data)
        except DsocrError as error:
            if len(lines := str(error).splitlines()) > LINES:
                raise Escape(f"a message of {len(lines)} lines") from error
        finally:
            self._active = False
        if self._event:
            raise Escape(self._event)
        seconds = time.process_time() - began
        if seconds > SECONDS:
            raise Escape(f"{seconds:.1f} s for one input")


def _forbidden(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        # The low bits of the flags: 0 for reading, 1 for writing, 2 for both.
        return bool(arguments[2] & 3)
    return event.startswith(_FORBIDDEN)


def _import_all(name: str) -> None:
    """Import a module, and the modules in it."""
    for item in pkgutil.iter_modules(getattr(import_module(name), "__path__", ())):
        import_module(f"{name}.{item.name}")


def main() -> None:
    name = sys.argv.pop(1)
    with atheris.instrument_imports(include=["converter"], exclude=["converter.encoders"]):
        targets = import_module("fuzzing.targets")
        # Lazy imports of the program: while a target runs, an import is an escape.
        for room in ("checkpoint", "formats", "layouts", "output.pretrained_config", "plan"):
            _import_all(f"converter.{room}")
        if name == "record":
            import_module("converter.verification.record_check")
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

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        result: bytes = target.mutate(data, max_size, Random(seed), atheris.Mutate)
        return result

    atheris.Setup([sys.argv[0], *OPTIONS, *sys.argv[1:]], one, custom_mutator=mutate)
    atheris.Fuzz()


def _limit_memory() -> None:
    """Limit the growth of the process during one input. The fuzzer itself grows, too, as it keeps inputs."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()

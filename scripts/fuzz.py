#!/usr/bin/env python3
"""Fuzzes the readers of untrusted bytes, guided by coverage, and prints a table. Exit code 1 after an escape.

An escape is an exception other than the program's own errors, excessive time or memory for one input, or an attempt to
run code or to write. Inputs are kept in .fuzz/, where the next run continues; escapes are kept there, too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FUZZING = ROOT / "tests" / "fuzzing"
sys.path.insert(0, str(ROOT / "tests"))

from fuzzing.seeds import write as write_seeds  # noqa: E402 (from the tests)
from fuzzing.targets import TARGETS  # noqa: E402

# Seconds for starting and for reading the seeds, in addition to --seconds.
_GRACE = 120


class Result(NamedTuple):
    """The result of one target. `features` is libFuzzer's measure of coverage; `escape` is empty if there was none."""

    target: str
    seconds: float
    executions: int
    coverage: int
    features: int
    inputs: int
    peak: int  # MiB
    escape: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="+", choices=["all", *TARGETS], help="what to fuzz")
    parser.add_argument("--seconds", type=int, default=1800, help="per target (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="parallel targets (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed; 0 is different in each run (default)")
    parser.add_argument("--folder", type=Path, default=ROOT / ".fuzz", help="inputs and logs (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    args = parser.parse_args()
    names = list(TARGETS) if "all" in args.target else args.target
    folder = args.folder.resolve()
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores; writing seeds ...", flush=True)
    write_seeds(folder / "seeds")
    results = run_all(names, folder, args.seconds, args.jobs, args.seed)
    print("\n".join(table(results)))
    if args.json:
        args.json.write_text(json.dumps([result._asdict() for result in results], indent=1) + "\n")
    return int(any(result.escape for result in results))


def run_all(names: Sequence[str], folder: Path, seconds: int, jobs: int, seed: int) -> list[Result]:
    """Fuzz the targets, `jobs` at a time."""

    def one(name: str) -> Result:
        result = fuzz(name, folder, seconds, seed)
        print(f"{name}: {result.escape or 'no escape'}", flush=True)
        return result

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, names))


def fuzz(name: str, folder: Path, seconds: int, seed: int) -> Result:
    """Fuzz one target in a new process."""
    inputs, escapes = folder / "inputs" / name, folder / "escapes"
    for path in (inputs, escapes):
        path.mkdir(parents=True, exist_ok=True)
    log, before = folder / f"{name}.log", set(escapes.iterdir())
    options = [f"-max_total_time={seconds}", f"-seed={seed}", f"-artifact_prefix={escapes}/{name}-"]
    command = [sys.executable, str(FUZZING / "harness.py"), name, *options, str(inputs), str(folder / "seeds" / name)]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dsocr-fuzz-", dir=_memory()) as own, log.open("wb") as out:
        try:
            code: int | str = subprocess.run(
                command, stdout=out, stderr=out, cwd=own, env={**os.environ, "TMPDIR": own}, timeout=seconds + _GRACE
            ).returncode
        except subprocess.TimeoutExpired:
            code = "a timeout"
    took, text = time.monotonic() - began, log.read_text(errors="replace")
    kept = sorted(path.name for path in set(escapes.iterdir()) - before if path.name.startswith(f"{name}-"))
    return _result(name, took, text, f"{_why(text, code)}: {', '.join(kept) or log}" if code or kept else "")


def _memory() -> str | None:
    """A folder in memory, if there is one: some targets read files."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _why(text: str, code: int | str) -> str:
    """The line of the log with the error."""
    match = re.search(r"=== Uncaught Python exception: ===\n(.*)", text) or re.search(r"ERROR: libFuzzer: (.*)", text)
    return match[1][:300] if match else f"ended with {code}"


def _result(name: str, seconds: float, text: str, escape: str) -> Result:
    """The last figures that libFuzzer printed."""
    status = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)/", text) or [("0", "0", "0")]
    coverage, features, inputs = map(int, status[-1])
    stats = {key: int(value) for key, value in re.findall(r"stat::(\w+): +(\d+)", text)}
    executed = stats.get("number_of_executed_units", 0)
    peak = stats.get("peak_rss_mb", 0)
    return Result(name, round(seconds, 1), executed, coverage, features, inputs, peak, escape)


def table(results: Sequence[Result]) -> list[str]:
    """The results as a Markdown table."""
    lines = ["| target | executions | seconds | coverage | features | inputs kept | memory | escapes |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---|")
    for result in results:
        figures = (result.executions, round(result.seconds), result.coverage, result.features, result.inputs)
        cells = [result.target, *(f"{figure:,}" for figure in figures), f"{result.peak} MiB", result.escape or "none"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())

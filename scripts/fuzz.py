#!/usr/bin/env python3
"""Fuzzes what reads untrusted bytes, guided by coverage, and prints a table; ends with 1 where an input escaped.

An escape is any exception but the program's own kind, more time or memory than one input may take, code that was run,
anything written. Inputs are kept in .fuzz/, and the next run goes on from them; what escaped is kept there too.
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

from fuzzing.targets import TARGETS  # noqa: E402 (from the tests)

# Seconds beyond those asked for: start, and the inputs there are.
_GRACE = 120


class Result(NamedTuple):
    """What became of one target: `features` are libFuzzer's count of what the inputs reached, `escape` tells of one."""

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
    parser.add_argument("--seconds", type=int, default=1800, help="for each target (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="targets at once (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of chance; 0 takes another each time (default)")
    parser.add_argument("--folder", type=Path, default=ROOT / ".fuzz", help="inputs and logs (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table here too")
    args = parser.parse_args()
    names = list(TARGETS) if "all" in args.target else args.target
    folder = args.folder.resolve()
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores; making the first inputs ...", flush=True)
    seeds(folder / "seeds")
    results = run_all(names, folder, args.seconds, args.jobs, args.seed)
    print("\n".join(table(results)))
    if args.json:
        args.json.write_text(json.dumps([result._asdict() for result in results], indent=1) + "\n")
    return int(any(result.escape for result in results))


def seeds(folder: Path) -> None:
    """The inputs to begin with, in a folder for each target."""
    subprocess.run([sys.executable, "-W", "ignore", FUZZING / "seeds.py", folder], check=True)


def run_all(names: Sequence[str], folder: Path, seconds: int, jobs: int, seed: int) -> list[Result]:
    """Fuzz the targets, `jobs` at a time."""

    def one(name: str) -> Result:
        result = fuzz(name, folder, seconds, seed)
        print(f"{name}: {result.escape or 'no escape'}", flush=True)
        return result

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, names))


def fuzz(name: str, folder: Path, seconds: int, seed: int) -> Result:
    """Fuzz one target in a process of its own."""
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
            code = "no end"
    took, text = time.monotonic() - began, log.read_text(errors="replace")
    kept = sorted(path.name for path in set(escapes.iterdir()) - before if path.name.startswith(f"{name}-"))
    return _result(name, took, text, f"{_why(text, code)}: {', '.join(kept) or log}" if code or kept else "")


def _memory() -> str | None:
    """A folder in memory, where there is one: an input is a file for some targets."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _why(text: str, code: int | str) -> str:
    """The line that says what went wrong."""
    told = re.search(r"=== Uncaught Python exception: ===\n(.*)", text) or re.search(r"ERROR: libFuzzer: (.*)", text)
    return told[1][:300] if told else f"ended with {code}"


def _result(name: str, seconds: float, text: str, escape: str) -> Result:
    """The figures that libFuzzer printed last."""
    status = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)/", text) or [("0", "0", "0")]
    coverage, features, inputs = map(int, status[-1])
    stats = {key: int(value) for key, value in re.findall(r"stat::(\w+): +(\d+)", text)}
    executed = stats.get("number_of_executed_units", 0)
    peak = stats.get("peak_rss_mb", 0)
    return Result(name, round(seconds, 1), executed, coverage, features, inputs, peak, escape)


def table(results: Sequence[Result]) -> list[str]:
    """The figures as Markdown."""
    lines = ["| target | executions | seconds | coverage | features | inputs kept | memory | escapes |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---|")
    for result in results:
        figures = (result.executions, round(result.seconds), result.coverage, result.features, result.inputs)
        cells = [result.target, *(f"{figure:,}" for figure in figures), f"{result.peak} MiB", result.escape or "none"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())

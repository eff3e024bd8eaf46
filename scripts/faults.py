#!/usr/bin/env python3
"""Causes faults in runs of the program, and prints a table of the outcomes.

After each fault every file is old or new, and the next run leaves the new output and nothing else. Exit code 1 where
that did not hold. Needs the project, Linux, root for some parts, and strace for `calls`; the table names what was not
run.

    scripts/faults.py --only kills,calls --kills 2000
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import faulting  # noqa: E402
from faulting import Scene  # noqa: E402

KINDS = {"file": "a file", "record": "a file, its record and model card", "folder": "a folder"}


class Part(NamedTuple):
    """A kind of fault: its name in the table, its cases, how many for each kind of output, and how many sources."""

    name: str
    cases: Callable[[Scene, int, int], list[faulting.Case]]
    times: int
    sources: int = 2


PARTS = {
    "kills": Part("SIGKILL at a random moment", faulting.kills, 0),
    "calls": Part("each system call failed, or the process killed at it", faulting.failing_calls, 0),
    "signals": Part("SIGINT and SIGTERM at a random moment", faulting.signals, 40),
    "disks": Part("full disks", faulting.full_disks, 40),
    "limits": Part("limits on the size of files", faulting.limits, 20),
    "permissions": Part("folders of another user", faulting.permissions, 8),
    "races": Part("eight runs at once", faulting.races, 20, sources=8),
    "inputs": Part("sources that change while they are read", faulting.changing_inputs, 20),
}


class Task(NamedTuple):
    part: str
    kind: str
    share: int
    shares: int
    times: int
    seed: int


class Outcome(NamedTuple):
    task: Task
    counts: Counter[str]
    violations: list[str]
    skipped: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), metavar="PARTS", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--kinds", default=",".join(KINDS), metavar="KINDS", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--kills", type=int, default=2_000, help="of all kinds together (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes (default %(default)s)")
    args = parser.parse_args()
    began = time.monotonic()
    outcomes = []
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for outcome in pool.imap_unordered(perform, list_tasks(args)):
            outcomes.append(outcome)
            for violation in outcome.violations:
                print(f"VIOLATION: {outcome.task.part}, {outcome.task.kind}: {violation}", file=sys.stderr, flush=True)
    violations = sum(len(outcome.violations) for outcome in outcomes)
    total = sum(outcome.counts.total() for outcome in outcomes) + violations
    print("\n".join(table(outcomes, args.only.split(","), args.kinds.split(","))))
    print(
        f"\n{total:,} faults, {violations} violations; {time.monotonic() - began:,.0f} s with {args.jobs} processes, "
        f"seed {args.seed}, Python {platform.python_version()}, {platform.system()} {platform.release()}."
    )
    return 1 if violations else 0


def list_tasks(args: argparse.Namespace) -> list[Task]:
    kinds = args.kinds.split(",")
    tasks: list[Task] = []
    for part in args.only.split(","):
        # A share has a scene of its own, which takes seconds to set up.
        shares = max(1, args.jobs * 4 // len(kinds)) if part in ("kills", "calls") else 1
        count = args.kills // len(kinds) if part == "kills" else PARTS[part].times
        for kind in kinds:
            for share in range(shares):
                seed = args.seed * 1_000_003 + len(tasks)
                tasks.append(Task(part, kind, share, shares, count // shares + (share < count % shares), seed))
    return tasks


def perform(task: Task) -> Outcome:
    counts, violations, part = Counter[str](), list[str](), PARTS[task.part]
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    # Another user must be able to enter.
    folder.chmod(0o755)
    try:
        with Scene(task.kind, folder / "scene", part.sources) as scene:
            numbers = (task.share, task.shares) if task.part == "calls" else (task.times, task.seed)
            for case in part.cases(scene, *numbers):
                try:
                    counts[case()] += 1
                except (faulting.ViolationError, subprocess.TimeoutExpired) as violation:
                    violations.append(str(violation))
    except (RuntimeError, FileNotFoundError) as error:
        return Outcome(task, counts, violations, str(error).splitlines()[0])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Outcome(task, counts, violations, "")


def table(outcomes: list[Outcome], parts: list[str], kinds: list[str]) -> list[str]:
    """Return a Markdown table with a row for each part and kind of output."""
    lines = ["| fault | output | runs | outcomes | violations |", "|---|---|---:|---|---:|"]
    for part in parts:
        for kind in kinds:
            mine = [outcome for outcome in outcomes if (outcome.task.part, outcome.task.kind) == (part, kind)]
            counts: Counter[str] = sum((outcome.counts for outcome in mine), Counter())
            violations = sum(len(outcome.violations) for outcome in mine)
            skipped = next((f"not run: {outcome.skipped}" for outcome in mine if outcome.skipped), "")
            words = skipped or "; ".join(f"{what}: {count:,}" for what, count in sorted(counts.items()))
            cells = [PARTS[part].name, KINDS[kind], f"{counts.total() + violations:,}", words, str(violations)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())

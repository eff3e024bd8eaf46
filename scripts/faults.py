#!/usr/bin/env python3
"""Does every fault that we could think of to runs of the program, and prints a table of what came of it.

After each fault the output is what it was or what it should become, whole; nothing is left that the next run does not
clear; and the next run succeeds. Exit code 1 where that did not hold. Needs the project and its requirements, Linux,
for some parts root, and for `calls` strace; a part that cannot be run says why.

    scripts/faults.py --jobs 16
    scripts/faults.py --only kills,races --kills 500
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import shlex
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

KINDS = {"file": "a file", "card": "a file with its card and model card", "folder": "a folder"}


class Part(NamedTuple):
    """A kind of fault: its words, how many cases of each kind of output, and how many sources it needs."""

    what: str
    cases: Callable[[Scene, int, int], list[faulting.Case]]
    times: int
    sources: int = 2


PARTS = {
    "kills": Part("SIGKILL, half aimed at the write", faulting.kills, 0),
    "calls": Part("each system call failed, or killed at", faulting.failing_calls, 0),
    "signals": Part("SIGINT and SIGTERM", faulting.signals, 200),
    "disks": Part("full disks", faulting.full_disks, 40),
    "limits": Part("limits on files' sizes", faulting.limits, 40),
    "permissions": Part("folders of another user", faulting.permissions, 8),
    "races2": Part("two runs at once", lambda scene, n, seed: faulting.races(scene, n, seed, 2), 40),
    "races8": Part("eight runs at once", faulting.races, 40, sources=8),
    "inputs": Part("inputs that change while they are read", faulting.changing_inputs, 80),
}


class Task(NamedTuple):
    part: str
    kind: str
    share: int
    shares: int
    times: int
    seed: int
    program: list[str]


class Outcome(NamedTuple):
    task: Task
    seen: Counter[str]
    violations: list[str]
    skipped: str
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), metavar="PARTS", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--kinds", default=",".join(KINDS), metavar="KINDS", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--kills", type=int, default=10_000, help="of all kinds together (default %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="times the cases of parts that are drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes (default %(default)s)")
    parser.add_argument("--program", default=shlex.join(faulting.PROGRAM), help="what runs dsocr-convert")
    args = parser.parse_args()
    tasks = list_tasks(args)
    began = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        outcomes = []
        for outcome in pool.imap_unordered(perform, tasks):
            outcomes.append(outcome)
            for violation in outcome.violations:
                print(f"VIOLATION: {outcome.task.part}, {outcome.task.kind}: {violation}", file=sys.stderr, flush=True)
    violations = sum(len(outcome.violations) for outcome in outcomes)
    total = sum(outcome.seen.total() for outcome in outcomes) + violations
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
        # What is cut into shares: one scene each, which takes a second or two to set up.
        shares = max(1, args.jobs * 4 // len(kinds)) if part in ("kills", "calls") else 1
        count = args.kills // len(kinds) if part == "kills" else max(1, int(PARTS[part].times * args.scale))
        if part in ("disks", "permissions"):
            count = PARTS[part].times
        for kind in kinds:
            for share in range(shares):
                seed = args.seed * 1_000_003 + len(tasks)
                mine = count // shares + (share < count % shares)
                tasks.append(Task(part, kind, share, shares, mine, seed, shlex.split(args.program)))
    return tasks


def perform(task: Task) -> Outcome:
    began, seen, violations = time.monotonic(), Counter[str](), list[str]()
    part = PARTS[task.part]
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    # For another user to enter.
    folder.chmod(0o755)
    try:
        scene = Scene(task.kind, folder / "scene", part.sources, task.program)
        numbers = (task.share, task.shares) if task.part == "calls" else (task.times, task.seed)
        for case in part.cases(scene, *numbers):
            try:
                seen[case()] += 1
            except (faulting.ViolationError, subprocess.TimeoutExpired) as violation:
                violations.append(str(violation))
    except (RuntimeError, FileNotFoundError) as error:
        return Outcome(task, seen, violations, str(error).splitlines()[0], time.monotonic() - began)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Outcome(task, seen, violations, "", time.monotonic() - began)


def table(outcomes: list[Outcome], parts: list[str], kinds: list[str]) -> list[str]:
    """One row a part and a kind of output, as Markdown."""
    lines = ["| fault | output | runs | what came of it | violations |", "|---|---|---:|---|---:|"]
    for part in parts:
        for kind in kinds:
            mine = [outcome for outcome in outcomes if (outcome.task.part, outcome.task.kind) == (part, kind)]
            seen: Counter[str] = sum((outcome.seen for outcome in mine), Counter())
            violations = sum(len(outcome.violations) for outcome in mine)
            skipped = next((outcome.skipped for outcome in mine if outcome.skipped), "")
            words = "; ".join(f"{what}: {count:,}" for what, count in sorted(seen.items()))
            said = f"not run: {skipped}" if skipped else words
            cells = [PARTS[part].what, KINDS[kind], f"{seen.total() + violations:,}", said, str(violations)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Verifies correct conversions of random layouts, sizes and weights, and prints the largest error over the tolerance.

Layout, sizes, file type and precision follow from a seed. Weights have the statistics of untrained and of trained
encoders: heavy tails, outlier channels, massive activations, sharp attention, large positions. Exit code 1 if a
verification fails.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

if TYPE_CHECKING:
    from correct import Result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="conversions to verify (default %(default)s)")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="default %(default)s")
    parser.add_argument("--size", choices=["tiny", "small", "true"], default="tiny", help="default %(default)s")
    parser.add_argument("--statistics", default="", help="of all weights, such as trained (default: drawn)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: drawn)")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default %(default)s)")
    args = parser.parse_args()
    options = {"device": args.device, "statistics": args.statistics} | ({"dtype": args.dtype} if args.dtype else {})
    verify = functools.partial(verify_one, size=args.size, options=options)
    results = []
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for result in pool.imap_unordered(verify, range(args.first, args.first + args.rounds)):
            if result is None:
                continue
            results.append(result)
            print(f"seed {result.number}: {result.ratio:.2f} {'; '.join(result.problems)}", file=sys.stderr, flush=True)
    print_table(results)
    failed = [result for result in results if result.problems]
    for result in failed:
        print(f"seed {result.number}, {result.layout}, {result.statistics}: {'; '.join(result.problems)}")
    return 1 if failed else 0


def verify_one(number: int, size: str, options: dict[str, Any]) -> Result | None:
    """None if a library of the layout is not installed."""
    import correct
    import pytest
    import torch

    if size != "true":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return correct.run(number, Path(folder), size, **options)[0]
        except pytest.skip.Exception as skipped:
            print(f"seed {number}: {skipped}", file=sys.stderr, flush=True)
            return None


def print_table(results: Iterable[Result]) -> None:
    """One line for each kind of weights and each precision."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.statistics, result.precision), []).append(result)
    print("| weights | precision | runs | verified | partly verified | failed | largest error / tolerance |")
    print("|---|---|---|---|---|---|---|")
    for (statistics, precision), group in sorted(groups.items()):
        verified = sum(result.verdict == "verified" for result in group)
        failed = sum(bool(result.problems) for result in group)
        counts = f"{len(group)} | {verified} | {len(group) - verified - failed} | {failed}"
        print(f"| {statistics} | {precision} | {counts} | {max(result.ratio for result in group):.2f} |")


if __name__ == "__main__":
    sys.exit(main())

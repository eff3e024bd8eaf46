#!/usr/bin/env python3
"""Measures what scripts/bench does not: diff beside cmp, loading beside load_file, routes beside conversions, derive.

Pairs in turns, medians of their ratios, whole processes except for loading, everything in the page cache. WORK holds
(or is given) the seeded checkpoints of make_checkpoints.py; outputs go to a folder in it and are removed.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIFF_BAR, DERIVE_BAR = 2.5, 30.0
SAM, CLIP = "sam_vit_b_01ec64.pth", "clip-vit-large-patch14/pytorch_model.bin"

# Prints the seconds that loading takes, and loading and reading every byte.
LOAD = """
import sys, time, warnings
warnings.simplefilter("ignore")
import torch, safetensors.torch, converter
torch.set_num_threads(1)
load = {"ours": lambda: converter.load(sys.argv[2], "clip"), "theirs": lambda: safetensors.torch.load_file(sys.argv[2])}
load[sys.argv[1]]()
begin = time.perf_counter()
tensors = load[sys.argv[1]]()
loaded = time.perf_counter()
for tensor in tensors.values():
    torch.aminmax(tensor)
print(loaded - begin, time.perf_counter() - begin)
"""

# Onto a GPU, in pairs: prints the seconds of both, after the tensors were compared.
GPU = """
import sys, time
import torch, safetensors.torch, converter
pairs, source, converted = int(sys.argv[1]), *sys.argv[2:]
def timed(load):
    torch.cuda.synchronize()
    begin = time.perf_counter()
    tensors = load()
    torch.cuda.synchronize()
    return time.perf_counter() - begin, tensors
ours = lambda: converter.load(source, "clip", device="cuda")
theirs = lambda: safetensors.torch.load_file(converted, device="cuda")
found, expected = ours(), theirs()
assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
assert all(tensor.is_cuda for tensor in found.values())
del found, expected
for _ in range(pairs):
    print(timed(ours)[0], timed(theirs)[0])
"""


def seconds(command: list[str | Path]) -> float:
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begin


def loading(who: str, path: Path, index: int) -> float:
    done = subprocess.run([sys.executable, "-c", LOAD, who, path], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[index])


def on_gpu(what: str, pairs: int, source: Path, converted: Path) -> None:
    """One line of the table: loading a source onto a GPU beside load_file of what it was converted into."""
    command: list[str | Path] = [sys.executable, "-c", GPU, str(pairs), source, converted]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    report(what, [(float(ours), float(theirs)) for ours, theirs in map(str.split, lines)], None)


def compare(title: str, pairs: int, ours: Callable[[], float], theirs: Callable[[], float], bar: float | None) -> bool:
    """One line of the table, from pairs of calls; whether the bar was kept."""
    ours(), theirs()
    return report(title, [(ours(), theirs()) for _ in range(pairs)], bar)


def report(title: str, rows: list[tuple[float, float]], bar: float | None) -> bool:
    ratios = [a / b for a, b in rows]
    low, _, high = statistics.quantiles(ratios, n=4) if len(rows) > 1 else (ratios[0],) * 3
    ratio = statistics.median(ratios)
    kept = bar is None or ratio <= bar
    verdict = "" if bar is None else f"{bar:g} {'pass' if kept else 'OVER'}"
    a, b = (statistics.median(side) for side in zip(*rows, strict=True))
    print(f"| {title} | {a:.3f} | {b:.3f} | {ratio:.2f} ({low:.2f} to {high:.2f}) | {verdict} |", flush=True)
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("--pairs", type=int, default=7, help="default %(default)s")
    parser.add_argument("--gpu", action="store_true", help="measure loading onto a GPU alone")
    args = parser.parse_args()
    make = [sys.executable, ROOT / "scripts" / "make_checkpoints.py", "--only", "sam-b,clip-bin", args.work]
    subprocess.run(make, check=True)
    program = shutil.which("dsocr-convert", path=Path(sys.executable).parent) or shutil.which("dsocr-convert")
    if program is None:
        sys.exit("dsocr-convert is not installed")
    sam, clip = args.work / SAM, args.work / CLIP
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        out = Path(folder)

        def convert(family: str, source: Path, *options: str) -> Callable[[], float]:
            return lambda: seconds(
                [program, family, source, "-q", "-f", *options, "-o", out / f"{'-'.join(options)}.safetensors"]
            )

        a, b = out / "a.safetensors", out / "b.safetensors"
        for path in (a, b):
            seconds([program, "clip", clip, "-q", "-o", path])
        print("| what | seconds | beside it | ratio (quartiles) | bar |\n|---|---|---|---|---|")
        if args.gpu:
            on_gpu("CLIP-L's .bin onto a GPU, load_file of the converted file", args.pairs, clip, a)
            on_gpu("the converted file onto a GPU, load_file", args.pairs, a, a)
            return 0
        kept = [
            compare(
                "diff of two equal CLIP-L files, cmp",
                args.pairs,
                lambda: seconds([program, "diff", a, b, "-q"]),
                lambda: seconds(["cmp", a, b]),
                DIFF_BAR,
            )
        ]
        for index, what in enumerate(("load", "load and read")):
            title = f"{what} a converted CLIP-L, load_file"
            compare(title, args.pairs, partial(loading, "ours", a, index), partial(loading, "theirs", a, index), None)
        compare("SAM-base to sam-hf, to the DeepEncoder", args.pairs, convert("sam", sam, "--to", "sam-hf"),
                convert("sam", sam), None)  # fmt: skip
        compare("CLIP-L to clip-timm, to the DeepEncoder", args.pairs, convert("clip", clip, "--to", "clip-timm"),
                convert("clip", clip), None)  # fmt: skip
        derived = statistics.median(
            seconds([program, "mapping", "derive", clip, a, "-q", "-f", "-o", out / "my.yaml"]) for _ in range(3)
        )
        kept.append(derived <= DERIVE_BAR)
        verdict = "pass" if kept[-1] else "OVER"
        print(f"| derive, two true-size CLIP-L | {derived:.1f} | | | {DERIVE_BAR:g} s {verdict} |")
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())

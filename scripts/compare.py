#!/usr/bin/env python3
"""Measures conversions beside what else makes the same tensors: the usual script, transformers' converter, timm's.

    python scripts/compare.py .quickstart --pairs 5 [--transformers4 PYTHON]

Each pair is one conversion and the other way, in turns, as whole processes from start to written file; then their
outputs are compared, tensor by tensor, bit by bit. transformers had a converter for SAM up to version 4, which is run
by the PYTHON of an environment that has one, without the pictures from the web that it checks itself with.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent

TRANSFORMERS = """
import sys, torch
from transformers import SamModel
from transformers.models.sam.convert_sam_to_hf import get_config, replace_keys
model = SamModel(get_config("sam_vit_b"))
model.load_state_dict(replace_keys(torch.load(sys.argv[1], map_location="cpu", weights_only=True)))
model.save_pretrained(sys.argv[2])
"""
TIMM = """
import sys, timm, torch
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
model = timm.create_model("vit_large_patch14_clip_quickgelu_224", num_classes=0)
found = checkpoint_filter_fn(torch.load(sys.argv[1], map_location="cpu", weights_only=True), model)
# Its name for CLIP's projection, which a model without classes has no place for.
model.load_state_dict({name: tensor for name, tensor in found.items() if not name.startswith("head.")})
save_file(model.state_dict(), sys.argv[2])
"""


class Way(NamedTuple):
    """One conversion and who else does it; SOURCE and OUT stand in the commands for themselves."""

    title: str
    source: str
    ours: tuple[str, ...]
    other: str
    theirs: tuple[str, ...]
    out: str


class Run(NamedTuple):
    seconds: float
    peak_mib: float


def ways(python4: str | None) -> list[Way]:
    usual = (sys.executable, str(ROOT / "scripts" / "usual_script.py"))
    sam, clip = "sam_vit_b_01ec64.pth", "clip-vit-large-patch14/pytorch_model.bin"
    found = [
        Way("SAM-base, Meta's to the DeepEncoder's", sam, ("sam",), "usual script", (*usual, "sam"), "safetensors"),
        Way(
            "CLIP-L, transformers' to the DeepEncoder's",
            clip,
            ("clip",),
            "usual script",
            (*usual, "clip"),
            "safetensors",
        ),
        Way(
            *("CLIP-L, OpenAI's to timm's", "openai.pth", ("clip", "--to", "clip-timm")),
            *("timm", (sys.executable, "-c", TIMM), "safetensors"),
        ),
    ]
    if python4:
        folder = ("sam", "--to", "sam-hf", "--whole")
        found.append(
            Way(
                *("SAM-base, Meta's to a folder for transformers", sam, folder),
                *("transformers 4", (python4, "-c", TRANSFORMERS), "folder"),
            )
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="where scripts/make_checkpoints.py wrote sam-b and clip-bin")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--transformers4", metavar="PYTHON", help="the Python of an environment with transformers 4")
    options = parser.parse_args()
    print("| conversion | seconds | MiB | other way | seconds | MiB | times | same tensors |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=options.work) as made:
        folder = Path(made)
        # OpenAI's names, which timm reads; transformers' file has the same tensors under others.
        openai = (
            "clip",
            str(options.work / "clip-vit-large-patch14"),
            "--to",
            "clip-openai",
            "-o",
            f"{folder}/openai.pth",
        )
        subprocess.run([BIN / "dsocr-convert", *openai, "--quiet"], check=True, stdout=subprocess.DEVNULL)
        for way in ways(options.transformers4):
            print(measured(way, options.work, folder, options.pairs), flush=True)
    return 0


def measured(way: Way, work: Path, folder: Path, pairs: int) -> str:
    """The line of the table."""
    source = str((folder if way.source == "openai.pth" else work) / way.source)
    suffix = "" if way.out == "folder" else f".{way.out}"
    mine, other = folder / f"mine{suffix}", folder / f"other{suffix}"
    convert = (str(BIN / "dsocr-convert"), way.ours[0], source, *way.ours[1:], "-o", str(mine) + "/" * (not suffix))
    ours: list[Run] = []
    theirs: list[Run] = []
    for _ in range(pairs):
        ours.append(run((*convert, "--force", "--quiet")))
        theirs.append(run((*way.theirs, source, str(other))))
    same = subprocess.run([BIN / "dsocr-convert", "diff", mine, other, "--quiet"], capture_output=True).returncode == 0
    ratio = statistics.median(b.seconds / a.seconds for a, b in zip(ours, theirs, strict=True))
    cells = [way.title, *figures(ours), way.other, *figures(theirs), f"{ratio:.1f}", "yes" if same else "NO"]
    return f"| {' | '.join(cells)} |"


def figures(runs: Sequence[Run]) -> tuple[str, str]:
    return f"{statistics.median(r.seconds for r in runs):.2f}", f"{max(r.peak_mib for r in runs):,.0f}"


def run(command: Sequence[str]) -> Run:
    """One process, from start to end, and the largest memory that it had."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert child.stderr is not None
    said = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)[:200]}: exit code {child.returncode}\n{said.decode()[-2000:]}")
    return Run(seconds, usage.ru_maxrss / 1024)


if __name__ == "__main__":
    sys.exit(main())

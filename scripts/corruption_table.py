#!/usr/bin/env python3
"""Runs the catalogue of corruptions on tiny encoders, and writes docs/verification/corruptions.md.

With `--gpu gpu.json`, from verify_on_gpu.py, the table also has the results at true size.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

TABLE = ROOT / "docs" / "verification" / "corruptions.md"
# The families, and the kind of checkpoint that has more of the same family.
FAMILIES = {"sam": ("SAM", "compressor"), "clip": ("CLIP", ""), "qwen2": ("Qwen2", "queries")}
TITLES = {
    "weights": (
        "Wrong weights",
        "Tensors changed in a correct conversion. Names and shapes stay right, so structure catches few of them.",
    ),
    "file": ("Wrong files", "Names, types, bytes, or a source that the file was not made from."),
    "architecture": (
        "Wrong encoders",
        "The file is right; a mistake was patched into our encoder for one run. Only comparing outputs can show it.",
    ),
    "function": (
        "Wrong configs",
        "Every weight is right. The source's config states another function than the DeepEncoder's, or the config of a "
        "converted folder was edited. No tensor shows activation, heads and epsilon.",
    ),
}
Rows = dict[tuple[str, str], dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=TABLE, help="default %(default)s")
    parser.add_argument("--gpu", type=Path, metavar="GPU_JSON", help="gpu.json of verify_on_gpu.py")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")
    parser.add_argument("--only", default="", metavar="NAMES", help="corruptions to run (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default %(default)s)")
    args = parser.parse_args()
    rows = run_all([name for name in args.only.split(",") if name], args.jobs)
    if args.json:
        args.json.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
    gpu = json.loads(args.gpu.read_text()) if args.gpu else None
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(document(rows, gpu)) + "\n")
    missed = [f"{name} ({family})" for (name, family), row in rows.items() if row["ok"]]
    print(f"{args.out}: {len(rows)} runs, {len(missed)} missed {' '.join(missed)}")
    return 1 if missed else 0


# Runs -----------------------------------------------------------------------------------------------------------------


def run_all(only: list[str], jobs: int) -> Rows:
    if jobs == 1:
        return {(row["name"], row["family"]): row for row in run_part(only, 0, 1)}
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        parts = pool.starmap(run_part, [(only, index, jobs) for index in range(jobs)])
    return {(row["name"], row["family"]): row for part in parts for row in part}


def run_part(only: list[str], index: int, count: int) -> list[dict[str, Any]]:
    import corruptions
    import torch

    torch.set_num_threads(1)
    cases = [(c, kind) for c, kind in corruptions.cases() if not only or c.name in only]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subjects = corruptions.tiny_subjects(folder)
        rows = [corruptions.run(c, subjects[kind], folder, device="cpu")[0] for c, kind in cases[index::count]]
    return corruptions.as_json(rows)


# The page -------------------------------------------------------------------------------------------------------------


def document(rows: Rows, gpu: dict[str, Any] | None) -> Iterator[str]:
    true: Rows = {}
    if gpu is not None:
        true = {(row["name"], row["family"]): row for row in gpu["corruptions"]["rows"]}
        true = {key: row for key, row in true.items() if row["name"] != "none" and "error" not in row}
    caught = sum(not row["ok"] for row in rows.values())
    yield "# What the verification catches"
    yield ""
    yield (
        f"{len({name for name, _ in rows})} ways to get a conversion wrong (`tests/corruptions.py`), each applied to a "
        f"correct conversion of SAM, CLIP or Qwen2, or of several: {len(rows)} runs, {caught} caught. "
        "`scripts/corruption_table.py` writes this page. `tests/test_corruptions.py` repeats the runs, and checks that "
        "correct conversions of every layout and of random sizes pass."
    )
    yield ""
    yield (
        "S, B, O: caught by structure, bytes, outputs. F: outputs differ from the source's own function, so the result "
        "is partly verified (structure, bytes). The figure is the largest error at any probe (F: at the output) "
        "relative to its tolerance, which is 3 times the noise floor measured in the same run: above 1 fails. No "
        "figure: the shapes fit no encoder, or values are not finite. Refused: the file cannot be read at all."
    )
    yield ""
    yield from machines(gpu, true)
    for kind, (title, text) in TITLES.items():
        chosen = {key: row for key, row in rows.items() if row["kind"] == kind}
        if chosen:
            yield from section(title, text, chosen, true)
    quiet = sorted({row["name"] for row in rows.values() if row["quiet"]})
    yield "## What no output shows"
    yield ""
    yield ", ".join(f"`{name}`" for name in quiet) + (
        ": the outputs stay within the noise of float32, or do not change at all (the softmax cancels k's bias; the "
        "class embedding and its position are only ever added). Only bytes catch them."
    )


def machines(gpu: dict[str, Any] | None, true: Rows) -> Iterator[str]:
    import torch
    import transformers

    yield (
        f"Tiny: twelve layers of 48 (SAM) and 128 (CLIP) channels, and four of 256 (Qwen2), on a CPU, torch "
        f"{torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}."
    )
    if gpu is not None:
        machine, not_run = gpu["environment"], len(gpu["corruptions"]["not_run"])
        caught = sum(bool(caught_by(row) or row.get("refused")) for row in true.values())
        yield (
            f"True size: {_encoders(true)} with seeded weights on one {machine.get('gpu', 'CPU')}, "
            f"torch {machine['libraries']['torch']}, transformers {machine['libraries']['transformers']}; "
            f"{len(true)} runs, {caught} caught" + (f", {not_run} not run for lack of time." if not_run else ".")
        )
    yield ""


def _encoders(rows: Rows) -> str:
    models = {"sam": "SAM-base", "clip": "CLIP-L", "qwen2": "Qwen2-0.5B"}
    return ", ".join(model for family, model in models.items() if any(family == row for _, row in rows))


def section(title: str, text: str, rows: Rows, true: Rows) -> Iterator[str]:
    yield f"## {title}"
    yield ""
    yield text
    yield ""
    tables = [(rows, family, title) for family, (title, _) in FAMILIES.items()]
    tables += [(true, family, f"{title}, true size") for family, (title, _) in FAMILIES.items() if _has(true, family)]
    tables = [(table, family, title) for table, family, title in tables if _has(rows, family)]
    columns = [title for _, _, title in tables]
    yield f"| name | mistake | {' | '.join(columns)} |"
    yield "|---" * (2 + len(columns)) + "|"
    for name in dict.fromkeys(sorted_names(rows)):
        cells = [cell(table, name, family) for table, family, _ in tables]
        what = next(row["what"] for (other, _), row in rows.items() if other == name)
        yield f"| `{name}` | {what} | {' | '.join(cells)} |"
    yield ""


def sorted_names(rows: Rows) -> list[str]:
    """In the catalogue's order."""
    import corruptions

    names = {name for name, _ in rows}
    return [corruption.name for corruption in corruptions.CATALOGUE if corruption.name in names]


def _has(rows: Rows, family: str) -> bool:
    return any(kind in (family, FAMILIES[family][1]) for _, kind in rows)


def cell(rows: Rows, name: str, family: str) -> str:
    row = rows.get((name, family)) or rows.get((name, FAMILIES[family][1]))
    if row is None:
        return ""
    if row.get("refused"):
        return "refused"
    groups = caught_by(row)
    if not groups:
        return "**missed**"
    letters, ratio = " ".join(group[0].upper() for group in groups), row.get("ratio")
    return f"{letters} {figure(ratio)}" if isinstance(ratio, float) else letters


def caught_by(row: dict[str, Any]) -> list[str]:
    """The groups of checks that failed; docs/gpu.json lists them, a script's own results have a flag for each."""
    flags: dict[str, bool] = row.get("caught", {})
    return row.get("caught_by") or [group for group, caught in flags.items() if caught]


def figure(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.1f}"


if __name__ == "__main__":
    sys.exit(main())

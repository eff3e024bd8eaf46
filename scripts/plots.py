#!/usr/bin/env python3
"""Draws what scripts/bench measured: plots.py FILE.json OUT_DIR, or scripts/bench --plots OUT_DIR.

Three pictures: conversions beside cp, time as checkpoints grow, memory as they grow. Seconds and MiB are medians, with
their quartiles where there are pairs.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes

TITLES = {
    "sam-b": "SAM-base .pth",
    "clip-bin": "CLIP-L .bin",
    "clip-safetensors": "CLIP-L .safetensors",
    "sam-h": "SAM ViT-H .pth",
}
# From smallest to largest, one container: what grows is the checkpoint alone.
GROWTH = ("sam-b", "clip-bin", "sam-h")
# Seen on light and on dark pages alike.
INK, OURS, CP, USUAL = "#808080", "#2f81f7", "#2da44e", "#d4762c"
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "dsocr-convert",
    "axes.spines.top": False,
    "axes.spines.right": False,
    **{f"{name}color": INK for name in ("text.", "axes.edge", "axes.label", "xtick.", "ytick.")},
}
GIGABYTE, MIB = 1e9, 1 << 20


def main() -> None:
    found, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for name, draw in (("beside-cp", beside_cp), ("growth", growth), ("memory", memory)):
            figure, axes = pyplot.subplots(figsize=(7.5, 3.2), layout="constrained")
            draw(axes, found)
            # Without the date: the same figures are the same file.
            figure.savefig(folder / f"{name}.svg", transparent=True, metadata={"Date": None})
            pyplot.close(figure)


def beside_cp(axes: Axes, found: dict[str, Any]) -> None:
    """Times cp, with quartiles; what was wanted as a line, and the usual script on a scale that it fits on."""
    results = found["results"]
    labels = [f"{TITLES[result['case']]}, {result['where']}" for result in results]
    heights = range(len(results), 0, -1)
    for height, result in zip(heights, results, strict=True):
        ratios = sorted(ours / cp for ours, cp in result["pairs"])
        low, middle, high = quartiles(ratios)
        axes.plot([low, high], [height, height], color=OURS, linewidth=3, solid_capstyle="round", alpha=0.45)
        axes.plot(middle, height, "o", color=OURS, label="dsocr-convert, quartiles" if height == 1 else None)
        bar = found["bars"][result["case"]][result["where"]]
        axes.plot(bar, height, "|", color=INK, markersize=14, label="wanted: left of it" if height == 1 else None)
        if result["usual"]:
            cp = statistics.median(cp for _, cp in result["pairs"])
            usual = statistics.median(run["seconds"] for run in result["usual"]) / cp
            axes.plot(usual, height, "D", color=USUAL, label="the usual script" if height == 1 else None)
    axes.axvline(1, color=CP, linewidth=1, label="cp")
    axes.set_xscale("log")
    axes.set_xticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.set_yticks(list(heights), labels)
    axes.set_xlabel("seconds, times those of cp (log scale)")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.4, 1.2), ncols=4, fontsize=9)


def growth(axes: Axes, found: dict[str, Any]) -> None:
    """Seconds by bytes of output, from SAM-base to ViT-H."""
    results = grown(found)
    sizes = [result["output_bytes"] / GIGABYTE for result in results]
    lines(axes, sizes, [[ours for ours, _ in result["pairs"]] for result in results], OURS, "dsocr-convert")
    lines(axes, sizes, [[cp for _, cp in result["pairs"]] for result in results], CP, "cp")
    if all(result["usual"] for result in results):
        usual = [[run["seconds"] for run in result["usual"]] for result in results]
        lines(axes, sizes, usual, USUAL, "the usual script")
    axes.set_ylabel(f"seconds ({results[0]['where']})")
    finish(axes, results)


def memory(axes: Axes, found: dict[str, Any]) -> None:
    """Peak MiB by bytes of output."""
    results = grown(found)
    sizes = [result["output_bytes"] / GIGABYTE for result in results]
    lines(axes, sizes, [result["peaks_mib"] for result in results], OURS, "dsocr-convert")
    if all(result["usual"] for result in results):
        usual = [[run["peak_mib"] for run in result["usual"]] for result in results]
        lines(axes, sizes, usual, USUAL, "the usual script")
    axes.set_ylabel("peak memory, MiB")
    finish(axes, results)


def grown(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of the growing cases, on the disk if that was measured."""
    where = "disk" if any(result["where"] == "disk" for result in found["results"]) else "tmpfs"
    return [
        result
        for case in GROWTH
        for result in found["results"]
        if (result["case"], result["where"]) == (case, where)
    ]  # fmt: skip


def lines(axes: Axes, sizes: list[float], values: list[list[float]], colour: str, label: str) -> None:
    spread = [quartiles(sorted(some)) for some in values]
    axes.plot(sizes, [middle for _, middle, _ in spread], "o-", color=colour, label=label)
    axes.vlines(sizes, [low for low, _, _ in spread], [high for _, _, high in spread], color=colour, alpha=0.45)


def finish(axes: Axes, results: list[dict[str, Any]]) -> None:
    axes.set_xlabel("output, GB")
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, 1.1 * max(result["output_bytes"] for result in results) / GIGABYTE)
    for result in results:
        place = (result["output_bytes"] / GIGABYTE, 1.0)
        axes.annotate(
            TITLES[result["case"]], place, xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=9
        )
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(0.02, 0.7))


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


if __name__ == "__main__":
    main()

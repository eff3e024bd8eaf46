#!/usr/bin/env python3
"""Makes the table of what is read and written, of each layout from and to each container, out of tests that run now.

    python scripts/compatibility.py            prints it
    python scripts/compatibility.py --write    puts it into the READMEs

A cell is filled where a test converted that layout from (or to) that container, had the result compared, and passed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# By the language of the page: its headings for the groups of columns, before the containers' names.
PAGES = {
    "README.md": ("layout", "from", "to"),
    "README.zh-CN.md": ("布局", "读", "写"),
}
READS = ("torch zip", "torch legacy", "TorchScript", "safetensors", "torch shards", "safetensors shards", "GGUF")
WRITES = ("safetensors", ".pth", "folder", "GGUF")
# What only some layouts come in, or are written to: programs make no other.
ELSEWHERE = {"TorchScript", "GGUF", "folder"}
TESTS = (
    "tests/test_oracles.py",
    "tests/test_routes.py",
    "tests/test_folders.py",
    "tests/test_mlx.py",
    "tests/test_mmproj.py",
)
_MARKS = ("<!-- made by scripts/compatibility.py -->\n", "<!-- end -->\n")

Cells = set[tuple[str, str, str]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into the READMEs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", f"--junitxml={report}", *TESTS]
        done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr)
        if done.returncode:
            print("tests failed: no table is made of them", file=sys.stderr)
            return done.returncode
        cells = passed(report)
    print(table(cells, PAGES["README.md"]), end="")
    if options.write:
        for name, words in PAGES.items():
            page = ROOT / name
            page.write_text(replaced(page.read_text(encoding="utf-8"), table(cells, words)), encoding="utf-8")
    return 0


def passed(report: Path) -> Cells:
    """What the tests of a JUnit report did, by the properties they recorded: (reads or writes, layout, container)."""
    cells = set()
    for case in ElementTree.parse(report).iter("testcase"):
        if any(case.find(kind) is not None for kind in ("failure", "error", "skipped")):
            continue
        for item in case.iter("property"):
            layout, _, container = item.attrib["value"].partition("/")
            cells.add((item.attrib["name"], layout, container))
    return cells


def table(cells: Cells, words: tuple[str, str, str]) -> str:
    """The table in Markdown. Layouts are listed by name; a cell without a test is empty."""
    layout, reads, writes = words
    columns = [("reads", name) for name in READS] + [("writes", name) for name in WRITES]
    heads = [f"{reads} {name}" for name in READS] + [f"{writes} {name}" for name in WRITES]
    lines = [f"| {layout} | {' | '.join(heads)} |", f"|---|{':-:|' * len(columns)}"]
    for name in sorted({layout for _, layout, _ in cells}, key=lambda name: (name.startswith("deepencoder"), name)):
        marks = (_mark((way, name, container) in cells, container) for way, container in columns)
        lines.append(f"| `{name}` | {' | '.join(marks)} |")
    return "\n".join(lines) + "\n"


def _mark(shown: bool, container: str) -> str:
    return "✓" if shown else "·" if container in ELSEWHERE else " "


def replaced(page: str, table: str) -> str:
    """A page with the table between its marks replaced."""
    start, end = _MARKS
    pattern = re.compile(f"(?s)({re.escape(start)}\n).*?(\n{re.escape(end)})")
    assert len(pattern.findall(page)) == 1
    return pattern.sub(lambda found: found[1] + table + found[2], page)


if __name__ == "__main__":
    sys.exit(main())

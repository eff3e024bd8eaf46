"""The pages of docs/: what a script writes is current, and the commands that are shown print what the pages say."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import walkthrough

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def files_of(page: Path) -> list[tuple[int, str, str]]:
    """The files that a page has its reader write: fenced blocks that begin with `# name.ext`, each with its line."""
    text = page.read_text()
    found = re.finditer(r"^```\w+\n(# ([\w-]+\.\w+)\n.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, block.start()) + 1, block[2], block[1]) for block in found]


def follow(page: Path, folder: Path, environment: Mapping[str, str] = {}) -> int:
    """Do all that a page says, from top to bottom: write its files, run its commands; the number of commands."""
    files, told = files_of(page), walkthrough.steps(page)
    wrong = []
    for step in told:
        while files and files[0][0] < step.line:
            _, name, text = files.pop(0)
            (folder / name).write_text(text)
        wrong.append(walkthrough.differs(step, walkthrough.run(step, folder, environment)))
    assert not any(wrong), "\n".join(filter(None, wrong))
    return len(told)


def test_the_reference_of_rules_is_current() -> None:
    command = [sys.executable, ROOT / "scripts" / "reference.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_tutorial(tmp_path: Path) -> None:
    # A clone whose mappings can be added to, in the place of the one that is installed.
    package = tmp_path / "clone" / "converter"
    shutil.copytree(ROOT / "converter", package)
    shutil.copytree(ROOT / "mappings", package / "mappings")
    folder = tmp_path / "here"
    (folder / "dsocr-convert").mkdir(parents=True)
    (folder / "dsocr-convert" / "mappings").symlink_to(package / "mappings")
    assert follow(DOCS / "tutorial.md", folder, {"PYTHONPATH": str(package.parent)}) >= 20

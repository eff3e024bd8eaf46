"""Runs the commands of a Markdown page and compares their output with the page.

A command is a line of a code block that begins with `$ `; the lines up to the next one are its output. In it a line
`...` matches any lines, and `...` within a line any text. Commands run in one folder, one after another, by bash, with
stdout and stderr merged; `$ cd` is not supported. Blocks without `$ ` are ignored.
"""

from __future__ import annotations

import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

from command import inside, run

BIN = Path(sys.executable).parent
# Commands that need no shell.
_OWN_PROGRAM = re.compile(r"(dsocr-[\w\s.,:/=@-]+?)(; echo \"exit code \$\?\")?")
_PYTHON = re.compile(r"python (\w+\.py)")


class Step(NamedTuple):
    """One command, its expected output, and its line on the page."""

    line: int
    command: str
    expected: tuple[str, ...]


def steps(page: Path) -> list[Step]:
    """All commands of a page, in order."""
    found: list[Step] = []
    for block in _blocks(page.read_text(encoding="utf-8").splitlines()):
        for number, line in block:
            if line.startswith("$ "):
                found.append(Step(number, line.removeprefix("$ "), ()))
            elif found and found[-1].command.endswith("\\") and not found[-1].expected:
                found[-1] = found[-1]._replace(command=f"{found[-1].command[:-1].rstrip()} {line.strip()}")
            elif found:
                found[-1] = found[-1]._replace(expected=(*found[-1].expected, line))
    return [step._replace(expected=tuple(_without_blank_end(step.expected))) for step in found]


def _blocks(lines: list[str]) -> Iterator[list[tuple[int, str]]]:
    """Code blocks whose first line is a command: fenced ones, and those that are indented by four spaces."""
    block: list[tuple[int, str]] = []
    fence = False
    for number, line in enumerate([*lines, "end"], start=1):
        edge = line.startswith("```")
        inside = fence and not edge
        if inside or (not fence and not edge and (line.startswith("    ") or (block and not line))):
            block.append((number, line if fence else line[4:]))
        elif block:
            if block[0][1].startswith("$ "):
                yield block
            block = []
        fence ^= edge


def _without_blank_end(lines: Iterable[str]) -> list[str]:
    kept = list(lines)
    while kept and not kept[-1]:
        kept.pop()
    return kept


def differs(step: Step, printed: str) -> str:
    """A description of how the output differs from the page's; empty if it does not."""
    pattern = "".join(
        r"(?:.*\n)*?" if line == "..." else re.escape(line.rstrip()).replace(r"\.\.\.", ".*") + r" *\n"
        for line in step.expected
    )
    if re.fullmatch(pattern, printed if not printed or printed.endswith("\n") else f"{printed}\n"):
        return ""
    expected = "\n".join(step.expected)
    return f"line {step.line}: $ {step.command}\n--- the page says\n{expected}\n--- it printed\n{printed}"


def shell(command: str, folder: Path, environment: Mapping[str, str] = {}) -> subprocess.CompletedProcess[str]:
    """Run a command with our programs first in the path, and stderr merged into stdout."""
    # Wide enough that no line is folded.
    settings = {"COLUMNS": "120", "NO_COLOR": "1", "LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"}
    settings.update(environment)
    # In this process, which has imported torch already.
    if (match := _OWN_PROGRAM.fullmatch(command)) and "PYTHONPATH" not in environment:
        program, *arguments = shlex.split(match[1])
        done = run(*arguments, cwd=folder, program=program, merged=True, **settings)
        done.stdout += f"exit code {done.returncode}\n" if match[2] else ""
        return done
    if match := _PYTHON.fullmatch(command):
        with inside(folder, settings), redirect_stdout(io.StringIO()) as printed:
            runpy.run_path(match[1], run_name="__main__")
        return subprocess.CompletedProcess(command, 0, printed.getvalue())
    settings["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


def check(
    commands: list[Step],
    folder: Path,
    environment: Mapping[str, str] = {},
    *,
    files: list[tuple[int, str, str]] | None = None,
    names: Mapping[str, str] = {},
) -> None:
    """Run commands and compare their output; AssertionError with every difference.

    Before a command the files (line, name, text) above it on the page are written. `names` replaces text of the test
    machine, such as temporary paths, in the output.
    """
    wrong, written = [], 0
    for step in commands:
        for _, name, text in [file for file in files or [] if written < file[0] < step.line]:
            (folder / name).write_text(text)
        written = step.line
        printed = shell(step.command, folder, environment).stdout
        for ours, shown in names.items():
            printed = printed.replace(ours, shown)
        wrong.append(differs(step, printed))
    assert commands and not any(wrong), "\n".join(filter(None, wrong))

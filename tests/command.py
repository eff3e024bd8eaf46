"""Runs the programs as in a terminal, and imports the scripts."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from converter.cli import console


def run(
    *arguments: object, cwd: Path, program: str = "dsocr-convert", merged: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder and in this process; return its exit code and what it printed.

    With `merged`, stdout has the lines of stderr too.
    """
    app = import_module(f"converter.cli.{program.removeprefix('dsocr-')}").app
    command, out, err = [program, *map(str, arguments)], io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(out if merged else err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", command)
        for name, value in environment.items():
            patch.setenv(name, value)
        code = console.run(app)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def run_installed(
    *arguments: object, cwd: Path, program: str = "dsocr-convert", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own: hubs' clients read the environment when they are imported."""
    command = [Path(sys.executable).with_name(program), *map(str, arguments)]
    settings = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, env=settings)


def script(name: str) -> Any:
    """Import a script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "scripts"))
        return import_module(name)

"""Runs the programs as in a terminal, and imports the scripts."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from converter.cli import console

# They read the environment when they are imported.
_HUB_CLIENTS = ("huggingface_hub", "modelscope_hub", "converter.hub.huggingface", "converter.hub.modelscope")


def run(
    *arguments: object, cwd: Path, program: str = "dsocr-convert", merged: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder and in this process; return its exit code and what it printed.

    With `merged`, stdout has the lines of stderr too.
    """
    app = import_module(f"converter.cli.{program.removeprefix('dsocr-')}").app
    command, out, err = [program, *map(str, arguments)], io.StringIO(), io.StringIO()
    printed = redirect_stdout(out), redirect_stderr(out if merged else err)
    with printed[0], printed[1], inside(cwd, environment), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        code = console.run(app)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


@contextmanager
def inside(folder: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """Work in a folder, and in an environment if it is given, for which the hubs' clients are imported anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        if not environment:
            yield
            return
        patch.setattr(tempfile, "tempdir", None)
        for name, value in environment.items():
            patch.setenv(name, value)
        clients = _remove_clients()
        try:
            yield
        finally:
            _remove_clients()
            sys.modules.update(clients)


def _remove_clients() -> dict[str, ModuleType]:
    return {name: sys.modules.pop(name) for name in [*sys.modules] if name.startswith(_HUB_CLIENTS)}


def run_installed(
    *arguments: object, cwd: Path, program: str = "dsocr-convert", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    command = [Path(sys.executable).with_name(program), *map(str, arguments)]
    settings = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, env=settings)


def script(name: str) -> Any:
    """Import a script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "scripts"))
        return import_module(name)

"""Fuzzes each target for a few seconds; `scripts/fuzz.py` does the same for any time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import script
from fuzzing import seeds
from fuzzing.targets import TARGETS

pytest.importorskip("atheris")

SECONDS = 1
TESTS = str(Path(__file__).resolve().parent)
SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz")
    # Without the hostile corpus, whose files `test_hostile.py` tries one by one.
    seeds.write(path / "seeds", corpus=False)
    return path


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_escapes(name: str, folder: Path) -> None:
    result = script("fuzz").fuzz(name, folder, SECONDS, seed=6)
    assert not result.escape, (result, (folder / f"{name}.log").read_text(errors="replace")[-3000:])
    # The target ran and got past the first checks.
    assert result.executions > 20 and result.features > 10 and result.inputs > 1, result


ESCAPES = {
    "an exception": ("{}[data]", "KeyError"),
    "another program": ("os.system('true')", "Escape: os.system"),
    "a file written": ("open('escaped', 'w')", "Escape: open"),
    "an import": ("import this", "Escape: import"),
    "a pickle": ("pickle.loads(pickle.dumps(os.system))", "Escape: pickle.find_class"),
    "code": ("eval('1')", "Escape: "),
    "hidden": ("with contextlib.suppress(BaseException): os.system('true')", "Escape: os.system"),
    "a long message": ("raise DsocrError('x\\n' * 20)", "Escape: a message of 20 lines"),
    "memory": ("bytearray(1 << 30)", "MemoryError"),
    "time": ("[sum(range(1000)) for _ in range(10000)]", "Escape: 0."),
}


@pytest.mark.parametrize("name", ESCAPES)
def test_escapes_are_detected(name: str, tmp_path: Path) -> None:
    """The guard detects a target that does something forbidden."""
    statement, words = ESCAPES[name]
    lines = [
        "import contextlib, os, pickle, warnings",
        "from converter.errors import DsocrError",
        "from fuzzing import harness",
        "harness.SECONDS = 0.05",
        "harness._limit_memory()",
        f"def target(data):\n    {statement}",
        "harness.Guard().run(target, b'input')",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": TESTS}, capture_output=True, text=True
    )
    assert done.returncode and words in done.stderr.splitlines()[-1], done.stderr
    assert not list(tmp_path.iterdir())


def test_what_readers_do_is_no_escape(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    lines = [
        "from pathlib import Path",
        "from converter.errors import ContainerError",
        "from fuzzing import harness",
        "def target(path):",
        "    path.read_bytes()",
        "    raise ContainerError('a refusal')",
        "harness.Guard().run(target, Path('file'))",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": TESTS}, check=True)

"""Runs the program on hostile and unusual inputs: the former are refused, the latter converted exactly.

The inputs are in the package `hostile`, one module a kind. Every case is a run of the program in a process of its own.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
from hostile import archives, contents, dcp, ggufs, mappings, pickles, records, shards, tensorfiles, torchscript
from hostile.case import Accepted, Case, Refused, State, marker
from hostile.program import Done, run
from memory import raw

MODULES = (archives, contents, dcp, ggufs, mappings, pickles, records, shards, tensorfiles, torchscript)
CASES: list[Case] = [case for module in MODULES for case in module.CASES]

# The program takes 30 MiB and 0.2 s. Conversions that compute import torch: hundreds of MiB and seconds.
MEMORY, MEMORY_COMPUTED = 128 << 20, 1 << 30
SECONDS, SECONDS_COMPUTED = 10, 60


def snapshot(folder: Path) -> dict[str, object]:
    """Metadata and contents of all files in a folder."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        stat = path.lstat()
        content: object = path.readlink() if path.is_symlink() else None
        if path.is_file() and stat.st_size < 1 << 24:
            content = path.read_bytes()
        found[str(path)] = (stat.st_mode, stat.st_size, stat.st_mtime_ns, content)
    return found


@functools.cache
def reference(command: tuple[str, ...], like: object) -> State:
    """The output of the program for plain tensors."""
    assert callable(like)
    with tempfile.TemporaryDirectory() as folder:
        state = {name: tensor.contiguous().clone() for name, tensor in like().items()}
        safetensors.torch.save_file(state, Path(folder) / "like.safetensors")
        done = run([*command, "like.safetensors", "-o", "out.safetensors"], Path(folder), SECONDS_COMPUTED)
        assert done.code == 0, done.err
        return safetensors.torch.load_file(Path(folder) / "out.safetensors")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    built = case.build(folder)
    arguments = [built] if isinstance(built, Path) else built
    before = snapshot(folder)
    computed = isinstance(case.expected, Accepted) and case.expected.computed
    limit = SECONDS_COMPUTED if computed else SECONDS
    done = run([*case.command, *arguments], out, limit)
    assert not marker(folder).exists(), "something in the input was executed"
    assert snapshot(folder) == before, "the input was changed"
    assert done.peak < (MEMORY_COMPUTED if computed else MEMORY), f"{done.peak >> 20} MiB of memory"
    assert all(char.isprintable() or char == "\n" for char in done.err + done.out), "control characters"
    assert "Traceback" not in done.err
    for word in case.expected.words:
        assert word in done.err, done.err
    if isinstance(case.expected, Refused):
        check_refused(case.expected, done)
        assert not list(out.iterdir()), "something was left in the output folder"
    else:
        check_accepted(case, case.expected, done, out)


def check_refused(expected: Refused, done: Done) -> None:
    assert done.code == expected.code, f"exit code {done.code}: {done.err}"
    assert done.out == "" and done.err.startswith("error: ")
    # File and cause, then the next step.
    assert 2 <= len(done.err.splitlines()) <= 12 and len(done.err) < 4000, done.err


def check_accepted(case: Case, expected: Accepted, done: Done, out: Path) -> None:
    assert done.code == 0, done.err
    (written,) = out.iterdir()
    found = safetensors.torch.load_file(written)
    wanted = reference(case.command, expected.like)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        same = (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert same and raw(found[name]) == raw(tensor), name


def test_case_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)

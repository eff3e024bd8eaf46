"""Whatever happens to a run, the output is what it was or what it should become, and the next run succeeds.

Some of what `scripts/faults.py` does in thousands; docs/faults.md has its figures.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faulting
import pytest
from faulting import Done, Scene

import converter
from converter.errors import OutputError
from converter.storage import atomic_output, temp_files
from converter.storage.atomic_output import remove_stale, staged, staging

KINDS = ["file", "card", "folder"]


class Faulty:
    """Runs of the program in forks of one process, in which one call fails; like faulting.PROGRAM otherwise."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("faulty.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=faulting.environment(),
        )

    def __call__(self, arguments: list[str], folder: Path, at: int = 0, error: int = 0) -> tuple[Done, int]:
        """A run of which one call, counted from 1, fails with an error, or is the process's last for error 0."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps([arguments, str(folder), at, error]), file=self.process.stdin, flush=True)
        code, said, calls = json.loads(self.process.stdout.readline())
        return Done(code, said), calls

    def close(self) -> None:
        # Closes both pipes, at which it ends.
        with self.process:
            pass
        assert self.process.returncode == 0


@pytest.fixture(scope="module")
def faulty() -> Iterator[Faulty]:
    program = Faulty()
    yield program
    program.close()


class ForkedScene(Scene):
    """A scene whose runs are forks."""

    def __init__(self, kind: str, folder: Path, faulty: Faulty) -> None:
        self._faulty = faulty
        super().__init__(kind, folder)

    def run(self, source: int, *options: str, **more: Any) -> Done:
        if more:
            return super().run(source, *options, **more)
        done, _ = self._faulty(self.command(source, *options), self.out)
        return Done(done.code, "\n".join(line for line in done.err.splitlines() if not line.startswith("/")))


@pytest.mark.parametrize(
    ("kind", "force", "errors"),
    [
        ("file", False, (errno.ENOSPC, errno.EIO, errno.EINTR)),
        ("card", True, (errno.EIO, errno.ENOSPC, errno.EINTR)),
        ("card", False, ()),
        ("folder", True, (errno.EINTR, errno.ENOSPC, errno.EIO)),
    ],
)
def test_every_call_that_fails_and_death_at_every_call(
    kind: str, force: bool, errors: tuple[int, ...], faulty: Faulty, tmp_path: Path
) -> None:
    """Each call fails with one of the errors; all of them at each, by the kernel's own doing, is the script's part."""
    scene = ForkedScene(kind, tmp_path, faulty)
    old, options = (0, ["--force"]) if force else (None, [])
    scene.reset(old)
    done, calls = faulty(scene.command(1, *options), scene.out)
    assert done.code == 0 and calls > 15
    seen = set()
    for at in range(1, calls + 1):
        if errors:
            scene.reset(old)
            done, _ = faulty(scene.command(1, *options), scene.out, at, errors[at % len(errors)])
            seen.add(scene.check_failed(done, old, 1, force))
        scene.reset(old)
        done, _ = faulty(scene.command(1, *options), scene.out, at)
        assert done.code == -signal.SIGKILL, done
        seen.add(scene.check_killed(old, 1, force))
    assert seen >= {"old, litter", "new"} | ({"refused"} if errors else set())
    assert kind != "card" or "between, litter" in seen


def run_all(cases: list[faulting.Case]) -> set[str]:
    return {case() for case in cases}


@pytest.mark.parametrize("kind", KINDS)
def test_kills_at_random_moments(kind: str, tmp_path: Path) -> None:
    run_all(faulting.kills(Scene(kind, tmp_path), 6, seed=1))


def test_signals_clean_up(tmp_path: Path) -> None:
    run_all(faulting.signals(Scene("card", tmp_path), 8, seed=1))


def test_a_signal_that_comes_while_remains_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    came: list[Path] = []

    def interrupted(path: Path) -> None:
        came.append(path)
        if len(came) == 1:
            raise KeyboardInterrupt
        temp_files.discard(path)

    monkeypatch.setattr("converter.storage.atomic_output.discard", interrupted)
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt), staging(force=True) as new:
        (new.folder(tmp_path / "out") / "file").write_text("new")
    assert len(came) == 2 and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_and_eight_for_one_output(kind: str, tmp_path: Path) -> None:
    scene = Scene(kind, tmp_path, sources=8 if kind == "card" else 2)
    run_all(faulting.races(scene, 2, 0, runs=len(scene.sources)))


def test_limits_on_the_size_of_files(tmp_path: Path) -> None:
    assert run_all(faulting.limits(Scene("card", tmp_path), 6, 0)) >= {"refused"}


def test_inputs_that_change(tmp_path: Path) -> None:
    run_all(faulting.changing_inputs(Scene("file", tmp_path), 4, 0))


@pytest.mark.parametrize("part", [faulting.full_disks, faulting.permissions], ids=["disks", "permissions"])
def test_what_needs_root(part: Callable[[Scene, int, int], list[faulting.Case]]) -> None:
    # pytest's own folders are closed to the other user.
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        try:
            run_all(part(Scene("card", Path(name, "scene")), 4, 0))
        except (RuntimeError, FileNotFoundError) as error:
            pytest.skip(str(error))


# The protocol's parts ---------------------------------------------------------------------------------------------


def test_a_stage_is_cleared_only_when_nobody_holds_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    dead = [tmp_path / ".out.0123abcd.part", tmp_path / ".out.deadbeef.part"]
    dead[0].write_text("half")
    dead[1].mkdir()
    (dead[1] / "x").write_text("half")
    others = [".out.part", ".out.1.part", ".outer.0123abcd.part", "abc.part", ".out.x.0123abcd.part"]
    for name in others:
        (tmp_path / name).write_text("a stranger's")
    with staged(out, False) as fd:
        os.write(fd, b"whole")
        remove_stale(out)
        assert not any(path.exists() for path in dead)
        assert len(list(tmp_path.glob(".out.????????.part"))) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "out"])


def test_what_another_wrote_after_a_dead_run_is_not_undone(tmp_path: Path) -> None:
    """Only what the dead run put there is: the card that somebody has written since stays."""
    card, out = tmp_path / "card.json", tmp_path / "out"
    (tmp_path / ".card.json.1.2.old").write_text("older")
    card.write_text("mine")
    remove_stale(out, [card])
    assert card.read_text() == "mine" and list(tmp_path.iterdir()) == [card]


@pytest.mark.parametrize("old", [True, False], ids=["replaced", "new"])
@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_place_that_cannot_be_taken_gives_all_others_back(
    old: bool, links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    out, card, page = (tmp_path / name for name in ("out", "card.json", "card.md"))
    for path in (card, page) if old else ():
        path.write_text("old")
    with pytest.raises(OutputError, match="out: could not be written"), staging(force=True) as new:
        for path in (out, card, page):
            os.write(new.file(path), b"new")
        # A folder where the output should stand.
        out.mkdir()
    out.rmdir()
    assert sorted(tmp_path.iterdir()) == ([card, page] if old else [])
    assert all(path.read_text() == "old" for path in tmp_path.iterdir())


def test_without_locks_all_appears_and_nothing_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temp_files, "fcntl", None)
    dead = tmp_path / ".out.0123abcd.part"
    dead.write_text("may be a live run's")
    with staging(force=False) as new:
        for name in ("out", "card.json"):
            os.write(new.file(tmp_path / name), b"new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [dead.name, "card.json", "out"]


def test_a_strangers_lock_on_the_folder_does_not_block(tmp_path: Path) -> None:
    """`flock FOLDER dsocr-convert ...` holds it as long as the program runs."""
    fd = os.open(tmp_path, os.O_RDONLY)
    assert temp_files.lock(fd)
    began = time.monotonic()
    with staged(tmp_path / "out", False) as out:
        os.write(out, b"whole")
    os.close(fd)
    assert (tmp_path / "out").read_bytes() == b"whole" and time.monotonic() - began < 5


def test_the_file_that_has_no_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: memoryview) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("converter.output.record_files.write_all", full)
    source = faulting.checkpoint(tmp_path / "sam.safetensors", 0)
    with pytest.raises(OutputError, match=r"card\.json: could not be written: No space left on device\nfree some room"):
        converter.convert(source, "sam", out=tmp_path / "out.safetensors", record=tmp_path / "card.json")
    assert list(tmp_path.iterdir()) == [source]


def test_derive_never_replaces_what_it_reads(tmp_path: Path) -> None:
    source = faulting.checkpoint(tmp_path / "sam.safetensors", 0)
    before = source.read_bytes()
    with pytest.raises(OutputError, match="is the source itself"):
        converter.derive(source, "deepencoder-sam", out=source, force=True)
    assert source.read_bytes() == before


def test_a_full_disk_behind_stdout_is_told() -> None:
    with Path("/dev/full").open("w") as full:
        command = [*faulting.PROGRAM, "mapping", "list"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=faulting.environment())
    assert done.returncode == 4 and done.stderr.startswith("error: standard output: could not be written: No space")


@pytest.mark.parametrize("step", ["keep", "place", "settle", "discard"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_between_any_two_steps_leaves_nothing(
    step: str, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One signal, at each of the steps in which card and output take their places."""
    output, card = tmp_path / "out", tmp_path / "card"
    done = getattr(atomic_output, step)
    calls: list[int] = []

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if when == "before" and len(calls) == at:
            raise KeyboardInterrupt
        result = done(*arguments)
        if when == "after" and len(calls) == at:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(atomic_output, step, interrupted)
    for at in range(1, 5):
        for path in (output, card):
            path.write_bytes(b"old")
        calls.clear()
        with contextlib.suppress(KeyboardInterrupt), staging(True) as new:
            for path in (output, card):
                os.write(new.file(path), b"new")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["card", "out"], at
        # The output's place says which of the two it is.
        assert output.read_bytes() == card.read_bytes(), at

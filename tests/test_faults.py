"""After any fault in a run, each file is old or new, and the next run succeeds.

Some of what `scripts/faults.py` does in thousands; docs/faults.md has the counts.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import faulting
import pytest
from faulting import Scene

import converter
from converter.errors import OutputError
from converter.storage import atomic_output
from converter.storage.atomic_output import AtomicOutput, atomic_file, remove_stale, temporary_path


@pytest.fixture
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    kind = getattr(request, "param", "record")
    with Scene(kind, tmp_path) as scene:
        yield scene


@pytest.mark.parametrize(("scene", "force"), [("file", False), ("record", True), ("folder", True)], indirect=["scene"])
def test_every_call_that_fails_and_kills_at_every_call(scene: Scene, force: bool) -> None:
    """One of three errors at every other call, and a kill at the others; the script does all of them, by the kernel."""
    old, options = (0, ["--force"]) if force else (None, [])
    errors = (errno.ENOSPC, errno.EIO, errno.EINTR)
    scene.reset(old)
    done, calls = scene.forks.run(scene.command(1, *options), scene.out)
    assert done.code == 0 and calls > 10
    outcomes = set()
    for at in range(1, calls + 1):
        error = errors[at % 3] if at % 2 else 0
        scene.reset(old)
        done, _ = scene.forks.run(scene.command(1, *options), scene.out, at, error)
        assert error or done.code == -signal.SIGKILL, done
        outcomes.add(scene.check_error(done, old, 1, force) if error else scene.check_fault(old, 1, force))
    assert outcomes >= {"old, temporary files", "refused: old"}
    assert scene.kind != "record" or "between, temporary files" in outcomes


def run_all(cases: list[faulting.Case]) -> set[str]:
    return {case() for case in cases}


def test_kills_at_random_moments(scene: Scene) -> None:
    run_all(faulting.kills(scene, 8, seed=1))


@pytest.mark.parametrize("scene", ["folder"], indirect=True)
def test_signals(scene: Scene) -> None:
    run_all(faulting.signals(scene, 2, seed=1))


def test_runs_for_one_output_at_the_same_time(tmp_path: Path) -> None:
    with Scene("record", tmp_path, sources=4) as scene:
        run_all(faulting.races(scene, 2, 0))


def test_limits_on_the_size_of_files(scene: Scene) -> None:
    assert run_all(faulting.limits(scene, 3, 0)) >= {"refused: old"}


@pytest.mark.parametrize("scene", ["file"], indirect=True)
def test_inputs_that_change(scene: Scene) -> None:
    run_all(faulting.changing_inputs(scene, 4, 0))


@pytest.mark.parametrize("part", [faulting.full_disks, faulting.permissions], ids=["disks", "permissions"])
def test_faults_that_need_root(part: Callable[[Scene, int, int], list[faulting.Case]]) -> None:
    # pytest's own folders are closed to another user.
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        try:
            with Scene("record", Path(name, "scene")) as scene:
                run_all(part(scene, 4, 0))
        except (RuntimeError, OSError) as error:
            pytest.skip(str(error))


def test_a_full_disk_behind_stdout_is_an_error() -> None:
    with Path("/dev/full").open("w") as full:
        command = [*faulting.PROGRAM, "mapping", "list"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=faulting.environment())
    assert done.returncode == 4 and done.stderr.startswith("error: standard output: could not be written: No space")


# Parts of the protocol ------------------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("stale", ["file", "folder", "hard link of the output"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_stale_temporary_file_is_replaced(stale: str, kind: str, tmp_path: Path) -> None:
    out, temporary, other = tmp_path / "out", tmp_path / ".out.part", tmp_path / "other"
    other.write_text("other")
    if stale == "file":
        temporary.write_text("half")
    elif stale == "folder":
        temporary.mkdir()
        (temporary / "half").write_text("half")
    else:
        temporary.hardlink_to(other)
    with AtomicOutput(force=False) as output:
        if kind == "folder":
            (output.folder(out) / "file").write_text("new")
        else:
            os.write(output.file(out), b"new")
    assert ((out / "file") if kind == "folder" else out).read_text() == "new"
    assert names(tmp_path) == ["other", "out"] and other.read_text() == "other"


def test_two_runs_for_one_output(tmp_path: Path) -> None:
    """The first one wins; the second one fails, and so does one that only removes stale files."""
    out, record = tmp_path / "out", tmp_path / "record.json"
    with AtomicOutput(force=True) as first:
        os.write(first.file(out), b"first")
        os.write(first.file(record), b"first")
        for path in (out, record):
            with pytest.raises(OutputError, match=f"{path.name}: another run is writing it"), atomic_file(path, True):
                pytest.fail("the second run began")
            with pytest.raises(OutputError, match="another run is writing it"):
                remove_stale(path)
    assert out.read_bytes() == record.read_bytes() == b"first" and names(tmp_path) == ["out", "record.json"]
    with atomic_file(out, True) as fd:
        os.write(fd, b"second")
    assert out.read_bytes() == b"second"


def test_without_locks_a_run_that_lost_its_temporary_file_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_output, "fcntl", None)
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="another run is writing it"), atomic_file(out, True) as first:
        os.write(first, b"first")
        with atomic_file(out, True) as second:
            os.write(second, b"second")
    assert out.read_bytes() == b"second" and names(tmp_path) == ["out"]


def test_a_record_that_cannot_be_committed_leaves_the_output(tmp_path: Path) -> None:
    out, record = tmp_path / "out", tmp_path / "record.json"
    with pytest.raises(OutputError, match=r"record\.json: could not be written") as error, AtomicOutput(True) as output:
        for path in (out, record):
            os.write(output.file(path), b"new")
        record.mkdir()
    assert "out is complete" in error.value.hint
    record.rmdir()
    assert names(tmp_path) == ["out"] and out.read_bytes() == b"new"


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_is_created_meanwhile_stays(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:
        monkeypatch.setattr(os, "link", lambda *names: Path("none").stat())
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="was created meanwhile"), atomic_file(out, False):
        out.write_text("theirs")
    assert out.read_text() == "theirs" and names(tmp_path) == ["out"]


def test_a_folder_that_a_killed_run_was_replacing_is_put_back(tmp_path: Path) -> None:
    """Where two folders cannot be exchanged in one step: the run was killed between two renames."""
    out = tmp_path / "out"
    backup = Path(f"{temporary_path(out)}.old")
    backup.mkdir()
    (backup / "file").write_text("old")
    remove_stale(out)
    assert (out / "file").read_text() == "old" and names(tmp_path) == ["out"]
    backup.mkdir()
    remove_stale(out)
    assert (out / "file").read_text() == "old" and names(tmp_path) == ["out"]


def test_a_lock_on_the_folder_does_not_block(tmp_path: Path) -> None:
    """`flock FOLDER dsocr-convert ...` holds one as long as the program runs."""
    import fcntl

    fd = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with atomic_file(tmp_path / "out", False) as out:
        os.write(out, b"new")
    os.close(fd)
    assert (tmp_path / "out").read_bytes() == b"new"


def test_the_file_that_has_no_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: memoryview) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("converter.output.write.write_all", full)
    source = faulting.checkpoint(tmp_path / "sam.safetensors", 0)
    with pytest.raises(OutputError, match=r"record\.json: could not be written: No space left") as error:
        converter.convert(source, "sam", out=tmp_path / "out.safetensors", record=tmp_path / "record.json")
    assert "free some space" in error.value.hint and list(tmp_path.iterdir()) == [source]


def test_a_signal_as_the_writer_starts_does_not_hang() -> None:
    """Between the start of the thread and the block that ends it."""
    code = "from converter.storage.stream import BackgroundWriter as W; W(1).__enter__(); raise SystemExit(143)"
    done = subprocess.run([*faulting.PROGRAM[:2], code], timeout=20, env=faulting.environment())
    assert done.returncode == 143


@pytest.mark.parametrize("record", [False, True])
def test_a_source_with_the_name_of_a_temporary_file_is_not_removed(record: bool, tmp_path: Path) -> None:
    name = ".record.json.part" if record else ".out.safetensors.part"
    source = faulting.checkpoint(tmp_path / name, 0)
    before = source.read_bytes()
    records = [tmp_path / "record.json"] if record else []
    with pytest.raises(OutputError, match=r"is the source itself|is another file of this conversion"):
        converter.convert(source, "sam", out=tmp_path / "out.safetensors", record=records, force=True)
    assert source.read_bytes() == before and names(tmp_path) == [name]


def test_derive_never_replaces_what_it_reads(tmp_path: Path) -> None:
    source = faulting.checkpoint(tmp_path / "sam.safetensors", 0)
    before = source.read_bytes()
    with pytest.raises(OutputError, match="is the source itself"):
        converter.derive(source, "deepencoder-sam", out=source, force=True)
    assert source.read_bytes() == before

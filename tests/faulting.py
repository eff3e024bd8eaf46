"""Faults in runs of the program, and what must hold after each: every file is old or new, and the next run succeeds.

`tests/test_faults.py` tries some of them, `scripts/faults.py` thousands. Needs nothing but the project, on Linux.
"""

from __future__ import annotations

import array
import contextlib
import io
import json
import math
import os
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = [sys.executable, "-c", "import sys; from converter.cli.main import convert; sys.exit(convert())"]
TEMPORARY = re.compile(r"\..+\.part(\.old)?")
SECONDS = 120.0

State = dict[str, bytes]
# Causes one fault in one run; returns the outcome, or raises ViolationError.
Case = Callable[[], str]


class Done(NamedTuple):
    code: int
    err: str


class ViolationError(Exception):
    """A guarantee does not hold."""


def checkpoint(path: Path, seed: int) -> Path:
    """Write a tiny SAM with Meta's names and the shapes of models.sam_meta."""
    shapes: dict[str, list[int]] = json.loads((ROOT / "tests" / "data" / "sam-tiny.json").read_text())
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    draw = random.Random(seed)
    values = array.array("f", (draw.random() for _ in range(end // 4)))
    path.write_bytes(struct.pack("<Q", len(text)) + text + values.tobytes())
    return path


def warm_up() -> None:
    """Run the program once in this process: its forks then need not import what it uses."""
    from converter.cli import main

    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        source, out, record, page = (
            str(Path(name, each)) for each in ("a.safetensors", "b.safetensors", "c.json", "d.md")
        )
        checkpoint(Path(source), 0)
        sys.argv = ["dsocr-convert", "sam", source, "-o", out, "--record", record, "--record", page, "-q"]
        main.convert()


def environment() -> dict[str, str]:
    """Return an environment in which the program finds the project."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}


class Forks:
    """Runs of the program in forks of one process (faulty.py), which take a tenth of a start."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("faulty.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )

    def run(
        self, arguments: list[str], folder: Path, at: int = 0, error: int = 0, seconds: float = 0.0
    ) -> tuple[Done, int]:
        """Run the program.

        Args:
            arguments: Its arguments.
            folder: The folder that it writes to.
            at: Which call that concerns the folder fails, counted from 1; 0 for none.
            error: The error number; 0 for SIGKILL.
            seconds: When it is killed; 0 for not at all.

        Returns:
            The result, and the number of calls that concern the folder.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps([arguments, str(folder), at, error, seconds]), file=self.process.stdin, flush=True)
        code, output, calls = json.loads(self.process.stdout.readline())
        return Done(code, "\n".join(line for line in output.splitlines() if not line.startswith("/"))), calls

    def close(self) -> None:
        # Closes both pipes, at which it ends.
        with self.process:
            pass


class Scene:
    """A folder with sources, an output folder, and what the program makes of each source.

    `kind` is "file", "record" (a file with a record and a model card) or "folder" (for from_pretrained).
    """

    # In the order in which they are committed.
    FILES = ("model.safetensors", "record.json", "README.md")

    def __init__(self, kind: str, folder: Path, sources: int = 2) -> None:
        self.kind, self.folder, self.forks = kind, folder, Forks()
        self.out = folder / "out"
        self.out.mkdir(parents=True, exist_ok=True)
        self.sources = [checkpoint(folder / f"source{seed}.safetensors", seed) for seed in range(sources)]
        self._made = [self._make(source) for source in range(sources)]

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *error: object) -> None:
        self.forks.close()

    def command(self, source: int, *options: str) -> list[str]:
        output, record, page = (str(self.out / name) for name in self.FILES)
        more = {
            "file": ["-o", output],
            "record": ["-o", output, "--record", record, "--record", page],
            "folder": ["-o", str(self.out / "model"), "--to", "sam-hf", "--full-model"],
        }[self.kind]
        return ["sam", str(self.sources[source]), "-q", *more, *options]

    def run(self, source: int, *options: str) -> Done:
        return self.forks.run(self.command(source, *options), self.out)[0]

    def start(self, source: int, *options: str) -> subprocess.Popen[bytes]:
        command = [*PROGRAM, *self.command(source, *options)]
        # A shell starts background jobs with SIGINT ignored, and a process passes that on.
        default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment(), preexec_fn=default
        )

    def made(self, source: int | None) -> State:
        """Return the output of a source; of None, nothing."""
        return {} if source is None else self._made[source]

    def _make(self, source: int) -> State:
        self.reset(None)
        done = self.run(source)
        if done.code != 0:
            raise RuntimeError(f"the program does not run here: {done.err}")
        return self.state()

    def reset(self, source: int | None) -> None:
        """Let the output folder hold the output of a source, and nothing else."""
        for path in sorted(self.out.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        for name, data in self.made(source).items():
            (self.out / name).parent.mkdir(exist_ok=True)
            (self.out / name).write_bytes(data)

    def state(self) -> State:
        """Return all files but the temporary ones."""
        paths = [path for path in self.out.rglob("*") if path.is_file()]
        names = {str(path.relative_to(self.out)): path for path in paths}
        return {name: path.read_bytes() for name, path in names.items() if not name.startswith(".")}

    def temporary(self) -> list[str]:
        return [name for name in os.listdir(self.out) if name.startswith(".")]  # noqa: PTH208 (quick)

    # What must hold ---------------------------------------------------------------------------------------------------

    def check_fault(self, old: int | None, new: int, force: bool) -> str:
        """Check the state after a fault, and that a next run leaves the new output and nothing else.

        Args:
            old: The source of what was there before the run.
            new: The source of the run.
            force: Whether it was to replace the old output.
        """
        before, after = self.made(old), self.made(new)
        unknown = [name for name in self.temporary() if not TEMPORARY.fullmatch(name)]
        if unknown:
            raise ViolationError(f"unknown names: {unknown}")
        seen, temporary = self._compare(before, after), self.temporary()
        done = self.run(new, *(["--force"] if force else []))
        if not force and seen != "old":
            # The output exists: the run is refused, and removes temporary files all the same.
            self.check_refused(done, self.state())
            done = self.run(new, "--force")
        if done.code != 0:
            raise ViolationError(f"the next run failed: {done.err}")
        self.check_is(after)
        return seen + (", temporary files" if temporary else "")

    def _compare(self, before: State, after: State) -> str:
        """Return "old", "new" or, where only the first of several files are new, "between"."""
        found = self.state()
        if found in (before, after):
            return "new" if found == after else "old"
        for count in (1, 2) if self.kind == "record" else ():
            if found == {**before, **{name: after[name] for name in self.FILES[:count]}}:
                return "between"
        raise ViolationError(f"neither old nor new: {sorted(found)}")

    def check_is(self, *expected: State) -> None:
        if self.temporary():
            raise ViolationError(f"left: {self.temporary()}")
        if self.state() not in expected:
            raise ViolationError(f"not the expected state: {sorted(self.state())}")

    def check_refused(self, done: Done, expected: State, code: int = 4) -> None:
        """Check the exit code, the message, and that nothing has changed."""
        if done.code != code:
            raise ViolationError(f"exit {done.code}, not {code}: {done.err}")
        self.check_message(done)
        self.check_is(expected)

    def check_message(self, done: Done) -> None:
        lines = done.err.splitlines()
        if "Traceback" in done.err or not done.err.startswith("error: ") or not 2 <= len(lines) <= 12:
            raise ViolationError(f"not a message: {done.err}")
        if str(self.folder) not in lines[0] and "standard output" not in lines[0]:
            raise ViolationError(f"no file is named: {done.err}")

    def check_error(self, done: Done, old: int | None, new: int, force: bool) -> str:
        """Check a run in which a system call failed: it succeeded, or its message says what holds now.

        Args: as for `check_fault`.
        """
        seen = self._compare(self.made(old), self.made(new))
        if done.code not in (0, 4):
            raise ViolationError(f"exit {done.code}: {done.err}")
        if done.code == 4:
            self.check_message(done)
        pattern = {"old": "", "between": "is complete", "new": "written, but|standard output"}[seen]
        if (seen != "new") if done.code == 0 else not re.search(pattern, done.err):
            raise ViolationError(f"exit {done.code}, and the output is {seen}: {done.err}")
        self.check_fault(old, new, force)
        return "overcome" if done.code == 0 else f"refused: {seen}"


def _forced(force: bool) -> list[str]:
    return ["--force"] if force else []


def _wait_for_temporary(scene: Scene, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None and not scene.temporary():
        pass


def _seconds(scene: Scene, new: int) -> tuple[float, float]:
    """Return the seconds that a run takes, and those after it created its temporary file; the longest of three."""
    complete, writing = [], []
    for _ in range(3):
        scene.reset(None)
        began = time.monotonic()
        process = scene.start(new)
        _wait_for_temporary(scene, process)
        created = time.monotonic()
        process.communicate()
        complete.append(time.monotonic() - began)
        writing.append(time.monotonic() - created)
    return max(complete), max(writing)


# Faults ---------------------------------------------------------------------------------------------------------------


def kills(scene: Scene, count: int, seed: int) -> list[Case]:
    """SIGKILL at random moments of a run."""
    draw, durations = random.Random(seed), []
    for _ in range(3):
        scene.reset(None)
        began = time.monotonic()
        scene.run(1)
        durations.append(time.monotonic() - began)

    def one(index: int) -> str:
        force = index % 2 == 0
        scene.reset(0 if force else None)
        command = scene.command(1, *_forced(force))
        done, _ = scene.forks.run(command, scene.out, seconds=draw.uniform(0, sorted(durations)[1]))
        if done.code not in (0, -signal.SIGKILL):
            raise ViolationError(f"exit {done.code}: {done.err}")
        return scene.check_fault(0 if force else None, 1, force)

    return [partial(one, index) for index in range(count)]


def signals(scene: Scene, count: int, seed: int) -> list[Case]:
    """SIGINT and SIGTERM at random moments: half at any, half while the output is written."""
    draw = random.Random(seed)
    complete, writing = _seconds(scene, 1)

    def one(index: int) -> str:
        force, aimed, number = index % 4 < 2, index % 2 == 0, (signal.SIGINT, signal.SIGTERM)[index // 4 % 2]
        scene.reset(0 if force else None)
        process = scene.start(1, *_forced(force))
        if aimed:
            _wait_for_temporary(scene, process)
        time.sleep(draw.uniform(0, writing if aimed else complete))
        process.send_signal(number)
        process.communicate()
        if process.returncode not in (0, -number, 128 + number):
            raise ViolationError(f"exit {process.returncode} after {number.name}")
        return scene.check_fault(0 if force else None, 1, force)

    return [partial(one, index) for index in range(count)]


def limits(scene: Scene, count: int, seed: int) -> list[Case]:
    """Limits on the size of files, from nothing to more than is needed."""
    largest = max(map(len, scene.made(1).values()))

    def one(index: int) -> str:
        force = index % 2 == 0
        scene.reset(0 if force else None)
        limit = index * (largest + 8192) // count
        set_limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
        command = [*PROGRAM, *scene.command(1, *_forced(force))]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), preexec_fn=set_limit)
        return scene.check_error(Done(done.returncode, done.stderr), 0 if force else None, 1, force)

    return [partial(one, index) for index in range(count)]


def full_disks(scene: Scene, count: int, seed: int) -> list[Case]:
    """A file system of its own for the output, of about the size that is needed; as root alone."""
    page = 4096
    old_pages = sum(-(-len(data) // page) for data in scene.made(0).values())
    need = -(-sum(len(data) for data in scene.made(1).values()) // page)

    def one(index: int) -> str:
        force = index % 2 == 0
        # Three quarters of them between the size of the tensors and that of all files: the lack cannot be foreseen.
        pages = need - count // 2 + index if index % 4 else 1 + index * need // count
        size = (pages + (old_pages if force else 0) + 2) * page
        with _mounted(scene.out, size):
            try:
                scene.reset(0 if force else None)
            except OSError as error:
                raise RuntimeError(f"{size} bytes are too few for the old output") from error
            done = scene.run(1, *_forced(force))
            if done.code == 0:
                scene.check_is(scene.made(1))
                return "written"
            scene.check_refused(done, scene.made(0 if force else None))
        return "refused before reading" if "are needed and" in done.err else "refused while writing"

    return [partial(one, index) for index in range(count)]


@contextlib.contextmanager
def _mounted(folder: Path, size: int) -> Iterator[None]:
    """Mount a tmpfs of so many bytes; RuntimeError where that is not permitted."""
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(options, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


NOBODY = 65534
# Everything is imported before the process becomes another user, who may not enter Python's own folders.
AS_NOBODY = f"""
import contextlib, io, os, sys
import converter.output.model_card, converter.output.pretrained_config, encodings.unicode_escape
from converter.cli import convert, main
with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
    convert.app([*sys.argv[1:], "--dry-run"], standalone_mode=False)
os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY})
sys.exit(main.convert())
"""


def permissions(scene: Scene, count: int, seed: int) -> list[Case]:
    """Folders that another user may not write to, or not replace files in; as root alone."""
    if os.getuid() != 0:
        raise RuntimeError("needs root, to become another user")

    def one(index: int) -> str:
        # Read-only; or everybody's, in which each user may replace their own files alone.
        old, sticky = (None, 0)[index % 2], index // 2 % 2 == 1
        scene.reset(old)
        scene.out.chmod(0o1777 if sticky else 0o755)
        command = [sys.executable, "-c", AS_NOBODY, *scene.command(1, *_forced(old is not None))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment())
        if sticky and old is None:
            scene.check_is(scene.made(1))
            return "a folder that is everybody's: written"
        scene.check_refused(Done(done.returncode, done.stderr), scene.made(old))
        return "another user's file: refused" if sticky else "another user's folder: refused"

    return [partial(one, index) for index in range(count)]


def races(scene: Scene, count: int, seed: int) -> list[Case]:
    """A run for each source at once, for one output."""

    def one(index: int) -> str:
        force = index % 2 == 0
        scene.reset(None)
        started = [scene.start(source, *_forced(force)) for source in range(len(scene.sources))]
        errors = [process.communicate()[1].decode() for process in started]
        ended = [Done(process.returncode, error) for process, error in zip(started, errors, strict=True)]
        won = [source for source, done in enumerate(ended) if done.code == 0]
        if not won or (len(won) > 1 and not force):
            raise ViolationError(f"{len(won)} of {len(ended)} runs succeeded: {errors}")
        scene.check_is(*(scene.made(source) for source in won))
        for done in ended:
            if done.code not in (0, 4):
                raise ViolationError(f"exit {done.code}: {done.err}")
            if done.code:
                scene.check_message(done)
        return f"{'with' if force else 'without'} --force: {'one' if len(won) == 1 else 'several'} succeeded"

    return [partial(one, index) for index in range(count)]


def changing_inputs(scene: Scene, count: int, seed: int) -> list[Case]:
    """The source truncated, extended, overwritten or replaced while it is read."""
    draw = random.Random(seed)
    old, new, source = scene.made(0), scene.made(1), scene.sources[1]
    data = source.read_bytes()
    acts: dict[str, Callable[[], object]] = {
        "truncated": lambda: os.truncate(source, len(data) // 2),
        "extended": lambda: source.write_bytes(data + b"more"),
        "overwritten": lambda: _overwrite(source, len(data)),
        "replaced": lambda: _replace(source, scene.sources[0].read_bytes()),
    }
    _, writing = _seconds(scene, 1)

    def one(index: int) -> str:
        what = list(acts)[index % len(acts)]
        scene.reset(0)
        process = scene.start(1, "--force")
        _wait_for_temporary(scene, process)
        # Reading ends early: most of the time is spent in fsync.
        time.sleep(draw.uniform(0, writing / 4))
        acts[what]()
        error = process.communicate()[1].decode()
        _replace(source, data)
        if process.returncode == 0:
            scene.check_is(new)
            return f"{what}: written from the unchanged source"
        scene.check_refused(Done(process.returncode, error), old, code=3)
        return f"{what}: refused"

    return [partial(one, index) for index in range(count)]


def _overwrite(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\x7f" * (size // 4))


def _replace(path: Path, data: bytes) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(data)
    new.replace(path)


# System calls ---------------------------------------------------------------------------------------------------------

CALLS = (
    "openat,close,write,pwrite64,fsync,fdatasync,link,linkat,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,"
    "rmdir,ftruncate,flock,getdents64,fadvise64,lseek"
)
_LINE = re.compile(r"(\d+) +(\w+)\((.*)")
ERRORS = ("ENOSPC", "EIO", "EINTR", "KILL")


def traced(scene: Scene, force: bool) -> list[tuple[str, int]]:
    """Return the system calls of a run that concern the output folder: name, and its number among those of a thread."""
    scene.reset(0 if force else None)
    log = scene.folder / "trace"
    options = ["-f", "-y", "-qq", "-s", "4096", "-o", str(log), "-e", f"trace={CALLS}"]
    command = ["strace", *options, *PROGRAM, *scene.command(1, *_forced(force))]
    done = subprocess.run(command, capture_output=True, env=environment())
    if done.returncode != 0:
        raise RuntimeError(f"strace does not work here: {done.stderr.decode().strip()[-300:]}")
    counts: Counter[tuple[str, str]] = Counter()
    calls: dict[tuple[str, int], None] = {}
    for line in log.read_text(errors="replace").splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        thread, name, rest = match.groups()
        counts[thread, name] += 1
        if str(scene.out) in rest:
            calls[name, counts[thread, name]] = None
    log.unlink()
    return list(calls)


def failing_calls(scene: Scene, share: int = 0, shares: int = 1) -> list[Case]:
    """Every system call that concerns the output failed once with each error, and the process killed at each."""
    cases = [(force, *call, error) for force in (False, True) for call in traced(scene, force) for error in ERRORS]
    return [partial(_failing_call, scene, *case) for case in cases[share::shares]]


def _failing_call(scene: Scene, force: bool, name: str, index: int, error: str) -> str:
    old = 0 if force else None
    scene.reset(old)
    fault = "signal=KILL" if error == "KILL" else f"error={error}"
    options = ["-f", "-qq", "-o", "/dev/null", "-e", f"trace={name}", "-e", f"inject={name}:{fault}:when={index}"]
    command = ["strace", *options, *PROGRAM, *scene.command(1, *_forced(force))]
    done = subprocess.run(command, capture_output=True, timeout=SECONDS, env=environment())
    try:
        if error == "KILL":
            return f"killed: {scene.check_fault(old, 1, force)}"
        ended = Done(done.returncode, done.stderr.decode(errors="replace"))
        return f"{error}: {scene.check_error(ended, old, 1, force)}"
    except ViolationError as violation:
        raise ViolationError(f"{name} {index} {error}, force {force}: {violation}") from violation

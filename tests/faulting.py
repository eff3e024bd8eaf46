"""Faults done to runs of the program, and what must hold after each: all old or all new, and the next run succeeds.

`tests/test_faults.py` does some of them, `scripts/faults.py` thousands. Needs nothing but the project itself.
"""

from __future__ import annotations

import array
import contextlib
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
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# A byte on the descriptor in argv[1], if that is no word, says that the program's own code has begun.
START = (
    "import os, sys; from converter.cli.main import convert; "
    "sys.argv[1].isdigit() and os.write(int(sys.argv.pop(1)), b'x'); sys.exit(convert())"
)
PROGRAM = [sys.executable, "-c", START]
# Stages, and records of what was replaced.
LITTER = re.compile(r"\..+\.([0-9a-f]{8}\.part|[0-9a-f]+\.[0-9a-f]+\.(old|new))")
SECONDS = 120.0

State = dict[str, bytes]
# Does one fault to one run; what came of it, or ViolationError.
Case = Callable[[], str]


class Done(NamedTuple):
    code: int
    err: str


class ViolationError(Exception):
    """Something that must never be."""


def checkpoint(path: Path, seed: int) -> Path:
    """A tiny SAM in Meta's names: the shapes are those of models.sam_meta."""
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


# What is converted ------------------------------------------------------------------------------------------------


class Scene:
    """A folder with sources, an output folder, and what each source makes there.

    `kind` is "file", "card" (the file with a card and a model card) or "folder" (for from_pretrained).
    """

    def __init__(self, kind: str, folder: Path, sources: int = 2, program: Sequence[str] = PROGRAM) -> None:
        self.kind, self.folder, self.program = kind, folder, list(program)
        self.out = folder / "out"
        self.out.mkdir(parents=True, exist_ok=True)
        self.sources = [checkpoint(folder / f"source{seed}.safetensors", seed) for seed in range(sources)]
        self._made = [self._make(source) for source in range(sources)]

    def command(self, source: int, *options: str) -> list[str]:
        name = str(self.out / ("model" if self.kind == "folder" else "model.safetensors"))
        more = {
            "file": [],
            "card": ["--record", str(self.out / "card.json"), "--record", str(self.out / "README.md")],
            "folder": ["--to", "sam-hf", "--full-model"],
        }[self.kind]
        return ["sam", str(self.sources[source]), "-o", name, "-q", *more, *options]

    def run(self, source: int, *options: str, **more: object) -> Done:
        """The program, to its end."""
        command = [*self.program, *self.command(source, *options)]
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, env=environment(), **more)  # type: ignore[call-overload]
        return Done(done.returncode, done.stderr.decode(errors="replace"))

    def start(self, source: int, *options: str, tell: int | None = None) -> subprocess.Popen[bytes]:
        command = [*self.program, *([] if tell is None else [str(tell)]), *self.command(source, *options)]
        return subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment(),
            pass_fds=[] if tell is None else [tell],
        )

    def made(self, source: int) -> State:
        """What stands in the output folder after a run with this source, if nothing went wrong."""
        return self._made[source]

    def _make(self, source: int) -> State:
        self.reset(None)
        done = self.run(source)
        if done.code != 0:
            raise RuntimeError(f"the program does not run here: {done.err}")
        return self.state()

    def reset(self, source: int | None) -> None:
        """Have nothing in the output folder but what a source makes."""
        for path in sorted(self.out.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        for name, data in (self.made(source) if source is not None else {}).items():
            (self.out / name).parent.mkdir(exist_ok=True)
            (self.out / name).write_bytes(data)

    def state(self) -> State:
        """All files that a user sees."""
        paths = [p for p in self.out.rglob("*") if p.is_file() and not self._is_litter(p)]
        return {str(path.relative_to(self.out)): path.read_bytes() for path in paths}

    def litter(self) -> list[str]:
        return [str(path.relative_to(self.out)) for path in self.out.rglob("*") if self._is_litter(path)]

    def _is_litter(self, path: Path) -> bool:
        return any(part.startswith(".") for part in path.relative_to(self.out).parts)

    # What must hold ---------------------------------------------------------------------------------------------------

    def check_killed(self, old: int | None, new: int, force: bool) -> str:
        """After a run was killed: what was seen; ViolationError if neither old nor new, or no run goes on from it.

        The files of a card may be new before the output is: the next run, if it names the same files, puts them back.
        """
        before, after = self._expected(old), self.made(new)
        found, litter = self.state(), self.litter()
        unknown = [name for name in litter if not LITTER.fullmatch(name.split("/")[0])]
        if unknown:
            raise ViolationError(f"of no known name: {unknown}")
        seen = "old" if found == before else "new" if found == after else "between"
        if seen == "between":
            self._check_between(found, before, after)
        if seen == "between" or litter:
            self._check_cleared(before, after)
        if self.state() == after and not force:
            self.check_refused(self.run(new), after)
        else:
            done = self.run(new, *(["--force"] if force else []))
            if done.code != 0:
                raise ViolationError(f"the next run failed: {done.err}")
        self.check_is(after)
        return seen + (", litter" if litter else "")

    def _check_between(self, found: State, before: State, after: State) -> None:
        output = "model.safetensors"
        for name in {*found, *before, *after}:
            if found.get(name) not in (before.get(name), after.get(name)):
                raise ViolationError(f"{name} is neither old nor new")
        if self.kind != "card" or found.get(output) != before.get(output):
            raise ViolationError("the output is new, and what belongs to it is not")

    def _check_cleared(self, before: State, after: State) -> None:
        """A run that writes nothing clears what a dead run left, as its first step."""
        # A card of its stands there already, and it is not to replace it.
        there = self.folder / "there.json"
        there.touch()
        done = self.run(1, "--record", str(there))
        if done.code != 4:
            raise ViolationError(f"exit {done.code}, not 4: {done.err}")
        if self.litter() or self.state() not in (before, after):
            raise ViolationError(f"not cleared: {self.litter()}, {sorted(self.state())}")

    def _expected(self, source: int | None) -> State:
        return {} if source is None else self.made(source)

    def check_is(self, *expected: State) -> None:
        if self.litter():
            raise ViolationError(f"left: {self.litter()}")
        if self.state() not in expected:
            raise ViolationError(f"what stands there is not what should: {sorted(self.state())}")

    def check_refused(self, done: Done, expected: State, code: int = 4) -> None:
        """The run failed as it should: with a code and a message, and what stood there stands there."""
        if done.code != code:
            raise ViolationError(f"exit {done.code}, not {code}: {done.err}")
        self.check_told(done)
        self.check_is(expected)

    def check_told(self, done: Done) -> None:
        lines = done.err.splitlines()
        if "Traceback" in done.err or not done.err.startswith("error: ") or not 2 <= len(lines) <= 12:
            raise ViolationError(f"not a message: {done.err}")
        if str(self.folder) not in lines[0] and "standard output" not in lines[0]:
            raise ViolationError(f"no file is named: {done.err}")

    def check_failed(self, done: Done, old: int | None, new: int, force: bool) -> str:
        """After a run that met an error: it succeeded all the same, or says what failed; and the next one succeeds."""
        before, after = self._expected(old), self.made(new)
        if done.code == 0:
            self.check_cleared_by_next(after, new, force)
            return "overcome"
        if done.code != 4:
            raise ViolationError(f"exit {done.code}: {done.err}")
        self.check_told(done)
        durable = "power cut" not in done.err and "standard output" not in done.err
        found = self.state()
        if found != (before if durable else after):
            if "could not be put back" not in done.err:
                raise ViolationError(f"exit 4, and what stands there is not what should: {done.err} {sorted(found)}")
            self._check_between(found, before, after)
            self._check_cleared(before, after)
        self.check_cleared_by_next(after, new, force)
        return "refused" if durable else "written, and told what else failed"

    def check_cleared_by_next(self, after: State, new: int, force: bool) -> None:
        there = self.state() == after
        done = self.run(new, *(["--force"] if force else []))
        if done.code != (4 if there and not force else 0):
            raise ViolationError(f"the next run: exit {done.code}: {done.err}")
        self.check_is(after)


def environment() -> dict[str, str]:
    """The project found wherever the program runs; nothing else is asked of the machine."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}


def _limit_files(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def _wait_for_stage(scene: Scene, process: subprocess.Popen[bytes]) -> bool:
    """Whether a stage appeared before the process ended."""
    while process.poll() is None:
        if any(name.endswith(".part") for name in os.listdir(scene.out)):  # noqa: PTH208 (quick)
            return True
    return False


def _seconds(scene: Scene, new: int) -> tuple[float, float]:
    """Seconds that a run takes, and those of them that follow the appearance of its stage; the longest of three."""
    whole, writing = [], []
    for _ in range(3):
        scene.reset(None)
        began = time.monotonic()
        process = scene.start(new)
        _wait_for_stage(scene, process)
        appeared = time.monotonic()
        process.communicate()
        whole.append(time.monotonic() - began)
        writing.append(time.monotonic() - appeared)
    return max(whole), max(writing)


# Faults -----------------------------------------------------------------------------------------------------------


def kills(scene: Scene, count: int, seed: int) -> list[Case]:
    """SIGKILL at random moments: half at any, half while the output is written."""
    draw = random.Random(seed)
    whole, writing = _seconds(scene, 1)

    def one(index: int) -> str:
        force = index % 4 < 2
        scene.reset(0 if force else None)
        process = scene.start(1, *(["--force"] if force else []))
        aimed = index % 2 == 0
        if aimed:
            _wait_for_stage(scene, process)
        time.sleep(draw.uniform(0, writing if aimed else whole))
        process.kill()
        process.communicate()
        seen = scene.check_killed(0 if force else None, 1, force)
        return f"{'aimed' if aimed else 'any moment'}: {seen}"

    return [partial(one, index) for index in range(count)]


def signals(scene: Scene, count: int, seed: int) -> list[Case]:
    """SIGINT and SIGTERM at random moments: 130 and 143, nothing said, nothing left."""
    draw = random.Random(seed)
    whole, writing = _seconds(scene, 1)

    def one(index: int) -> str:
        scene.reset(0)
        number = (signal.SIGINT, signal.SIGTERM)[index % 2]
        reading, telling = os.pipe()
        with _default(signal.SIGINT):
            process = scene.start(1, "--force", tell=telling)
        os.close(telling)
        os.read(reading, 1)
        os.close(reading)
        if index % 4 < 2:
            _wait_for_stage(scene, process)
        time.sleep(draw.uniform(0, writing if index % 4 < 2 else whole))
        process.send_signal(number)
        _, said = process.communicate()
        if process.returncode not in (0, 128 + number, -number):
            raise ViolationError(f"exit {process.returncode} after {number.name}: {said.decode()}")
        if said.strip():
            raise ViolationError(f"said after {number.name}: {said.decode()}")
        scene.check_is(scene.made(0), scene.made(1))
        if process.returncode == 0:
            scene.check_is(scene.made(1))
        ended = "ended before it came" if process.returncode == 0 else f"exit {process.returncode}"
        return f"{number.name}: {ended}"

    return [partial(one, index) for index in range(count)]


@contextlib.contextmanager
def _default(number: signal.Signals) -> Iterator[None]:
    """A shell starts background jobs with SIGINT ignored, and a process hands that on."""
    before = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def limits(scene: Scene, count: int, seed: int) -> list[Case]:
    """Limits on the size of files, from nothing to more than is needed."""
    after = scene.made(1)
    largest = max(map(len, after.values()))

    def one(index: int) -> str:
        force = index % 2 == 0
        scene.reset(0 if force else None)
        limit = index * (largest + 8192) // count
        done = scene.run(1, *(["--force"] if force else []), preexec_fn=lambda limit=limit: _limit_files(limit))
        return scene.check_failed(done, 0 if force else None, 1, force)

    return [partial(one, index) for index in range(count)]


def full_disks(scene: Scene, count: int, seed: int) -> list[Case]:
    """A file system of its own for the output, of sizes about what is needed; as root alone."""
    after = sum(len(data) for data in scene.made(1).values())
    room, page = sum(-(-len(data) // 4096) for data in scene.made(0).values()), 4096
    need = -(-after // page)

    def one(index: int) -> str:
        force = index % 2 == 0
        # Three quarters of them from where the tensors fit to where all does, where running full cannot be foreseen.
        pages = need - count // 2 + index if index % 4 else 1 + index * need // count
        size = (pages + (room if force else 0) + 2) * page
        with mounted(scene.out, size):
            try:
                scene.reset(0 if force else None)
            except OSError as error:
                raise RuntimeError(f"{size} bytes are too few for what is to be replaced") from error
            done = scene.run(1, *(["--force"] if force else []))
            if done.code == 0:
                scene.check_is(scene.made(1))
                return "overcome"
            scene.check_refused(done, scene.made(0) if force else {})
            early = re.search(r"are needed and", done.err)
        return "refused before reading" if early else "refused while writing"

    return [partial(one, index) for index in range(count)]


@contextlib.contextmanager
def mounted(folder: Path, size: int) -> Iterator[None]:
    """A tmpfs of so many bytes; RuntimeError where that is not permitted."""
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(options, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"no mount: {error}") from error
    if done.returncode != 0:
        raise RuntimeError(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


NOBODY = 65534
# Everything is imported, and read, before the process becomes another user, who may not enter Python's own folders.
AS_NOBODY = f"""
import contextlib, ctypes, hashlib, io, os, sys
import converter.output.model_card, converter.output.pretrained_config
from converter.cli import console, convert, main
arguments = list(sys.argv)
sys.argv += ["--dry-run"]
with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
    console.run(convert.app)
sys.argv = arguments
os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY})
sys.exit(main.main(lambda: convert.app))
"""


def permissions(scene: Scene, count: int, seed: int) -> list[Case]:
    """Folders that another user may not write to, or not replace files in; as root alone."""
    if os.getuid() != 0:
        raise RuntimeError("needs root, to become another user")
    for parent in (scene.folder, *scene.folder.parents):
        if not parent.stat().st_mode & 0o001:
            raise RuntimeError(f"{parent}: another user cannot enter it")

    def one(index: int) -> str:
        # Read-only; or everybody's, in which each may replace their own files alone.
        old, sticky = (None, 0)[index % 2], index // 2 % 2 == 1
        scene.reset(old)
        scene.out.chmod(0o1777 if sticky else 0o755)
        try:
            command = [sys.executable, "-c", AS_NOBODY, *scene.command(1, *([] if old is None else ["--force"]))]
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment())
        finally:
            scene.out.chmod(0o755)
        if sticky and old is None:
            scene.check_is(scene.made(1))
            return "another's folder that is everybody's: written"
        scene.check_refused(Done(done.returncode, done.stderr), scene.made(old) if old is not None else {})
        return "another's file in everybody's folder: refused" if sticky else "another's folder: refused"

    return [partial(one, index) for index in range(count)]


def races(scene: Scene, count: int, seed: int, runs: int = 8) -> list[Case]:
    """Several runs for one output at once, each with a source of its own."""

    def one(index: int) -> str:
        force = index % 2 == 0
        scene.reset(None)
        started = [scene.start(source, *(["--force"] if force else [])) for source in range(runs)]
        said = [process.communicate()[1].decode() for process in started]
        ended = [Done(process.returncode, err) for process, err in zip(started, said, strict=True)]
        won = [source for source, done in enumerate(ended) if done.code == 0]
        if len(won) != (runs if force else 1):
            raise ViolationError(f"{len(won)} of {runs} runs succeeded: {[done.err for done in ended if done.code]}")
        scene.check_is(*(scene.made(source) for source in won))
        for done in ended:
            if done.code not in (0, 4):
                raise ViolationError(f"exit {done.code}: {done.err}")
            if done.code:
                scene.check_told(done)
        return f"{runs} runs {'with' if force else 'without'} --force: {len(won)} succeeded"

    return [partial(one, index) for index in range(count)]


def changing_inputs(scene: Scene, count: int, seed: int) -> list[Case]:
    """The source cut, grown, overwritten or replaced while it is read."""
    draw = random.Random(seed)
    old, new, source = scene.made(0), scene.made(1), scene.sources[1]
    data = source.read_bytes()
    acts: dict[str, Callable[[], object]] = {
        "cut": lambda: os.truncate(source, len(data) // 2),
        "grown": lambda: source.write_bytes(data + b"more"),
        "overwritten": lambda: _overwrite(source, len(data)),
        "replaced": lambda: _replaced(source, scene.sources[0].read_bytes()),
    }
    _, writing = _seconds(scene, 1)

    def one(index: int) -> str:
        what = list(acts)[index % len(acts)]
        scene.reset(0)
        process = scene.start(1, "--force")
        _wait_for_stage(scene, process)
        # Most of the time goes into making the output durable: reading is done at its beginning.
        time.sleep(draw.uniform(0, writing / 4))
        acts[what]()
        said = process.communicate()[1].decode()
        _replaced(source, data)
        if process.returncode == 0:
            scene.check_is(new)
        else:
            scene.check_refused(Done(process.returncode, said), old, code=3)
        return f"{what}: {'the old input, whole' if process.returncode == 0 else 'refused'}"

    return [partial(one, index) for index in range(count)]


def _overwrite(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\x7f" * (size // 4))


def _replaced(path: Path, data: bytes) -> None:
    beside = path.with_suffix(".beside")
    beside.write_bytes(data)
    beside.replace(path)


# System calls -----------------------------------------------------------------------------------------------------

CALLS = (
    "openat,close,write,pwrite64,fsync,fdatasync,link,linkat,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,"
    "rmdir,ftruncate,flock,getdents64,fadvise64,lseek"
)
_LINE = re.compile(r"(\d+) +(\w+)\((.*)")
ERRORS = ("ENOSPC", "EIO", "EINTR", "KILL")


def traced(scene: Scene, force: bool) -> list[tuple[str, int]]:
    """The system calls of a run that concern the output folder: name, and which of that name it is in its thread."""
    scene.reset(0 if force else None)
    log = scene.folder / "trace"
    arguments = scene.command(1, *(["--force"] if force else []))
    options = ["-f", "-y", "-qq", "-s", "4096", "-o", str(log), "-e", f"trace={CALLS}"]
    done = subprocess.run(["strace", *options, *scene.program, *arguments], capture_output=True, env=environment())
    if done.returncode != 0:
        raise RuntimeError(f"strace does not work here: {done.stderr.decode().strip()[-300:]}")
    counts: Counter[tuple[str, str]] = Counter()
    found: dict[tuple[str, int], None] = {}
    for line in log.read_text(errors="replace").splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        thread, name, rest = match.groups()
        counts[thread, name] += 1
        if str(scene.out) in rest:
            found[name, counts[thread, name]] = None
    log.unlink()
    return list(found)


def failing_calls(scene: Scene, share: int = 0, shares: int = 1) -> list[Case]:
    """Every system call that concerns the output failed in turn with each error, and the process killed at each."""
    cases = [(force, *call, error) for force in (False, True) for call in traced(scene, force) for error in ERRORS]
    return [partial(_failing_call, scene, *case) for case in cases[share::shares]]


def _failing_call(scene: Scene, force: bool, name: str, index: int, error: str) -> str:
    old = 0 if force else None
    scene.reset(old)
    fault = "signal=KILL" if error == "KILL" else f"error={error}"
    options = ["-f", "-qq", "-o", "/dev/null", "-e", f"trace={name}", "-e", f"inject={name}:{fault}:when={index}"]
    arguments = scene.command(1, *(["--force"] if force else []))
    command = ["strace", *options, *scene.program, *arguments]
    done = subprocess.run(command, capture_output=True, timeout=SECONDS, env=environment())
    try:
        if error == "KILL":
            return f"killed: {scene.check_killed(old, 1, force)}"
        told = Done(done.returncode, done.stderr.decode(errors="replace"))
        return f"{error}: {scene.check_failed(told, old, 1, force)}"
    except ViolationError as violation:
        raise ViolationError(f"{name} {index} {error}, force {force}: {violation}") from violation

#!/usr/bin/env python3
"""Benchmarks: whole processes in pairs, each against a reference program, as ratios with quartiles.

    python scripts/bench.py convert     conversions, each against `cp` of its output
    python scripts/bench.py hub         conversions from a hub on 127.0.0.1, against `curl` of as many bytes
    python scripts/bench.py verbs       diff against cmp, load against load_file, --to against plain conversion, derive
    python scripts/bench.py others      conversions against other programs that write the same tensors
    python scripts/bench.py lora        conversions that merge an adapter, against `cp` of their output
    python scripts/bench.py controls    verifications with negative controls, against those without
    python scripts/bench.py plots F D   draws FILE, which `convert --json FILE` wrote, into the folder D

The two processes of a pair run one after the other, and the first of them alternates. Inputs are in the page cache.
`convert --against COMMAND` adds a second dsocr-convert, such as that of an older checkout, to the same pairs.
The seeded checkpoints are made by scripts/make_checkpoints.py in .bench, about 8 GB for all of them.

Only the standard library is imported: a child's peak memory starts from the peak of its parent.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".bench"
BIN = Path(sys.executable).parent
FOLDERS = {"tmpfs": Path("/dev/shm"), "disk": WORK}
MIB = 1 << 20
# Users' second runs find the modules compiled; the first run here compiles them, unless this variable forbids it.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

# Largest ratio to `cp`, on a tmpfs and on a disk.
LIMITS = {"sam-b": 1.6, "clip-bin": 1.15, "clip-safetensors": 1.15, "sam-h": 1.10}
MEMORY_LIMIT_MIB, DRY_RUN_LIMIT_SECONDS, BYTES_LIMIT = 48.0, 0.35, 1.01
CURL_LIMIT, DIFF_LIMIT, DERIVE_LIMIT_SECONDS, CONTROLS_LIMIT = 1.5, 2.5, 30.0, 1.2


@dataclass(frozen=True)
class Case:
    """A seeded checkpoint: its title, its family, and its file in the work folder."""

    title: str
    family: str
    path: str
    repository: str = ""


CASES = {
    "sam-b": Case("SAM-base .pth", "sam", "sam_vit_b_01ec64.pth", "org/sam"),
    "clip-bin": Case(
        "CLIP-L .bin", "clip", "clip-vit-large-patch14/pytorch_model.bin", "openai/clip-vit-large-patch14"
    ),
    "clip-safetensors": Case("CLIP-L .safetensors", "clip", "clip-vit-large-patch14/model.safetensors"),
    "sam-h": Case("SAM ViT-H .pth", "sam", "sam_vit_h_4b8939.pth"),
}
DEEPSEEK_OCR = Case(
    "SAM of DeepSeek-OCR", "sam", "DeepSeek-OCR/model-00001-of-000001.safetensors", "deepseek-ai/DeepSeek-OCR"
)
HUB_CASES = {"sam-b": CASES["sam-b"], "clip-bin": CASES["clip-bin"], "deepseek-ocr": DEEPSEEK_OCR}


# Processes and pairs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One finished process: seconds from start to end, peak memory in MiB, bytes read and written (0 off Linux)."""

    seconds: float
    peak_mib: float
    read: int = 0
    written: int = 0


def run(argv: Sequence[str | Path], environment: Mapping[str, str] = ENVIRONMENT, output: Path | None = None) -> Run:
    """Run a command to its end; its standard output goes to `output` if given. SystemExit if it fails."""
    words = [str(word) for word in argv]
    with tempfile.TemporaryDirectory() as folder:
        log, out = Path(folder, "log"), output or Path(folder, "out")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        actions = [(os.POSIX_SPAWN_OPEN, fd, str(path), flags, 0o644) for fd, path in ((1, out), (2, log))]
        start = time.perf_counter()
        pid = os.posix_spawnp(words[0], words, environment, file_actions=actions)
        # The I/O counters are readable while the process is dead but not reaped.
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        seconds = time.perf_counter() - start
        counters = io_counters(pid)
        _, status, usage = os.wait4(pid, 0)
        if status:
            raise SystemExit(f"bench: {shlex.join(words)}\nfailed ({status}):\n{log.read_text(errors='replace')}")
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there
    return Run(seconds, usage.ru_maxrss * scale / MIB, counters.get("rchar", 0), counters.get("wchar", 0))


def io_counters(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return {}
    return {name: int(value) for name, value in (line.split(":") for line in lines)}


def in_turns(count: int, title: str, *sides: Callable[[], Run]) -> list[list[Run]]:
    """Run all sides `count` times, the first of them alternating; gives the runs of each side."""
    runs: list[list[Run]] = [[] for _ in sides]
    for i in range(count):
        for offset in range(len(sides)):
            side = (i + offset) % len(sides)
            runs[side].append(sides[side]())
        latest = ", ".join(f"{side[-1].seconds:.3f} s" for side in runs)
        print(f"  {title}, {i + 1} of {count}: {latest}", file=sys.stderr, flush=True)
    return runs


def ratios(ours: Sequence[Run], theirs: Sequence[Run]) -> list[float]:
    return [a.seconds / b.seconds for a, b in zip(ours, theirs, strict=True)]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def spread(values: Sequence[float]) -> str:
    low, middle, high = quartiles(values)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def median(runs: Sequence[Run]) -> float:
    return statistics.median(run.seconds for run in runs)


def peak(runs: Sequence[Run]) -> float:
    return max(run.peak_mib for run in runs)


def limit(value: float, largest: float) -> str:
    return f"{largest:g} {'pass' if value <= largest else 'OVER'}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, aligned so that it is readable as plain text."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def read_ahead(*paths: Path) -> None:
    """Bring files into the page cache."""
    buffer = bytearray(MIB)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def make_checkpoints(names: Sequence[str]) -> None:
    wanted = [name for name in names if name in CASES]
    if wanted:
        run([sys.executable, ROOT / "scripts/make_checkpoints.py", WORK, "--only", ",".join(wanted)])


@contextmanager
def work_folder(where: str) -> Iterator[Path]:
    WORK.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dsocr-bench-", dir=FOLDERS[where]) as folder:
        yield Path(folder)


# convert -----------------------------------------------------------------------------------------------------------


@dataclass
class Converted:
    """Runs of one case in one place: ours, those of `--against`, `cp`, the usual script, and dry runs."""

    case: str
    where: str
    output_bytes: int
    ours: list[Run]
    cp: list[Run]
    against: list[Run] = field(default_factory=list)
    usual: list[Run] = field(default_factory=list)
    dry_runs: list[Run] = field(default_factory=list)

    def bytes_read(self) -> float:
        """Bytes read in the copy itself, as a multiple of the output: a dry run reads all the rest."""
        return (self.ours[0].read - self.dry_runs[0].read) / self.output_bytes


def copy(source: Path, target: Path) -> Run:
    """`cp`, then fsync and rename, which are called from here and cost no process."""
    partial_ = target.with_name(target.name + ".cp")
    done = run(["cp", source, partial_])
    start = time.perf_counter()
    with partial_.open("rb") as file:
        os.fsync(file.fileno())
    partial_.rename(target)
    return Run(done.seconds + time.perf_counter() - start, done.peak_mib)


def measure_conversion(name: str, where: str, folder: Path, args: argparse.Namespace) -> Converted:
    case = CASES[name]
    source = WORK / case.path
    if where == "tmpfs":
        source = Path(shutil.copyfile(source, folder / source.name))
    output, reference = folder / "output.safetensors", folder / "reference.safetensors"

    def convert(command: Sequence[str], *options: str) -> Run:
        output.unlink(missing_ok=True)
        if where == "disk":
            os.sync()
            read_ahead(source)
        return run([*command, case.family, source, "-o", output, "--quiet", *options])

    def cp() -> Run:
        output.unlink(missing_ok=True)
        if where == "disk":
            os.sync()
            read_ahead(reference)
        return copy(reference, output)

    convert(args.command)  # warms up; `cp` copies its output
    output.rename(reference)
    sides: list[Callable[[], Run]] = [partial(convert, args.command), cp]
    if args.against:
        convert(args.against)
        sides.append(partial(convert, args.against))
    ours, copies, *against = in_turns(args.pairs, f"{case.title} on {where}", *sides)
    result = Converted(name, where, reference.stat().st_size, ours, copies, *against)
    result.dry_runs = [convert(args.command, "--dry-run") for _ in range(args.pairs)]
    output.unlink(missing_ok=True)
    usual = [sys.executable, str(ROOT / "scripts/usual_script.py"), case.family, str(source), str(output)]
    result.usual = [run(usual) for _ in range(args.usual)]
    return result


def conversion_row(result: Converted) -> list[str]:
    ratio, dry_run = quartiles(ratios(result.ours, result.cp))[1], median(result.dry_runs)
    read, written = result.bytes_read(), result.ours[0].written / result.output_bytes
    usual = f"{median(result.usual) / median(result.cp):.1f}, {peak(result.usual):,.0f} MiB" if result.usual else "-"
    row = [CASES[result.case].title, result.where, f"{median(result.ours):.3f}", f"{median(result.cp):.3f}"]
    row += [spread(ratios(result.ours, result.cp)), limit(ratio, LIMITS[result.case])]
    if result.against:
        row += [spread(ratios(result.against, result.cp)), f"{peak(result.against):.1f}"]
    row += [f"{peak(result.ours):.1f}", limit(peak(result.ours), MEMORY_LIMIT_MIB)]
    row += [f"{read:.3f}x, {written:.3f}x", limit(max(read, written), BYTES_LIMIT)]
    return [*row, f"{dry_run:.3f}", limit(dry_run, DRY_RUN_LIMIT_SECONDS), usual]


def convert(args: argparse.Namespace) -> None:
    names, places = chosen(args.only, CASES), chosen(args.where, FOLDERS)
    make_checkpoints(names)
    results = []
    for name in names:
        for where in places:
            with work_folder(where) as folder:
                results.append(measure_conversion(name, where, folder, args))
    against = ["before, times cp", "before, MiB"] if args.against else []
    head = ["case", "where", "seconds", "cp", "times cp (quartiles)", "limit", *against, "peak MiB", "limit"]
    head += ["read, written", "limit", "dry run s", "limit", "usual script, times cp"]
    print(machine(args.pairs), table(head, [conversion_row(result) for result in results]), sep="\n\n")
    if args.json:
        rows = [{**vars(result), **{key: [vars(run) for run in runs] for key, runs in vars(result).items()
                 if isinstance(runs, list)}} for result in results]  # fmt: skip
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


def machine(pairs: int) -> str:
    lowest = run(["true"]).peak_mib  # no peak below this can be seen
    return (
        f"{pairs} pairs; {os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}, "
        f"Python {platform.python_version()}; lowest peak that can be seen {lowest:.1f} MiB"
    )


# hub ---------------------------------------------------------------------------------------------------------------


def serve(names: Sequence[str]) -> None:
    """Serve the cases as a hub: print the environment variables that point clients here, end with stdin."""
    sys.path.insert(0, str(ROOT / "tests"))
    from hubserver import Repo, environment, hub_server
    from inventories import inventories, sparse

    path = WORK / DEEPSEEK_OCR.path
    if "deepseek-ocr" in names and not path.exists():
        path.parent.mkdir(exist_ok=True)
        sparse(path, inventories()["deepseek-ocr"])
    # Nothing is downloaded whole: a true digest would take seconds, and no client asks for it.
    files = [(case.repository, WORK / case.path) for case in (HUB_CASES[name] for name in names)]
    repos = [Repo(repository, {path.name: path}, sha256={path.name: "5" * 64}) for repository, path in files]
    with tempfile.TemporaryDirectory(prefix="dsocr-bench-") as caches, hub_server(repos) as server:
        print(json.dumps(environment(server, Path(caches))), flush=True)
        sys.stdin.read()


@contextmanager
def hub_environment(names: Sequence[str]) -> Iterator[dict[str, str]]:
    command = [sys.executable, __file__, "serve", "--only", ",".join(names)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        line = process.stdout.readline()
        if not line:
            raise SystemExit("bench: the server did not start")
        # Leaving the block closes its stdin, which ends it.
        yield {**ENVIRONMENT, **json.loads(line)}


def hub_row(name: str, where: str, folder: Path, environment: dict[str, str], args: argparse.Namespace) -> list[str]:
    case = HUB_CASES[name]
    output, download, document = folder / "output.safetensors", folder / "download", folder / "record.json"
    environment = {**environment, "TMPDIR": str(folder)}
    address = [*args.command, case.family, f"hf://{case.repository}", "--quiet"]

    def fetch(argv: Sequence[str | Path]) -> Run:
        output.unlink(missing_ok=True)
        download.unlink(missing_ok=True)
        if where == "disk":
            os.sync()
        return run(argv, environment)

    # Warms up, and tells how many bytes are fetched.
    run([*address, "-o", output, "--json"], environment, document)
    fetched = sum(json.loads(document.read_text())["fetched"].values())
    url = f"{environment['HF_ENDPOINT']}/{case.repository}/resolve/main/{Path(case.path).name}"
    curl = ["curl", "-sSfL", "-r", f"0-{fetched - 1}", "-o", str(download), url]
    title = f"{case.title} on {where}"
    ours, theirs = in_turns(args.pairs, title, partial(fetch, [*address, "-o", output]), partial(fetch, curl))
    dry_runs = [run([*address, "--dry-run"], environment) for _ in range(args.pairs)]
    size = (WORK / case.path).stat().st_size
    ratio = quartiles(ratios(ours, theirs))[1]
    row = [case.title, where, f"{size:,}", f"{fetched:,} ({fetched / size:.1%})", f"{median(ours):.3f}"]
    row += [f"{median(dry_runs):.3f}", f"{median(theirs):.3f}", spread(ratios(ours, theirs))]
    return [*row, limit(ratio, CURL_LIMIT), f"{peak(ours):.1f}"]


def hub(args: argparse.Namespace) -> None:
    names, places = chosen(args.only, HUB_CASES), chosen(args.where, FOLDERS)
    make_checkpoints(names)
    rows = []
    with hub_environment(names) as environment:
        for name in names:
            for where in places:
                with work_folder(where) as folder:
                    rows.append(hub_row(name, where, folder, environment, args))
    head = ["case", "where", "file", "fetched", "seconds", "dry run s", "curl", "times curl (quartiles)", "limit"]
    print(machine(args.pairs), table([*head, "peak MiB"], rows), sep="\n\n")


# verbs -------------------------------------------------------------------------------------------------------------

# Prints the seconds that loading takes, and loading and reading every byte.
LOAD = """
import sys, time, warnings
warnings.simplefilter("ignore")
import torch, safetensors.torch, converter
torch.set_num_threads(1)
load = {"ours": lambda: converter.load(sys.argv[2], "clip"), "theirs": lambda: safetensors.torch.load_file(sys.argv[2])}
load[sys.argv[1]]()
begin = time.perf_counter()
tensors = load[sys.argv[1]]()
loaded = time.perf_counter()
for tensor in tensors.values():
    torch.aminmax(tensor)
print(loaded - begin, time.perf_counter() - begin)
"""

# Compares the tensors of both ways onto a GPU, then prints the seconds of both, pair by pair.
LOAD_ON_GPU = """
import sys, time
import torch, safetensors.torch, converter
pairs, source, converted = int(sys.argv[1]), *sys.argv[2:]
def timed(load):
    torch.cuda.synchronize()
    begin = time.perf_counter()
    tensors = load()
    torch.cuda.synchronize()
    return time.perf_counter() - begin, tensors
ours = lambda: converter.load(source, "clip", device="cuda")
theirs = lambda: safetensors.torch.load_file(converted, device="cuda")
found, expected = ours(), theirs()
assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
del found, expected
for _ in range(pairs):
    print(timed(ours)[0], timed(theirs)[0])
"""


def printed(argv: Sequence[str | Path]) -> list[list[float]]:
    """The numbers that a command prints, line by line."""
    with tempfile.TemporaryDirectory() as folder:
        run(argv, output=Path(folder, "out"))
        return [[float(word) for word in line.split()] for line in Path(folder, "out").read_text().splitlines()]


def load_run(who: str, path: Path, column: int) -> Run:
    ((*seconds,),) = printed([sys.executable, "-c", LOAD, who, path])
    return Run(seconds[column], 0.0)


def verb_row(title: str, ours: Sequence[Run], theirs: Sequence[Run], largest: float | None = None) -> list[str]:
    ratio = quartiles(ratios(ours, theirs))[1]
    verdict = limit(ratio, largest) if largest else ""
    return [title, f"{median(ours):.3f}", f"{median(theirs):.3f}", spread(ratios(ours, theirs)), verdict]


def verbs(args: argparse.Namespace) -> None:
    make_checkpoints(["sam-b", "clip-bin"])
    sam, clip = (WORK / CASES[name].path for name in ("sam-b", "clip-bin"))
    rows = []
    with work_folder("disk") as folder:
        a, b = folder / "a.safetensors", folder / "b.safetensors"
        for path in (a, b):
            run([*args.command, "clip", clip, "--quiet", "-o", path])
        if args.gpu:
            for title, source in (("CLIP-L's .bin onto a GPU, load_file", clip), ("converted CLIP-L, load_file", a)):
                pairs = printed([sys.executable, "-c", LOAD_ON_GPU, str(args.pairs), source, a])
                rows.append(verb_row(title, [Run(x, 0) for x, _ in pairs], [Run(y, 0) for _, y in pairs]))
        else:
            rows = [*verb_rows(args, sam, clip, a, b), derive_row(args, clip, a, folder / "derived.yaml")]
    print(machine(args.pairs), table(["what, against", "seconds", "reference", "ratio (quartiles)", "limit"], rows),
          sep="\n\n")  # fmt: skip


def verb_rows(args: argparse.Namespace, sam: Path, clip: Path, a: Path, b: Path) -> Iterator[list[str]]:
    def convert(*words: str | Path) -> Callable[[], Run]:
        return partial(run, [*args.command, *words, "--quiet", "--force", "-o", a.with_name("out.safetensors")])

    title = "diff of two equal CLIP-L files, cmp"
    equal = in_turns(args.pairs, title, partial(run, [*args.command, "diff", a, b, "-q"]), partial(run, ["cmp", a, b]))
    yield verb_row(title, equal[0], equal[1], DIFF_LIMIT)
    for column, title in enumerate(("load a converted CLIP-L, load_file", "load and read it, load_file")):
        sides: list[Callable[[], Run]] = [partial(load_run, who, a, column) for who in ("ours", "theirs")]
        ours, theirs = in_turns(args.pairs, title, *sides)
        yield verb_row(title, ours, theirs)
    for title, family, source, layout in (
        ("SAM-base to sam-hf, to the DeepEncoder", "sam", sam, "sam-hf"),
        ("CLIP-L to clip-timm, to the DeepEncoder", "clip", clip, "clip-timm"),
    ):
        ours, theirs = in_turns(args.pairs, title, convert(family, source, "--to", layout), convert(family, source))
        yield verb_row(title, ours, theirs)


def derive_row(args: argparse.Namespace, source: Path, converted: Path, output: Path) -> list[str]:
    command = [*args.command, "mapping", "derive", source, converted, "--quiet", "--force", "-o", output]
    seconds = median([run(command) for _ in range(3)])
    return ["derive, two CLIP-L of true size", f"{seconds:.1f}", "-", "-", limit(seconds, DERIVE_LIMIT_SECONDS)]


# others ------------------------------------------------------------------------------------------------------------

TRANSFORMERS = """
import sys, torch
from transformers import SamModel
from transformers.models.sam.convert_sam_to_hf import get_config, replace_keys
model = SamModel(get_config("sam_vit_b"))
model.load_state_dict(replace_keys(torch.load(sys.argv[1], map_location="cpu", weights_only=True)))
model.save_pretrained(sys.argv[2])
"""
TIMM = """
import sys, timm, torch
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
model = timm.create_model("vit_large_patch14_clip_quickgelu_224", num_classes=0)
found = checkpoint_filter_fn(torch.load(sys.argv[1], map_location="cpu", weights_only=True), model)
# Its name for CLIP's projection, for which a model without classes has no place.
model.load_state_dict({name: tensor for name, tensor in found.items() if not name.startswith("head.")})
save_file(model.state_dict(), sys.argv[2])
"""


@dataclass(frozen=True)
class Rival:
    """A conversion of ours, and a command of another program that writes the same tensors."""

    title: str
    source: Path
    ours: tuple[str, ...]
    program: str
    command: tuple[str, ...]
    ending: str = ".safetensors"


def rivals(openai: Path, transformers4: str | None) -> list[Rival]:
    usual = (sys.executable, str(ROOT / "scripts/usual_script.py"))
    sam, clip = (WORK / CASES[name].path for name in ("sam-b", "clip-bin"))
    found = [
        Rival("SAM-base, Meta's to the DeepEncoder's", sam, ("sam",), "usual script", (*usual, "sam")),
        Rival("CLIP-L, transformers' to the DeepEncoder's", clip, ("clip",), "usual script", (*usual, "clip")),
        Rival("CLIP-L, OpenAI's to timm's", openai, ("clip", "--to", "clip-timm"), "timm",
              (sys.executable, "-c", TIMM)),
    ]  # fmt: skip
    if transformers4:
        folder = ("sam", "--to", "sam-hf", "--full-model")
        command = (transformers4, "-c", TRANSFORMERS)
        found.append(Rival("SAM-base, Meta's to a folder", sam, folder, "transformers 4", command, ""))
    return found


def others(args: argparse.Namespace) -> None:
    make_checkpoints(["sam-b", "clip-bin"])
    rows = []
    with work_folder("disk") as folder:
        # OpenAI's names, which timm reads, for the tensors of transformers' file.
        openai = folder / "openai.pth"
        clip = WORK / CASES["clip-bin"].path
        run([*args.command, "clip", clip, "--to", "clip-openai", "--full-model", "-o", openai, "--quiet"])
        for rival in rivals(openai, args.transformers4):
            mine, other = folder / f"mine{rival.ending}", folder / f"other{rival.ending}"
            command = [*args.command, rival.ours[0], rival.source, *rival.ours[1:], "-o", mine, "--force", "--quiet"]
            sides = [partial(run, command), partial(run, [*rival.command, rival.source, other])]
            ours, theirs = in_turns(args.pairs, rival.title, *sides)
            same = subprocess.run([*args.command, "diff", mine, other, "--quiet"], capture_output=True).returncode == 0
            row = [rival.title, f"{median(ours):.2f}", f"{peak(ours):,.0f}", rival.program, f"{median(theirs):.2f}"]
            times = statistics.median(ratios(theirs, ours))
            rows.append([*row, f"{peak(theirs):,.0f}", f"{times:.1f}", "yes" if same else "NO"])
    head = ["conversion", "seconds", "MiB", "other program", "seconds", "MiB", "times", "same tensors"]
    print(machine(args.pairs), table(head, rows), sep="\n\n")


# controls ----------------------------------------------------------------------------------------------------------

WITHOUT_CONTROLS = """
import os, sys
# As dsocr-verify sets it before it imports torch.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
from converter.cli.main import verify
from converter.verification import controls
controls.MISTAKES = dict.fromkeys(controls.MISTAKES, controls.Mistakes({}, {}))
sys.exit(verify())
"""


def controls(args: argparse.Namespace) -> None:
    names, rows = chosen(args.only, {"sam-b": None, "clip-safetensors": None}), []
    make_checkpoints(names)
    with work_folder("disk") as folder:
        for case in map(CASES.__getitem__, names):
            source, out = WORK / case.path, folder / f"{case.family}.safetensors"
            run([*args.command, case.family, source, "--quiet", "-o", out])
            words: list[str | Path] = [out, "--source", source, "--device", "cpu", "--quiet"]
            without = [sys.executable, "-c", WITHOUT_CONTROLS]
            sides = [partial(run, [*command, *words]) for command in ([BIN / "dsocr-verify"], without)]
            title = f"{case.title}, without controls"
            ours, theirs = in_turns(args.pairs, title, *sides)
            rows.append(verb_row(title, ours, theirs, CONTROLS_LIMIT))
    head = ["verification, against", "seconds", "reference", "ratio (quartiles)", "limit"]
    print(machine(args.pairs), table(head, rows), sep="\n\n")


# lora --------------------------------------------------------------------------------------------------------------

# An adapter of rank 64 on all linear layers of the vision encoder of a checkpoint.
MAKE_ADAPTER = """
import json, re, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from converter.checkpoint.open import open_checkpoint
source, folder = sys.argv[1], Path(sys.argv[2])
linear = re.compile(r"(image_encoder|vision_model)\\..*(qkv|proj|lin[12]|[qkv]_proj|out_proj|fc[12])\\.weight")
factors = {}
for name, tensor in open_checkpoint(source).contents.items():
    if linear.fullmatch(name) and len(tensor.shape) == 2:
        for half, shape in (("A", (64, tensor.shape[1])), ("B", (tensor.shape[0], 64))):
            factors[f"base_model.model.{name.removesuffix('.weight')}.lora_{half}.weight"] = torch.randn(shape) / 100
folder.mkdir()
save_file(factors, folder / "adapter_model.safetensors")
(folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 64, "lora_alpha": 64}))
"""


def lora(args: argparse.Namespace) -> None:
    """Merge an adapter of rank 64 on all linear layers."""
    names, rows = chosen(args.only, {"sam-b": None, "clip-safetensors": None}), []
    make_checkpoints(names)
    with work_folder("tmpfs") as folder:
        for case in map(CASES.__getitem__, names):
            source, adapter = Path(shutil.copy(WORK / case.path, folder)), folder / f"{case.family}-lora"
            run([sys.executable, "-c", MAKE_ADAPTER, source, adapter])
            output, reference = folder / "output.safetensors", folder / "reference.safetensors"
            words = [*args.command, case.family, source, "--lora", adapter, "-o", output, "--quiet", "--force"]
            run(words)
            output.rename(reference)
            ours, copies = in_turns(args.pairs, case.title, partial(run, words), partial(copy, reference, output))
            size = f"{(adapter / 'adapter_model.safetensors').stat().st_size / 1e6:.0f} MB"
            row = [case.title, size, f"{median(ours):.2f}", f"{median(copies):.2f}"]
            rows.append([*row, spread(ratios(ours, copies)), f"{peak(ours):.0f}"])
    head = ["base", "adapter", "seconds", "cp", "times cp (quartiles)", "peak MiB"]
    print(machine(args.pairs), table(head, rows), sep="\n\n")


# plots -------------------------------------------------------------------------------------------------------------


def plots(args: argparse.Namespace) -> None:
    """Draw seconds and memory over the size of the output, from what `convert --json` wrote."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    found = json.loads(args.file.read_text())
    where = found[-1]["where"]
    rows = sorted((row for row in found if row["where"] == where), key=lambda row: int(row["output_bytes"]))
    sizes = [row["output_bytes"] / 1e9 for row in rows]
    args.folder.mkdir(parents=True, exist_ok=True)
    # Grey reads on light and dark pages; without hash salt and date, the same figures give the same file.
    grey = {f"{name}color": "#808080" for name in ("text.", "axes.edge", "axes.label", "xtick.", "ytick.")}
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dsocr-convert", **grey}):
        for key, label in (("seconds", f"seconds ({where})"), ("peak_mib", "peak memory, MiB")):
            figure, axes = pyplot.subplots(figsize=(7.5, 3.2), layout="constrained")
            for side, title in (("ours", "dsocr-convert"), ("cp", "cp"), ("usual", "the usual script")):
                if all(row[side] for row in rows):
                    spreads = [quartiles([run[key] for run in row[side]]) for row in rows]
                    (line,) = axes.plot(sizes, [middle for _, middle, _ in spreads], "o-", label=title)
                    lows, highs = [low for low, _, _ in spreads], [high for _, _, high in spreads]
                    axes.vlines(sizes, lows, highs, color=line.get_color(), alpha=0.45)
            axes.set(xlabel="output, GB", ylabel=label, ylim=(0, None), xlim=(0, None))
            axes.legend(frameon=False)
            figure.savefig(args.folder / f"{key}.svg", transparent=True, metadata={"Date": None})
            pyplot.close(figure)


# Command line ------------------------------------------------------------------------------------------------------


def chosen(text: str | None, allowed: Mapping[str, object]) -> list[str]:
    names = [name for name in (text or ",".join(allowed)).split(",") if name]
    if set(names) - set(allowed):
        raise SystemExit(f"bench: {text!r} should be some of {','.join(allowed)}")
    return names


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(function: Callable[[argparse.Namespace], None], pairs: int) -> argparse.ArgumentParser:
        added = commands.add_parser(function.__name__)
        added.set_defaults(function=function)
        added.add_argument("--pairs", type=int, default=pairs, help="default %(default)s")
        added.add_argument("--command", type=shlex.split, default=[str(BIN / "dsocr-convert")])
        return added

    converts, hubs = command(convert, 15), command(hub, 7)
    for added, cases in ((converts, CASES), (hubs, HUB_CASES)):
        added.add_argument("--only", metavar="CASES", help=",".join(cases))
        added.add_argument("--where", help="tmpfs,disk")
    converts.add_argument("--against", type=shlex.split, metavar="COMMAND", help="another dsocr-convert to measure too")
    converts.add_argument("--usual", type=int, default=3, metavar="N", help="runs of the usual script")
    converts.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    command(verbs, 7).add_argument("--gpu", action="store_true", help="only loading onto a GPU")
    command(others, 5).add_argument("--transformers4", metavar="PYTHON", help="an environment with transformers 4")
    for function in (lora, controls):
        command(function, 5).add_argument("--only", metavar="CASES", help="sam-b,clip-safetensors")
    serves = commands.add_parser("serve", help=argparse.SUPPRESS)
    serves.set_defaults(function=lambda args: serve(args.only.split(",")))
    serves.add_argument("--only")
    draws = commands.add_parser("plots")
    draws.set_defaults(function=plots)
    draws.add_argument("file", type=Path)
    draws.add_argument("folder", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse()
    arguments.function(arguments)

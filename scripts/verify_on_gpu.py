#!/usr/bin/env python3
"""Verifies true-size conversions on one NVIDIA GPU, and checks that corrupted ones are caught.

make_checkpoints.py makes seeded weights of true layout and size, `dsocr-convert` converts them, and `dsocr-verify`
verifies each in float32, bfloat16 and float16: as a new process, timed from its start to its verdict. Then the share of
GPU time in forward passes is measured, and the catalogue of corruptions (tests/corruptions.py) is run as far as the
time allows.

Writes OUT_DIR/results.json with everything, and OUT_DIR/gpu.json, the summary for docs/verification. `--tiny` does the
same with tiny weights, on any machine. Exit code 0 if everything was verified, every corruption caught, and the limits
on time were kept.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

PRECISIONS = ("float32", "bfloat16", "float16")
SIZES = (512, 640, 1024, 1280)
# Those of version 2, with one table of queries each.
SIZES_V2 = (768, 1024)
# The size of the DeepEncoder in the catalogue: not the trained one, so that positions are resampled.
CORRUPTION_SIZES = (512,)
# The kinds of checkpoints in the catalogue by family.
KINDS = {"sam": ("sam", "compressor"), "clip": ("clip",), "qwen2": ("qwen2", "queries")}
STAGES = ("verifications", "forward_share", "corruptions")
MAX_SECONDS, MIN_FORWARD_SHARE = 20.0, 0.80
LIBRARIES = ("torch", "transformers", "timm", "segment-anything", "open_clip_torch", "safetensors", "numpy")


class Checkpoint(NamedTuple):
    """One source: its name in make_checkpoints.py, the command that converts it, and its path."""

    name: str
    family: str  # A family, or `encoder` for a whole DeepEncoder
    path: str


CHECKPOINTS = [
    Checkpoint("sam-b", "sam", "sam_vit_b_01ec64.pth"),
    Checkpoint("sam-hf-safetensors", "sam", "sam-vit-base/model.safetensors"),
    Checkpoint("clip-bin", "clip", "clip-vit-large-patch14/pytorch_model.bin"),
    Checkpoint("clip-safetensors", "clip", "clip-vit-large-patch14/model.safetensors"),
    Checkpoint("qwen2", "qwen2", "Qwen2-0.5B/model.safetensors"),
    Checkpoint("deepseek-ocr-2", "encoder", "DeepSeek-OCR-2/model.safetensors"),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--tiny", action="store_true", help="tiny weights, as a test of this script")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default %(default)s)")
    parser.add_argument("--work", type=Path, help="folder for weights (default: a temporary one)")
    parser.add_argument("--seconds", type=float, default=510, help="time for everything (default %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes for the catalogue (default: by the cores)")
    parser.add_argument("--dtypes", default=",".join(PRECISIONS), help="default %(default)s")
    parser.add_argument("--stages", default=",".join(STAGES), help="measurements to make (default %(default)s)")
    parser.add_argument("--only", default="", metavar="NAMES", help="corruptions to run (default: all)")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part:
        corruption_worker(args)
        return 0
    if args.work:
        args.work.mkdir(parents=True, exist_ok=True)
        return everything(args)
    with tempfile.TemporaryDirectory() as work:
        args.work = Path(work)
        return everything(args)


def everything(args: argparse.Namespace) -> int:
    begin = time.monotonic()
    limits = {"seconds": MAX_SECONDS, "forward_share": MIN_FORWARD_SHARE}
    results: dict[str, Any] = {"tiny": args.tiny, "limits": limits}
    stages: dict[str, float] = {}
    results["stages"] = stages

    def stage(name: str, function: Any, *arguments: Any) -> None:
        """Run a stage and write its result and duration, as a later stage may never end."""
        start = time.monotonic()
        print(f"{start - begin:5.0f} s  {name} ...", flush=True)
        try:
            results[name] = function(*arguments)
        except Exception:
            # Stages do not depend on each other's results.
            traceback.print_exc()
            results.setdefault("errors", {})[name] = traceback.format_exc()
        stages[name] = round(time.monotonic() - start, 1)
        (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")

    stage("environment", environment)
    stage("checkpoints", make_checkpoints, args)
    stage("conversions", convert_all, args)
    measurements: dict[str, tuple[Any, ...]] = {
        "verifications": (verify_all, args),
        "forward_share": (forward_shares, args),
        "corruptions": (corrupt_all, args, begin + args.seconds),
    }
    for name in args.stages.split(","):
        stage(name, *measurements[name])
    results["seconds"] = round(time.monotonic() - begin, 1)
    results["summary"] = summary = summarise(results)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "gpu.json").write_text(document(results))
    print(json.dumps(summary, indent=1))
    return 0 if summary["ok"] else 1


# The machine ---------------------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "cuda": torch.version.cuda,
        "libraries": {name: version for name in LIBRARIES if (version := _version(name))},
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


# Weights and conversions ----------------------------------------------------------------------------------------------


def make_checkpoints(args: argparse.Namespace) -> dict[str, Any]:
    """Make all checkpoints at once: drawing random numbers takes one core each."""
    if args.tiny:
        make_tiny(args.work)
    else:
        script = str(ROOT / "scripts" / "make_checkpoints.py")
        makers = [
            subprocess.Popen([sys.executable, script, str(args.work), "--only", checkpoint.name])
            for checkpoint in CHECKPOINTS
        ]
        if any(maker.wait() for maker in makers):
            raise RuntimeError("make_checkpoints.py failed")
    sizes = {checkpoint.path: (args.work / checkpoint.path).stat().st_size for checkpoint in CHECKPOINTS}
    make_others(args.work)
    return {"bytes": sizes}


def make_tiny(work: Path) -> None:
    import corruptions
    import safetensors.torch
    import torch

    for checkpoint in CHECKPOINTS:
        path = work / checkpoint.path
        path.parent.mkdir(parents=True, exist_ok=True)
        state = corruptions.calm(corruptions.tiny_state(checkpoint.family), 0)
        if path.suffix == ".safetensors":
            safetensors.torch.save_file(state, path)
        else:
            torch.save(state, path)


def make_others(work: Path) -> None:
    """Make another checkpoint of SAM and CLIP: all weights negated, without the text tower."""
    import safetensors.torch

    for checkpoint in CHECKPOINTS:
        if checkpoint.family in ("sam", "clip") and checkpoint.path.endswith(".safetensors"):
            state = safetensors.torch.load_file(work / checkpoint.path)
            parts = ("text_model.", "prompt_encoder.", "mask_decoder.")
            kept = {name: tensor for name, tensor in state.items() if not name.startswith(parts)}
            other = {name: -tensor if tensor.is_floating_point() else tensor for name, tensor in kept.items()}
            safetensors.torch.save_file(other, work / f"other-{checkpoint.family}.safetensors")


def program(name: str) -> list[str]:
    """The installed command: next to this Python, or on the path."""
    places = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    found = shutil.which(f"dsocr-{name}", path=places)
    if found is None:
        raise SystemExit(f"dsocr-{name} is not installed: run scripts/test first")
    return [found]


def converted(work: Path, checkpoint: Checkpoint) -> Path:
    return work / f"converted-{checkpoint.name}.safetensors"


def convert_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for checkpoint in CHECKPOINTS:
        source, out = args.work / checkpoint.path, converted(args.work, checkpoint)
        command = [*program("convert"), checkpoint.family, str(source), "-o", str(out), "--force", "--quiet"]
        start = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = round(time.monotonic() - start, 3)
        found.append({"source": checkpoint.path, "seconds": seconds, "exit_code": done.returncode})
        if done.returncode:
            raise RuntimeError(done.stderr)
    return found


# Verifications, each a new process ------------------------------------------------------------------------------------


def verify_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for checkpoint in CHECKPOINTS:
        for precision in args.dtypes.split(","):
            found.append(result := verify_cold(args, checkpoint, precision))
            print(
                f"         {checkpoint.path} {precision}: {result['seconds']} s, exit {result['exit_code']}", flush=True
            )
    return found


def verify_cold(args: argparse.Namespace, checkpoint: Checkpoint, precision: str) -> dict[str, Any]:
    """Run `dsocr-verify` once, timed from the start of its process to its end."""
    command = [*program("verify"), str(converted(args.work, checkpoint)), "--source", str(args.work / checkpoint.path)]
    command += ["--device", args.device, "--dtype", precision, "--json", "--quiet"]
    sizes = SIZES if checkpoint.family in ("sam", "clip") else SIZES_V2
    command += ["--sizes", "192" if args.tiny else ",".join(map(str, sizes))]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = round(time.monotonic() - start, 2)
    result = {"source": checkpoint.path, "family": checkpoint.family, "dtype": precision, "seconds": seconds}
    result["exit_code"] = done.returncode
    try:
        document = json.loads(done.stdout)
    except ValueError:
        print(done.stderr[-3000:], flush=True)
        return {**result, "verified": False, "stderr": done.stderr[-3000:]}
    result["verified"] = document["verdict"] == "verified"
    keep = ("mapping", "reference", "device", "dtype", "environment", "checks", "traces")
    return {**result, **{key: document[key] for key in keep}, "parts": document["seconds"]}


# GPU time in forward passes -------------------------------------------------------------------------------------------


class Busy:
    """Seconds that the GPU was busy inside and outside of forward passes.

    Busy is what torch's profiler records on the device: kernels and copies, without the gaps between them. The
    profiler is restarted, with the device idle, at the start and end of each forward pass.
    """

    def __init__(self) -> None:
        self.inside = self.outside = 0.0
        self.kernels = self._depth = 0
        self._profiler: Any = None

    def start(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        self._profiler = profile(activities=[ProfilerActivity.CUDA])
        self._profiler.start()

    def stop(self) -> float:
        import torch

        torch.cuda.synchronize()
        self._profiler.stop()
        events = [event for event in self._profiler.events() if event.device_type.name == "CUDA"]
        self.kernels += len(events)
        return float(sum(event.time_range.elapsed_us() for event in events)) / 1e6

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Count a forward pass; one inside of another counts with the outer."""
        self._depth += 1
        if self._depth == 1:
            self.outside += self.stop()
            self.start()
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self.inside += self.stop()
                self.start()


def forward_shares(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the share of the GPU's busy time in forward passes, for one conversion of each family."""
    import torch

    if not torch.cuda.is_available() or args.device == "cpu":
        return []
    return [forward_share(args, CHECKPOINTS[index]) for index in (0, 2)]


def forward_share(args: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, Any]:
    from converter.api.verify import verify
    from converter.encoders import DeepEncoder
    from converter.verification.probes import record_features

    busy = Busy()
    forward = DeepEncoder.forward

    def recorded_timed(*arguments: Any) -> Any:
        with busy.forward():
            return record_features(*arguments)

    def forward_timed(self: Any, pixels: Any) -> Any:
        with busy.forward():
            return forward(self, pixels)

    busy.start()
    # Every forward pass of a verification is inside of one of the two.
    with (
        mock.patch("converter.verification.outputs.record_features", recorded_timed),
        mock.patch.object(DeepEncoder, "forward", forward_timed),
    ):
        source = str(args.work / checkpoint.path)
        found = verify(str(converted(args.work, checkpoint)), source, device=args.device, sizes=SIZES)
    busy.outside += busy.stop()
    return {
        "source": checkpoint.path,
        "verified": found.verdict == "verified",
        "forward_seconds": round(busy.inside, 4),
        "other_seconds": round(busy.outside, 4),
        "share": round(busy.inside / (busy.inside + busy.outside), 4),
        "events": busy.kernels,
    }


# The catalogue --------------------------------------------------------------------------------------------------------


def corrupt_all(args: argparse.Namespace, end: float) -> dict[str, Any]:
    """Run the catalogue in several processes; each writes a line for each corruption and stops in time."""
    # Six take up to 60 GiB of the GPU's memory: attention over a whole image in float64, several times.
    each = max((args.workers or min(len(os.sched_getaffinity(0)) // 2, 6)) // len(KINDS), 1)
    parts = [f"{family}:{index}:{each}" for family in KINDS for index in range(each)]
    until = time.time() + end - time.monotonic()
    workers = []
    for part in parts:
        command = [sys.executable, __file__, str(args.out), "--part", part, "--until", str(until)]
        command += ["--work", str(args.work), "--device", args.device, "--only", args.only]
        command += ["--tiny"] if args.tiny else []
        threads = str(max(len(os.sched_getaffinity(0)) // len(parts), 1))
        workers.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": threads}))
    for worker in workers:
        try:
            worker.wait(max(end - time.monotonic(), 1) + 20)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
    rows = []
    for part in parts:
        path = rows_path(args.work, part)
        rows += [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    import corruptions

    done = {(row["name"], row["family"]) for row in rows}
    chosen = [name for name in args.only.split(",") if name]
    wanted = [(each.name, kind) for each, kind in corruptions.cases() if not chosen or each.name in chosen]
    return {"rows": rows, "not_run": [list(case) for case in wanted if case not in done]}


def rows_path(work: Path, part: str) -> Path:
    return work / f"corruptions-{part.replace(':', '-')}.jsonl"


def corruption_worker(args: argparse.Namespace) -> None:
    """Run one process's share of the catalogue."""
    import corruptions
    import torch
    from corruptions import Corruption

    family, index, count = args.part.split(":")
    chosen = [name for name in args.only.split(",") if name]
    kinds = KINDS[family]
    cases = [(c, kind) for c, kind in corruptions.cases() if kind in kinds and (not chosen or c.name in chosen)]
    # Wrong encoders first: only their outputs on a GPU show them.
    cases.sort(key=lambda case: case[0].kind != corruptions.ARCHITECTURE)
    cases = cases[int(index) :: int(count)]
    with tempfile.TemporaryDirectory(dir=args.work) as name, rows_path(args.work, args.part).open("w") as lines:
        folder = Path(name)
        subjects = worker_subjects(args, family, folder)
        if index == "0":
            cases = [(Corruption("none", kinds[:1], corruptions.WEIGHTS, "nothing"), kinds[0]), *cases]
        for corruption, kind in cases:
            if time.time() > args.until:
                break
            try:
                row, found = corruptions.run(corruption, subjects[kind], folder, device=args.device)
                line = corruptions.as_json([row])[0]
                line["unnamed"] = corruptions.unnamed(row, found) if found is not None else []
            except Exception:
                line = {"name": corruption.name, "family": kind, "error": traceback.format_exc()[-2000:]}
                print(line["error"], flush=True)
            if torch.cuda.is_available():
                # Other processes need the memory that torch keeps in reserve.
                torch.cuda.empty_cache()
            lines.write(json.dumps(line) + "\n")
            lines.flush()


def worker_subjects(args: argparse.Namespace, family: str, folder: Path) -> dict[str, Any]:
    import corruptions

    paths = {checkpoint.name: args.work / checkpoint.path for checkpoint in CHECKPOINTS}
    if family == "qwen2":
        sizes = ((128,), (832,)) if args.tiny else ((768,), (1024,))
        return corruptions.qwen2_subjects(paths["deepseek-ocr-2"], folder, sizes)
    source, foreign = paths["sam-hf-safetensors"], paths["clip-safetensors"]
    if family == "clip":
        source, foreign = foreign, source
    others = {"seed": args.work / f"other-{family}.safetensors", "family": foreign}
    found = corruptions.subject(family, source, others, folder, (192,) if args.tiny else CORRUPTION_SIZES)
    return (
        {"clip": found}
        if family == "clip"
        else {"sam": found, "compressor": corruptions.with_compressor(found, folder)}
    )


# Verdict --------------------------------------------------------------------------------------------------------------


def summarise(results: dict[str, Any]) -> dict[str, Any]:
    verifications = results.get("verifications", [])
    shares = results.get("forward_share", [])
    catalogue = results.get("corruptions", {"rows": [], "not_run": []})
    rows = [row for row in catalogue["rows"] if row["name"] != "none"]
    controls = [row for row in catalogue["rows"] if row["name"] == "none"]
    missed = [f"{row['name']} ({row['family']})" for row in rows if "error" in row or row["ok"]]
    found = {
        "verified": sum(each["verified"] for each in verifications),
        "verifications": len(verifications),
        "slowest_seconds": max((each["seconds"] for each in verifications), default=None),
        "lowest_forward_share": min((each["share"] for each in shares), default=None),
        "corruptions": len(rows),
        "caught": len(rows) - len(missed),
        "missed": missed,
        "caught_by": {
            group: sum(bool(row.get("caught", {}).get(group)) for row in rows)
            for group in ("structure", "bytes", "outputs", "function")
        },
        "refused": sum(bool(row.get("refused")) for row in rows),
        "unnamed": [f"{row['name']} ({row['family']})" for row in rows if row.get("unnamed")],
        "not_run": len(catalogue["not_run"]),
        "correct_ones_failed": sum(not row.get("ok", False) for row in controls),
        "errors": sorted(results.get("errors", {})),
    }
    limits = [each["seconds"] <= MAX_SECONDS or results["tiny"] for each in verifications]
    limits += [each["verified"] and each["share"] >= MIN_FORWARD_SHARE for each in shares]
    found["ok"] = bool(
        found["verified"] == found["verifications"]
        and all(limits)
        and not missed
        and not found["correct_ones_failed"]
        and not found["errors"]
        and (verifications or shares or rows)
    )
    return found


# The summary for docs/verification ------------------------------------------------------------------------------------


def document(results: dict[str, Any]) -> str:
    """The measurements without details, as JSON with one run or corruption a line."""
    catalogue = results.get("corruptions", {"rows": [], "not_run": []})
    short = {key: value for key, value in results.items() if key not in ("conversions", "errors")}
    short["verifications"] = [verification_summary(each) for each in results.get("verifications", [])]
    short["corruptions"] = {**catalogue, "rows": [row_summary(row) for row in catalogue["rows"]]}
    return one_line_each(short) + "\n"


def verification_summary(result: dict[str, Any]) -> dict[str, Any]:
    """One verification: what ran, and error and tolerance of each comparison of outputs."""
    keys = ("source", "dtype", "seconds", "verified")
    checks = [check for check in result.get("checks", ()) if "noise_floor" in check["figures"]]
    traces = [trace for trace in result.get("traces", ()) if trace["points"]]
    runs = []
    for check, trace in zip(checks, traces, strict=True):
        # The largest error in noise floors, at any probe.
        worst = max((point["error"] or 0.0) / point["noise_floor"] for point in trace["points"])
        figures = {name: float(f"{check['figures'][name]:.2g}") for name in ("error", "tolerance")}
        runs.append({"name": check["name"], **figures, "most_noise_floors": round(worst, 2)})
    return {**{key: result.get(key) for key in keys}, "runs": runs}


def row_summary(row: dict[str, Any]) -> dict[str, Any]:
    """One corruption: the groups that caught it, and the largest error in tolerances."""
    ratio = row.get("ratio")
    return {
        "name": row["name"],
        "family": row["family"],
        "caught_by": [group for group, caught in row.get("caught", {}).items() if caught],
        **({"refused": True} if row.get("refused") else {}),
        **({"error": True} if row.get("error") else {}),
        **({"ratio": float(f"{ratio:.3g}") if isinstance(ratio, float) else ratio} if ratio is not None else {}),
    }


def one_line_each(value: Any, indent: str = "") -> str:
    """JSON with one entry a line, but short values and those without nested ones on one line."""
    text = json.dumps(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if len(text) < 110 or not any(isinstance(each, dict | list) and each for each in inner):
        return text
    entries = [one_line_each(each, f"{indent} ") for each in inner]
    if isinstance(value, dict):
        entries = [f"{json.dumps(key)}: {entry}" for key, entry in zip(value, entries, strict=True)]
    lines = ",\n".join(f"{indent} {entry}" for entry in entries)
    return f"{text[0]}\n{lines}\n{indent}{text[-1]}"


if __name__ == "__main__":
    sys.exit(main())

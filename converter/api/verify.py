"""verify: check a converted checkpoint by structure, bytes and outputs."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from converter import __version__
from converter.checkpoint.open import open_checkpoint
from converter.errors import UsageError
from converter.options import HubOptions, check_choices
from converter.storage.progress import OnProgress
from converter.tensors.evaluate import torch_dtype
from converter.tensors.lazy_tensor import source_tensors
from converter.verification.inputs import Converted, Origin, open_any_layout, open_converted, open_origin
from converter.verification.pictures import load
from converter.verification.record_check import Record, check_record, read_record
from converter.verification.result import PARTS, SKIPPED, Check, Verification
from converter.verification.runs import RunOptions, run_encoders
from converter.verification.structure import check_structure
from converter.verification.weights import check_bytes

DTYPES = ("float32", "bfloat16", "float16")
# Pixels along a side at which DeepSeek-OCR runs. On a CPU the smallest one takes a minute.
SIZES = (512, 640, 1024, 1280)
CPU_SIZES = (512,)


def verify(
    converted: str | Path,
    source: str | Path | None = None,
    *,
    record: str | Path | None = None,
    mapping: str | Path | None = None,
    state_dict: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    sizes: Sequence[int] | None = None,
    fast: bool = False,
    require: Sequence[str] = (),
    image: str | Path | None = None,
    draw: bool = False,
    on_progress: OnProgress = lambda what, done, total: None,
    **hub_options: Any,
) -> Verification:
    """Verify a converted checkpoint.

    A wrong conversion is a verdict, not an exception.

    Args:
        converted: A file with a canonical layout; with a record also one with another layout.
        source: The checkpoint it was converted from. Without it, bytes and outputs are not compared.
        record: The conversion record (.json) that was written with it.
        mapping: The mapping file that `convert` was given.
        state_dict: The state dict of the source that `convert` was given.
        device: auto, cpu, cuda or cuda:N.
        dtype: The precision the encoders run in: float32, bfloat16 or float16.
        sizes: Pixels along a side at which the whole DeepEncoder runs.
        fast: Run nothing.
        require: Parts without which the result is not `ok`: structure, bytes, outputs.
        image: An image file to run on instead of the drawn page.
        draw: Make pictures of the features.
        on_progress: Called with the stage, the work done and all work.
        hub_options: The fields of HubOptions.

    Raises:
        DsocrError: A file cannot be read, or no library to compare with is installed.
    """
    check_choices(dtype=(dtype, DTYPES))
    if unknown := [part for part in require if part not in PARTS]:
        raise UsageError(f"--require {unknown[0]}: expected some of {', '.join(PARTS)}")
    where, hub = _device(device), HubOptions(**hub_options)
    chosen = () if fast else tuple(sizes or (SIZES if where.type == "cuda" else CPU_SIZES))
    page = load(Path(image)) if image is not None else None
    options = RunOptions(where, torch_dtype(dtype), chosen, page, draw, on_progress)
    recorded = read_record(Path(record)) if record is not None else None
    with ExitStack() as stack:
        opened = stack.enter_context(closing(open_checkpoint(converted, hub)))
        if recorded is not None and not recorded.canonical:
            if source is not None:
                message = f"--source: a file with the layout {recorded.layout} is only compared with its record"
                raise UsageError(message, "leave --source out")
            result = _verify_record(open_any_layout(opened, recorded.family, on_progress), recorded, on_progress)
        else:
            target, origin = open_converted(opened, on_progress), None
            if source is not None:
                opened = stack.enter_context(closing(open_checkpoint(source, hub)))
                origin = open_origin(opened, target, mapping, state_dict, on_progress)
            result = _verify(target, origin, recorded, options)
    tools = {"dsocr-convert": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
    return replace(
        result, converted=str(converted), source=str(source or ""), environment=tools, required=tuple(require)
    )


def _verify_record(target: Converted, record: Record, on_progress: OnProgress) -> Verification:
    """Compare a file of another layout with its record, as nothing else is known of it."""
    seconds: dict[str, float] = {}
    with _timed(seconds, "record"):
        checks = check_record(record, target, on_progress)
    reason = f"a file with the layout {record.layout} is only compared with its record"
    return Verification(
        converted=target.source.name,
        family=record.family,
        checks=[*checks, *(Check(group, "encoder", SKIPPED, reason) for group in ("structure", "bytes", "outputs"))],
        mapping=record.mapping,
        dtype="as stored",
        seconds=seconds,
    )


def _verify(target: Converted, origin: Origin | None, record: Record | None, options: RunOptions) -> Verification:
    """Make all checks of a file with a canonical layout."""
    seconds: dict[str, float] = {}
    with _timed(seconds, "structure"):
        checks = check_structure(target)
    compared = None
    if origin is None:
        checks.append(Check("bytes", "tensors", SKIPPED, "no --source to compare with"))
    else:
        with _timed(seconds, "bytes"):
            compared = check_bytes(target, origin, options.on_progress)
        checks += compared.checks
    if record is not None:
        with _timed(seconds, "record"):
            checks += check_record(record, target, options.on_progress)
    with _timed(seconds, "outputs" if options.sizes else "loading"):
        try:
            results = run_encoders(target, compared, options)
        except ModuleNotFoundError as error:
            raise UsageError(
                f"{error.name} is not installed, which outputs are compared with",
                "pip install 'dsocr-convert[verify]', or leave the runs out with --fast",
            ) from error
    outputs = origin.plan.outputs if origin else {}
    return Verification(
        converted=target.source.name,
        family=target.family,
        checks=[*checks, *results.checks],
        mapping=origin.plan.mapping.name if origin else "",
        reference=results.reference,
        device=_device_name(options.device),
        dtype=str(options.precision).removeprefix("torch."),
        traces=results.traces,
        notes=results.notes,
        controls=results.controls,
        seconds=seconds,
        key_map={name: [tensor.key for tensor in source_tensors(value)] for name, value in outputs.items()},
        pictures=results.pictures,
    )


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - begin, 3)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]?))?", name):
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: torch finds {torch.cuda.device_count()} GPUs", "run with --device cpu")
    return device


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"

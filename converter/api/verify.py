"""verify: check a converted checkpoint by structure, bytes and outputs."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from converter import __version__
from converter.api.expected import expected_encoder
from converter.checkpoint.open import Checkpoint, check_hub_options, open_checkpoint
from converter.errors import UsageError
from converter.layouts import registry
from converter.options import ConvertOptions, HubOptions, check_choices
from converter.storage.progress import OnProgress
from converter.tensors.evaluate import torch_dtype
from converter.tensors.lazy_tensor import source_tensors
from converter.verification.inputs import (
    Converted,
    ConvertedEncoder,
    Expected,
    open_any_layout,
    open_converted,
    open_expected,
)
from converter.verification.pictures import load
from converter.verification.record_check import Record, check_record, read_record
from converter.verification.requirements import missing_requirements
from converter.verification.result import PARTS, SKIPPED, Check, Verification
from converter.verification.runs import RunOptions, RunResults, run_encoder
from converter.verification.structure import check_structure
from converter.verification.weights import check_bytes, differing_tensors

DTYPES = ("float32", "bfloat16", "float16")
# Pixels along a side at which DeepSeek-OCR runs. On a CPU the smallest one takes a minute.
SIZES = (512, 640, 1024, 1280)
CPU_SIZES = (512,)

_NOT_CHECKED = (
    "the mapping {} itself was not checked: no known layout fits the source. Compare features with those of the "
    "original program, as docs/tutorial.md shows"
)


def verify(
    converted: str | Path,
    source: str | Path | Mapping[str, str | Path] | None = None,
    *,
    record: str | Path | None = None,
    mapping: str | Path | None = None,
    state_dict: str | None = None,
    prefix: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    sizes: Sequence[int] | None = None,
    fast: bool = False,
    require: Sequence[str] = (),
    image: str | Path | None = None,
    draw: bool = False,
    on_progress: OnProgress = lambda what, done, total: None,
    on_notice: Callable[[str], None] = lambda line: None,
    **hub_options: Any,
) -> Verification:
    """Verify a converted checkpoint.

    A wrong conversion is a verdict, not an exception.

    Args:
        converted: A file that `convert` or `encoder` wrote.
        source: The checkpoint it was converted from. Several by what they supplied: sam, clip, compressor (also
            random:SEED), fill-from, into; `source` for all else. Without it, bytes and outputs are not compared.
        record: The conversion record (.json) that was written with it.
        mapping: The mapping file that `convert` was given.
        state_dict: The state dict of the source that `convert` was given.
        prefix: The prefix of the encoders' names in the sources that `convert` or `encoder` was given.
        device: auto, cpu, cuda or cuda:N.
        dtype: The precision the encoders run in: float32, bfloat16 or float16.
        sizes: Pixels along a side at which the whole DeepEncoder runs.
        fast: Run nothing.
        require: Parts without which the result is not `ok`: structure, bytes, outputs.
        image: An image file to run on instead of the drawn page.
        draw: Make pictures of the features.
        on_progress: Called with the stage, the work done and all work.
        on_notice: Called before work begins with each requirement that is not met, and what is not compared for it.
        hub_options: The fields of HubOptions.

    Raises:
        DsocrError: A file cannot be read, or there is no such device.
    """
    check_choices(dtype=(dtype, DTYPES))
    if unknown := [part for part in require if part not in PARTS]:
        raise UsageError(f"--require {unknown[0]}: expected some of {', '.join(PARTS)}")
    # Nothing is run on the device with --fast.
    where, hub = _device("cpu" if fast else device), HubOptions(**hub_options)
    chosen = () if fast else tuple(sizes or (SIZES if where.type == "cuda" else CPU_SIZES))
    page = load(Path(image)) if image is not None else None
    options = RunOptions(where, torch_dtype(dtype), chosen, page, draw, on_progress)
    recorded = read_record(Path(record)) if record is not None else None
    sources = dict(source) if isinstance(source, Mapping) else {"source": source} if source is not None else {}
    checkpoints: list[Checkpoint] = []
    with ExitStack() as stack:

        def open_(name: str | Path) -> Checkpoint:
            checkpoints.append(stack.enter_context(closing(open_checkpoint(name, hub))))
            return checkpoints[-1]

        opened = open_(converted)
        if recorded is not None and not recorded.canonical and not sources:
            check_hub_options(hub, checkpoints)
            result = _verify_record(open_any_layout(opened, on_progress), recorded, on_progress)
        else:
            target, expected = open_converted(opened, on_progress), None
            if sources:
                family = target.encoders[0].family
                convert_options = ConvertOptions(family, mapping=mapping, state_dict=state_dict, prefix=prefix)
                expected = _expected(target, sources, open_, convert_options, on_progress)
            for notice in missing_requirements(target, expected) if expected and not fast else ():
                on_notice(notice)
            check_hub_options(hub, checkpoints)
            result = _verify(target, expected, recorded, options)
    tools = {"dsocr-convert": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
    return replace(
        result,
        converted=str(converted),
        source=", ".join(map(str, sources.values())),
        environment=tools,
        required=tuple(require),
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


def _expected(
    target: Converted,
    sources: Mapping[str, str | Path],
    open_: Callable[[str | Path], Checkpoint],
    options: ConvertOptions,
    on_progress: OnProgress,
) -> Expected:
    """What the conversion of the sources should have written."""
    family = target.family
    whole = len(target.encoders) > 1
    roles = ("source", *registry.families(), "compressor", "into") if whole else ("source", family, "fill-from")
    for role in sources.keys() - set(roles):
        raise UsageError(f"--source {role}=: not for a file of {family}", f"expected {', '.join(roles)}")
    if whole:
        for option in ("mapping", "state_dict"):
            if getattr(options, option) is not None:
                raise UsageError(f"--{option.replace('_', '-')}: not for a whole DeepEncoder", "leave the option out")
        return expected_encoder(target, sources, open_, options.prefix, on_progress)
    name = sources.get("source", sources.get(family))
    if name is None:
        raise UsageError("--source fill-from=: the source itself is missing", "add --source CHECKPOINT")
    donor = open_(sources["fill-from"]) if "fill-from" in sources else None
    return open_expected(target, open_(name), donor, options, on_progress)


def _verify(target: Converted, source: Expected | None, record: Record | None, options: RunOptions) -> Verification:
    """Make all checks of a file."""
    seconds: dict[str, float] = {}
    with _timed(seconds, "structure"):
        checks = check_structure(target)
    if source is None:
        checks.append(Check("bytes", "tensors", SKIPPED, "no --source to compare with"))
    else:
        with _timed(seconds, "bytes"):
            checks += check_bytes(target, source, options.on_progress)
    if record is not None:
        with _timed(seconds, "record"):
            checks += check_record(record, target, options.on_progress)
    with _timed(seconds, "outputs" if options.sizes else "loading"):
        results = [_run(encoder, target, source, checks, options) for encoder in target.encoders]
    origins = source.origins.values() if source else []
    own_mappings = [Path(each.plan.mapping.location.file).name for each in origins if each.known is None]
    outputs = source.outputs if source else {}
    return Verification(
        converted=target.source.name,
        family=target.family,
        checks=[*checks, *(check for each in results for check in each.checks)],
        mapping=" + ".join(each.plan.mapping.name for each in origins),
        reference=" + ".join(each.reference for each in results if each.reference),
        device=_device_name(options.device),
        dtype=str(options.precision).removeprefix("torch."),
        traces=[trace for each in results for trace in each.traces],
        notes=[*(_NOT_CHECKED.format(name) for name in own_mappings), *(n for each in results for n in each.notes)],
        controls=[control for each in results for control in each.controls],
        qualifiers={"bytes": f"by {', '.join(own_mappings)}"} if own_mappings else {},
        seconds=seconds,
        key_map={name: [tensor.key for tensor in source_tensors(value)] for name, value in outputs.items()},
        pictures=[picture for each in results for picture in each.pictures],
    )


def _run(
    encoder: ConvertedEncoder, target: Converted, source: Expected | None, checks: Sequence[Check], options: RunOptions
) -> RunResults:
    """Run one encoder of the file; of several, the family precedes the names of its checks."""
    origin = source.origins[encoder.family] if source else None
    results = run_encoder(encoder, target.read, origin, differing_tensors(encoder, checks), options)
    if len(target.encoders) == 1:
        return results
    prefix = f"{encoder.family}: "
    return replace(
        results,
        checks=[replace(check, name=prefix + check.name) for check in results.checks],
        traces=[replace(trace, name=prefix + trace.name) for trace in results.traces],
        pictures=[replace(picture, run=prefix + picture.run) for picture in results.pictures],
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
        raise UsageError(
            f"--device {name}: torch finds {torch.cuda.device_count()} GPUs",
            "run with --device cpu, or nothing with --fast",
        )
    return device


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"

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
from converter.api.expected import Inputs, plan_expected
from converter.checkpoint.open import Checkpoint, check_hub_options, open_checkpoint
from converter.errors import UsageError
from converter.options import ConvertOptions, HubOptions, check_choices
from converter.storage.progress import OnProgress
from converter.tensors.dtypes import dtype_name
from converter.tensors.evaluate import torch_dtype
from converter.tensors.lazy_tensor import source_tensors
from converter.verification.controls import strongest_controls
from converter.verification.families import FAMILIES
from converter.verification.inputs import Converted, Expected, open_any_layout, open_converted
from converter.verification.pictures import draw_features, load_image
from converter.verification.record_check import Record, check_record, read_record
from converter.verification.result import PARTS, PASSED, SKIPPED, Check, Verification
from converter.verification.runs import RunOptions, missing_requirements, run_encoders
from converter.verification.structure import check_structure
from converter.verification.weights import check_bytes

DTYPES = ("float32", "bfloat16", "float16")

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
    adapter_name: str | None = None,
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
        source: The checkpoint it was converted from. Several by what they supplied: sam, clip, qwen2, compressor
            and queries (also random:SEED), fill-from, into, lora; `source` for all else. Without it, bytes and outputs
            are not compared.
        record: The conversion record (.json) that was written with it.
        mapping: The mapping file that `convert` was given.
        state_dict: The state dict of the source that `convert` was given.
        prefix: The prefix of the encoders' names in the sources that `convert` or `encoder` was given.
        adapter_name: The adapter of a LoRA file with several that the conversion was given.
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
    if unknown := [part for part in require if part not in PARTS]:
        raise UsageError(f"--require {unknown[0]}: expected some of {', '.join(PARTS)}")
    check_choices(dtype=(dtype, DTYPES))
    torch_device = find_device("cpu" if fast else device)
    picture = load_image(Path(image)) if image is not None else None
    recorded = read_record(Path(record)) if record is not None else None
    sources = dict(source) if isinstance(source, Mapping) else {"source": source} if source is not None else {}
    hub, checkpoints = HubOptions(**hub_options), list[Checkpoint]()
    with ExitStack() as stack:

        def open_file(name: str | Path) -> Checkpoint:
            checkpoints.append(stack.enter_context(closing(open_checkpoint(name, hub))))
            return checkpoints[-1]

        opened, expected = open_file(converted), None
        only_record = recorded if recorded and not recorded.is_canonical and not sources else None
        target = open_any_layout(opened, on_progress) if only_record else open_converted(opened, on_progress)
        if sources:
            options = ConvertOptions(
                target.encoders[0].family,
                mapping=mapping,
                state_dict=state_dict,
                prefix=prefix,
                lora=sources.get("lora"),
                adapter_name=adapter_name,
            )
            expected = plan_expected(Inputs(target, sources, open_file, options, on_progress))
            for notice in () if fast else missing_requirements(target, expected):
                on_notice(notice)
        check_hub_options(hub, checkpoints)
        if only_record:
            result = _verify_record(target, only_record, on_progress)
        else:
            run_sizes = () if fast else sizes or default_sizes(target, torch_device)
            run_options = RunOptions(torch_device, torch_dtype(dtype), run_sizes, picture, draw, on_progress)
            result = _verify(target, expected, recorded, run_options)
    return replace(
        result,
        converted=str(converted),
        source=", ".join(map(str, sources.values())),
        environment=tool_versions(),
        required=tuple(require),
    )


def default_sizes(target: Converted, device: torch.device) -> Sequence[int]:
    """Return the image sizes at which the DeepEncoder runs; on a CPU, only the first, as each takes a minute."""
    sizes = FAMILIES[target.encoders[-1].family].sizes
    return sizes if device.type == "cuda" else sizes[:1]


def _verify_record(target: Converted, record: Record, on_progress: OnProgress) -> Verification:
    """Compare a file of another layout with its record."""
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


def _verify(target: Converted, expected: Expected | None, record: Record | None, options: RunOptions) -> Verification:
    seconds: dict[str, float] = {}
    with _timed(seconds, "structure"):
        checks = check_structure(target)
    if expected is None:
        checks.append(Check("bytes", "tensors", SKIPPED, "no --source to compare with"))
    else:
        with _timed(seconds, "bytes"):
            checks += check_bytes(target, expected, options.on_progress)
    if record is not None:
        with _timed(seconds, "record"):
            checks += check_record(record, target, options.on_progress)
    with _timed(seconds, "outputs" if options.sizes else "loading"):
        runs = list(run_encoders(target, expected, checks, options))
    origins = expected.origins.values() if expected else []
    user_mappings = [Path(origin.plan.mapping.location.file).name for origin in origins if origin.builtin_plan is None]
    outputs = expected.outputs if expected else {}
    drawn = runs if options.draw else []
    return Verification(
        converted=target.source.name,
        family=target.family,
        checks=[*checks, *(run.check for run in runs)],
        mapping=" + ".join(origin.plan.mapping.name for origin in origins),
        reference=" + ".join(dict.fromkeys(run.reference for run in runs if run.reference)),
        device=device_name(options.device),
        dtype=dtype_name(options.precision),
        traces=[run.trace for run in runs if run.trace],
        notes=[
            *(_NOT_CHECKED.format(name) for name in user_mappings),
            *(remark.removeprefix("warning: ") for origin in origins for remark in origin.reference_plan.remarks),
            *(run.note for run in runs if run.note),
        ],
        # Only of passed comparisons: an inconclusive one could not have shown a mistake.
        controls=strongest_controls(control for run in runs if run.check.verdict == PASSED for control in run.controls),
        qualifiers={"bytes": f"by {', '.join(user_mappings)}"} if user_mappings else {},
        seconds=seconds,
        key_map={name: [tensor.key for tensor in source_tensors(value)] for name, value in outputs.items()},
        pictures=[picture for run in drawn if run.features for picture in draw_features(run.check.name, *run.features)],
    )


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - begin, 3)


def tool_versions() -> dict[str, str]:
    """Return the versions that a verification reports."""
    return {"dsocr-convert": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def find_device(name: str) -> torch.device:
    """Return the device of --device; UsageError if there is none."""
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


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the number of threads of a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"

"""The verification as a straight line: open both, plan, then the three proofs as far as they were asked for."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from converter import __version__
from converter.checkpoint.open import Checkpoint, open_checkpoint
from converter.errors import UsageError
from converter.options import HubOptions, check_choices
from converter.storage.progress import OnProgress
from converter.tensors.evaluate import torch_dtype
from converter.tensors.lazy_tensor import source_tensors
from converter.verification import outputs, structure, weights
from converter.verification.inputs import Converted, Origin, as_converted, as_origin, largest
from converter.verification.record_check import Recorded, check_record, is_elsewhere, read_record
from converter.verification.reference_readers import open_independently
from converter.verification.result import FAILED, Verification, skipped
from converter.verification.runs import Runs, Setting

DTYPES = ("float32", "bfloat16", "float16")
# Pixels along a side at which DeepSeek-OCR runs the chain. Two cores take a minute for what a GPU does in a second:
# there, the smallest, which is not the trained one.
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
    image: str | Path | None = None,
    draw: bool = False,
    on_progress: OnProgress = lambda what, done, total: None,
    **hub_options: Any,
) -> Verification:
    """Prove a converted checkpoint by structure, bytes and outputs; what was found comes back as a value.

    `converted` is a file in the DeepEncoder's layout, `source` what it was made from: without it, structure alone is
    proved, and that the encoder runs. `record` is the .json that was written with it; with a card, files of other
    layouts are checked too, against it alone. `mapping`, `state_dict`, `revision`, `hub` and `download` are what
    `convert` was given. `device` is auto, cpu, cuda or cuda:N;
    `dtype` the precision that the encoders run in; `sizes` the pixels along a side at which the whole chain runs. With
    `fast`, nothing runs. `image` is a file to look at in place of our page; `draw` makes pictures of what the encoders
    see in it. Raises a DsocrError for a file that cannot be read, or where no library to compare with is installed; a
    wrong conversion is a verdict, not an error.
    """
    check_choices(dtype=(dtype, DTYPES))
    hub = HubOptions(**hub_options)
    place = _device(device)
    looked_at = None
    if image is not None:
        # PIL, which a verification that runs nothing can do without.
        from converter.verification.pictures import load

        looked_at = load(Path(image))
    recorded = read_record(Path(record)) if record is not None else None
    chosen = () if fast else tuple(sizes or (SIZES if place.type == "cuda" else CPU_SIZES))
    setting = Setting(place, torch_dtype(dtype), chosen, looked_at, draw, on_progress)
    with ExitStack() as stack:
        there = stack.enter_context(closing(open_checkpoint(converted, hub)))
        if recorded is not None and is_elsewhere(recorded):
            if source is not None:
                raise UsageError(f"--source: {recorded.layout} is checked against its card alone", "leave --source out")
            found = _prove_by_card(there, recorded, on_progress)
        else:
            target, origin = as_converted(there), None
            if source is not None:
                opened = stack.enter_context(closing(open_checkpoint(source, hub)))
                origin = as_origin(opened, target, mapping, state_dict, on_progress)
            found = _prove(target, origin, recorded, setting)
    return replace(found, converted=str(converted), source=str(source or ""))


def _prove_by_card(source: Checkpoint, card: Recorded, on_progress: OnProgress) -> Verification:
    """A file of another layout than the DeepEncoder's: its card is all there is to check it with."""
    seconds: dict[str, float] = {}
    state_dict = largest(source)
    found = open_independently(source, state_dict, state_dict.tensors.values(), on_progress)
    with _timed(seconds, "record"):
        checks = check_record(card, source, state_dict.tensors, found, on_progress)
    others = (structure.GROUP, weights.GROUP, outputs.GROUP)
    return Verification(
        converted=source.name,
        source="",
        family=card.family,
        mapping=card.mapping,
        reference="",
        device="CPU",
        dtype="as stored",
        environment=_environment(),
        checks=checks + [skipped(group, "encoder", f"{card.layout}: its card alone is checked") for group in others],
        traces=[],
        seconds=seconds,
    )


def _prove(target: Converted, origin: Origin | None, card: Recorded | None, setting: Setting) -> Verification:
    """The three proofs; without sizes to run at, nothing runs."""
    seconds: dict[str, float] = {}
    tensors = target.state_dict.tensors
    found = open_independently(target.source, target.state_dict, tensors.values(), setting.on_progress)
    with _timed(seconds, "structure"):
        checks = structure.prove(target, found)
    with _timed(seconds, "bytes"):
        hub, compared = weights.prove(target, origin, found, setting.on_progress)
    checks += compared
    if card is not None:
        with _timed(seconds, "record"):
            checks += check_record(card, target.source, tensors, found, setting.on_progress)
    faulty = [name for check in compared if check.verdict == FAILED for name in check.tensors[:1]]
    runs = Runs(target, origin, hub, faulty, setting)
    if setting.sizes:
        with _timed(seconds, "outputs"), _installed():
            runs.prove(found)
    else:
        with _timed(seconds, "loading"):
            checks.append(structure.check_loads(target.family, {name: found(name) for name in tensors})[0])
        checks.append(skipped("outputs", "encoder", "--fast: nothing was run"))
    made = origin.plan.outputs if origin else {}
    return Verification(
        converted=target.source.name,
        source=origin.source.name if origin else "",
        family=target.family,
        mapping=origin.plan.mapping.name if origin else "",
        reference=runs.reference,
        device=_device_name(setting.device),
        dtype=str(setting.precision).removeprefix("torch."),
        environment=_environment(),
        checks=checks + runs.checks,
        traces=runs.traces,
        seconds=seconds,
        key_map={name: [tensor.key for tensor in source_tensors(value)] for name, value in made.items()},
        pictures=runs.pictures,
    )


@contextmanager
def _installed() -> Iterator[None]:
    """UsageError where the library to compare with is not there."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{error.name} is not installed, and outputs are compared with it",
            "install it: pip install 'dsocr-convert[verify]'; or leave the runs out with --fast",
        ) from error


@contextmanager
def _timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds[what] = round(time.perf_counter() - begin, 3)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: torch finds {torch.cuda.device_count()} GPUs", "run with --device cpu")
    return device


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _environment() -> dict[str, str]:
    return {"dsocr-convert": __version__, "torch": str(torch.__version__), "python": platform.python_version()}

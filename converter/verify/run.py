"""The verification as a straight line: open both, plan, then the three proofs as far as they were asked for."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from converter import catalogue
from converter.compute import evaluate, torch_dtype
from converter.encoders import ClipConfig
from converter.errors import LayoutError, UsageError
from converter.mapping.expr import read, sources
from converter.mapping.parse import FAMILIES
from converter.mapping.plan import Plan, make_plan
from converter.mapping.rules import Mapping
from converter.source import Identified, Source, chosen_state_dicts, identify, open_source
from converter.unwrap import StateDict
from converter.verify import structure
from converter.verify.chain import build_chain, check_chain, with_patches
from converter.verify.independent import Reader, checked_as, open_independently
from converter.verify.outputs import Tested, check_encoder, images
from converter.verify.references import State, build
from converter.verify.result import Check, Picture, Trace, Verification, failed, passed, skipped
from converter.verify.weights import compare, elsewhere
from converter.version import __version__

if TYPE_CHECKING:
    from PIL.Image import Image

# Told what is being done, how much of it is done, and of how much.
Progress = Callable[[str, int, int], None]

DTYPES = ("float32", "bfloat16", "float16")
# Pixels along a side at which DeepSeek-OCR runs the chain. Two cores take a minute for what a GPU does in a second:
# there, the smallest, which is not the trained one.
SIZES = (512, 640, 1024, 1280)
CPU_SIZES = (512,)
# Faulty tensors whose content is looked for under other names.
SEARCHED = 12


class Converted(NamedTuple):
    """The file to be verified: where its tensors are, and the family they are of."""

    source: Source
    state_dict: StateDict
    family: str


class Origin(NamedTuple):
    """The source it was converted from, the plan by which it should have been, and a reader that is not ours.

    `resampled` tells that positions were: the source's own library then cannot run what was made of it.
    """

    source: Source
    known: Identified
    plan: Plan
    read: Reader
    resampled: bool


def verify(
    converted: str,
    source: str | None = None,
    *,
    mapping: str | Path | None = None,
    state_dict: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    sizes: Sequence[int] | None = None,
    fast: bool = False,
    image: str | Path | None = None,
    draw: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Verification:
    """Prove a converted checkpoint by structure, bytes and outputs; what was found comes back as a value.

    `converted` is a file in the DeepEncoder's layout, `source` what it was made from: without it, structure alone is
    proved, and that the encoder runs. `mapping` and `state_dict` are what `convert` was given. `device` is auto, cpu,
    cuda or cuda:N; `dtype` the precision that the encoders run in; `sizes` the pixels along a side at which the whole
    chain runs. With `fast`, nothing runs. `image` is a file to look at in place of our page; `draw` makes pictures of
    what the encoders see in it. Raises a DsocrError for a file that cannot be read, and ImportError where a
    reference's library is missing; a wrong conversion is a verdict, not an error.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    place = _device(device)
    looked_at = _load(Path(image)) if image is not None else None
    seconds: dict[str, float] = {}
    target = _open_converted(converted)
    origin = _open_origin(source, target, mapping, state_dict) if source is not None else None
    found = open_independently(target.source, target.state_dict)
    with _timed(seconds, "structure"):
        checks = _prove_structure(target, found)
    with _timed(seconds, "bytes"):
        hub, faults = _prove_bytes(target, origin, found, progress)
    checks += faults
    traces: list[Trace] = []
    drawn: list[Picture] = []
    reference = ""
    if fast:
        with _timed(seconds, "loading"):
            tensors = {name: found(name) for name in target.state_dict.tensors}
            checks.append(structure.check_loads(target.family, tensors)[0])
        checks.append(skipped("outputs", "encoder", "--fast: nothing was run"))
    else:
        with _timed(seconds, "outputs"):
            chosen = tuple(sizes or (SIZES if place.type == "cuda" else CPU_SIZES))
            run = _Run(target, origin, found, hub, place, torch_dtype(dtype), progress, looked_at, draw)
            reference = _installed(lambda: run.prove(chosen))
        checks, traces, drawn = checks + run.checks, run.traces, run.pictures
    return Verification(
        converted=converted,
        source=source or "",
        family=target.family,
        mapping=origin.plan.mapping.name if origin else "",
        reference=reference,
        device=_device_name(place),
        dtype=dtype,
        environment=_environment(),
        checks=checks,
        traces=traces,
        seconds=seconds,
        key_map=_key_map(origin.plan) if origin else {},
        pictures=drawn,
    )


def _installed(prove: Callable[[], str]) -> str:
    """What `prove` gives; a UsageError where the library to compare with is not there."""
    try:
        return prove()
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{error.name} is not installed, and outputs are compared with it\n"
            "install it: pip install 'dsocr-convert[verify]'; or leave the runs out with --fast"
        ) from error


def _load(image: Path) -> Image:
    from converter.verify.pictures import load

    return load(image)


def _key_map(plan: Plan) -> dict[str, list[str]]:
    return {name: [tensor.key for tensor in sources(value)] for name, value in plan.outputs.items()}


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
    except RuntimeError as error:
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: torch finds {torch.cuda.device_count()} GPUs\nrun with --device cpu")
    return device


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _environment() -> dict[str, str]:
    return {"dsocr-convert": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def _open_converted(name: str) -> Converted:
    """The family is the one whose names most of the tensors have: a few wrong ones are for the checks to find."""
    source = open_source(name)
    entry = max(chosen_state_dicts(source, None), key=lambda entry: len(entry.tensors))
    counts = {family: catalogue.count_known(family, entry.tensors) for family in FAMILIES}
    family = max(counts, key=lambda family: counts[family])
    if counts[family] <= len(entry.tensors) / 2:
        raise LayoutError(f"{name}: is not in the DeepEncoder's layout\nconvert it first: dsocr-convert sam or clip")
    return Converted(source, entry, family)


def _open_origin(name: str, target: Converted, mapping: str | Path | None, state_dict: str | None) -> Origin:
    """The source, and the plan that `convert` would have made with the options that the converted file shows."""
    source = open_source(name)
    candidates = catalogue.candidates(target.family)
    if mapping is not None:
        candidates = catalogue.only(catalogue.load_file(Path(mapping)))
    known = identify(source, target.family, candidates, state_dict)
    layout = known.match.candidate.load()
    if not isinstance(layout, Mapping):
        raise UsageError(f"--source {name}: is itself in the layout {layout.name}\ngive what it was converted from")
    tensors = {key: read(tensor) for key, tensor in known.tensors.items()}
    hub = catalogue.hub(target.family)
    plan = make_plan(layout, known.match.prefix, hub, tensors, name)
    dtype, pixels = _options(plan, target)
    if dtype != "keep" or pixels is not None:
        plan = make_plan(layout, known.match.prefix, hub, tensors, name, dtype=dtype, image_size=pixels)
    return Origin(source, known, plan, open_independently(source, known.state_dict), pixels is not None)


def _options(plan: Plan, target: Converted) -> tuple[str, int | None]:
    """`--dtype` and `--image-size` as they must have been, told from the converted tensors."""
    found = {tensor.dtype.name for tensor in target.state_dict.tensors.values() if tensor.dtype.is_float}
    kept = {value.dtype.name for value in plan.outputs.values() if value.dtype.is_float}
    dtype = found.pop() if len(found) == 1 and found != kept else "keep"
    for spec in plan.target.tensors:
        tensor = target.state_dict.tensors.get(spec.name.text) if spec.positions else None
        if tensor is None or tensor.shape == plan.outputs[spec.name.text].shape:
            continue
        grid = math.isqrt(max(tensor.shape[0] - 1, 0))
        # A table that is no class token and square grid was not resampled: it is wrong, and the bytes will tell.
        if grid and grid**2 + 1 == tensor.shape[0]:
            return dtype, grid * plan.sizes.get("patch", plan.target.sizes["patch"])
    return dtype, None


def _prove_structure(target: Converted, found: Reader) -> list[Check]:
    check, itself = structure.check_layout(target.source.name, target.family, target.state_dict.tensors)
    missing = structure.check_missing(itself) if itself else None
    values = structure.check_values(list(target.state_dict.tensors), found)
    return [check, *([missing] if missing else []), *values]


def _prove_bytes(
    target: Converted, origin: Origin | None, found: Reader, progress: Progress
) -> tuple[State, list[Check]]:
    """What the source gives, by the hub's names, and whether the converted tensors are that."""
    if origin is None:
        return {}, [skipped("bytes", "tensors", "no --source was given: there is nothing to compare with")]
    load, there = checked_as(origin.read), target.state_dict.tensors
    outputs = origin.plan.outputs
    checks = [failed("bytes", name, _presence(name, outputs), [name]) for name in sorted(set(there) ^ set(outputs))]
    hub: State = {}
    for done, (name, value) in enumerate(outputs.items()):
        hub[name] = evaluate(value, load)
        fault = compare(name, found(name), hub[name], value, load) if name in there else None
        if fault is not None:
            # Each search reads the source once more: where all is wrong, a few say enough.
            searched = len(checks) < SEARCHED
            checks.append(elsewhere(fault, found(name), name, outputs, load) if searched else fault)
        progress("bytes", done + 1, len(outputs))
    if len(checks) > len(outputs) / 2:
        detail = f"{len(checks)} of {len(outputs)} tensors differ: this was made from another checkpoint, or otherwise"
        checks.insert(0, failed("bytes", "source", detail, [origin.source.name]))
    return hub, checks or [passed("bytes", "tensors", f"{len(hub)} tensors equal their sources in every bit")]


def _presence(name: str, outputs: dict[str, Any]) -> str:
    return f"{name} is missing, though the source gives it" if name in outputs else f"{name} comes from nothing"


class _Run:
    """The runs of the third proof, on one device and in one precision; what they find adds up here."""

    def __init__(
        self,
        target: Converted,
        origin: Origin | None,
        found: Reader,
        hub: State,
        device: torch.device,
        precision: torch.dtype,
        progress: Progress,
        image: Image | None,
        draw: bool,
    ) -> None:
        self._target, self._origin, self._found, self._hub = target, origin, found, hub
        self._device, self._precision, self._progress = device, precision, progress
        self.checks: list[Check] = []
        self._image, self._draw = image, draw
        self.traces: list[Trace] = []
        self.pictures: list[Picture] = []

    def prove(self, sizes: Sequence[int]) -> str:
        """The encoder at its trained size, then the whole chain at `sizes`; the label of the reference."""
        tensors = {name: self._found(name).to(self._device) for name in self._target.state_dict.tensors}
        check, encoder = structure.check_loads(self._target.family, tensors)
        self.checks.append(check)
        if encoder is None:
            self.checks.append(skipped("outputs", "encoder", "it could not be loaded, so it was not run"))
            return ""
        fault = structure.check_sizes(self._target.family, encoder, self._hub) if self._hub else None
        if fault is not None:
            self.checks += [fault, skipped("outputs", "encoder", "the source's is built otherwise, so it was not run")]
            return ""
        label = self._alone(encoder, self._origin, len(sizes) + 1) if self._origin is not None else ""
        chain = build_chain(self._target.family, encoder, self._hub, self._device)
        for done, size in enumerate(sizes):
            check, trace = check_chain(chain, self._pixels(size), self._precision, self._look)
            self._add(check, trace)
            self._progress("outputs", done + 2, len(sizes) + 1)
        return label

    def _alone(self, encoder: Any, origin: Origin, total: int) -> str:
        """The encoder by itself against the source's own implementation."""
        config = encoder.config
        own, hub = {} if origin.resampled else self._own(origin), self._hub
        if isinstance(config, ClipConfig) and not config.patch_convolution:
            encoder, hub = with_patches(encoder, hub)
        # Made where it runs: its own initialisation, overwritten at once, takes seconds on a processor.
        with self._device:
            reference = build(origin.plan.mapping, encoder.config, own, hub)
        reference.model.eval().to(self._device)
        tested, pixels = _tested(self._target.family, encoder), self._pixels(config.image_size)
        self._add(*check_encoder(tested, reference, pixels, self._precision, self._look))
        self._progress("outputs", 1, total)
        return reference.label

    def _own(self, origin: Origin) -> State:
        """The source's tensors by its own names, in the type that the converted ones have been given."""
        cast = {value.dtype.name for value in origin.plan.outputs.values() if value.dtype.is_float}
        own = {name: origin.read(tensor.key) for name, tensor in origin.known.tensors.items()}
        if len(cast) > 1:
            return own
        dtype = torch_dtype(cast.pop())
        return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in own.items()}

    def _pixels(self, size: int) -> torch.Tensor:
        return images(1, size, self._device, torch.float32, self._image)

    def _look(self, what: str, seen: torch.Tensor, reference: torch.Tensor, converted: torch.Tensor) -> None:
        if self._draw:
            from converter.verify.pictures import draw

            self.pictures += draw(what, seen, reference, converted)

    def _add(self, check: Check, trace: Trace | None) -> None:
        self.checks.append(check)
        if trace is not None:
            self.traces.append(trace)


def _tested(family: str, encoder: Any) -> Tested:
    if family == "sam":
        names = [f"blocks.{i}" for i in range(len(encoder.blocks))]
        return Tested(encoder, list(encoder.blocks), [*names, "neck"], encoder.features)
    names = [f"transformer.layers.{i}" for i in range(len(encoder.transformer.layers))]
    # The last block's output is the whole's: open_clip and timm go on to layers that the DeepEncoder has not.
    return Tested(encoder, list(encoder.transformer.layers), names, encoder)

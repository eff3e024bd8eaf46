"""Checks that the converted encoder computes the same features as the source's own implementation.

The tolerance is measured. The reference runs in the tested precision and in float64; the difference is the rounding
error of a correct implementation, probe by probe: the noise floor. Two correct implementations differ by at most the
sum of their rounding errors, so the tolerance is a small multiple of the noise floor.

A tolerance above `TOLERANCE_LIMIT` hides mistakes, and an error near the tolerance may be rounding. Then both
implementations are compared in float64, where the noise floor is the effect of one rounding of every weight. If that
tolerance is too high as well, the comparison is inconclusive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from converter.tensors.dtypes import dtype_name
from converter.verification.probes import ProbedEncoder, record_features
from converter.verification.result import FAILED, INCONCLUSIVE, PASSED, Check, Control, Trace, TracePoint

GROUP = "outputs"

# The tolerance in noise floors: two, as the errors of two implementations add, times 1.5, as the tested one's may be
# larger. Norms are over a hundred thousand elements or more, so chance hardly matters: correct conversions stay at one.
MARGIN = 3.0
# The same in float64, where the noise floor is the effect of rounding the weights, without that of sums and products.
# Layers can amplify one rounding a billion times: correct conversions reached 6.4 noise floors. Mistakes are far above
# 100, as the smallest change of a float32 weight is half a billion roundings of float64.
MARGIN_FLOAT64 = 100.0
# The tolerance above which a comparison proves nothing.
TOLERANCE_LIMIT = 0.3
# Errors of up to this many tolerances may be amplified rounding errors, which reached 1.2 tolerances in float32.
NEAR_TOLERANCES = 10.0

_OWN_PACKAGE = f"{__name__.partition('.')[0]}."

# Features by probe, in the order of execution.
Features = dict[str, Tensor]


class MistakenFeatures(NamedTuple):
    """The features that a probe would have recorded with a mistake in the tested encoder."""

    mistake: str
    probe: str
    features: Tensor


MakeMistakes = Callable[[Features], Iterable[MistakenFeatures]]


@dataclass(frozen=True)
class Comparison:
    """The result of one run."""

    check: Check
    trace: Trace | None = None  # The errors by probe, if there was a reference
    reference: str = ""  # The label of the reference
    # The pixels, and the last features of the reference and of the tested encoder
    features: tuple[Tensor, Tensor, Tensor] | None = None
    note: str = ""  # A sentence for the verdict; empty if there is none
    controls: Sequence[Control] = ()  # The negative controls of a comparison that passed


class _Run(NamedTuple):
    """The features of both implementations in one precision."""

    tested: Features
    reference: Features
    noise_floors: Mapping[str, float]  # The noise floor of each probe
    margin: float  # The tolerance in noise floors

    @property
    def noise_floor(self) -> float:
        """The highest noise floor of all probes."""
        return max(self.noise_floors.values())

    @property
    def hides_mistakes(self) -> bool:
        """Whether a tolerance is so high that a mistake would not exceed it."""
        return self.margin * self.noise_floor > TOLERANCE_LIMIT


def compare(
    tested: ProbedEncoder,
    reference: ProbedEncoder,
    pixels: Tensor,
    precision: torch.dtype,
    make_mistakes: MakeMistakes = lambda features: (),
) -> Comparison:
    """Compare an encoder with its reference on the same pixels. Both keep their weights, but for roundings of float64.

    Args:
        tested: The converted encoder.
        reference: Another implementation with the source's weights.
        pixels: The image (1, 3, size, size), or tokens (1, N, C) for an encoder whose input is tokens.
        precision: The dtype to compute in. If a tolerance is above `TOLERANCE_LIMIT`, or if the check fails by at most
            `NEAR_TOLERANCES`, the comparison is repeated in float64.
        make_mistakes: Makes mistakes in copies of the tested encoder's blocks, given its features.
    """
    where = f"at {pixels.shape[-1]} x {pixels.shape[-1]}" if pixels.ndim == 4 else f"on {pixels.shape[1]} tokens"
    name, note = f"{reference.label} {where}", ""
    originals = [(encoder.model, _weights_lost_in(precision, encoder.model)) for encoder in (tested, reference)]
    with exact_float32():
        exact = run_in(torch.float64, reference, pixels)
        run = _run_both(precision, tested, reference, pixels, exact)
        check, trace = _judge(name, run)
        dtype = dtype_name(precision)
        if run.hides_mistakes:
            note = f"{name}: compared in float64, as the noise floor in {dtype} is {run.noise_floor:.2g}"
        elif _nearly_passed(check, trace):
            note = f"{name}: compared in float64, as errors in {dtype} are near the tolerance"
        if note:
            _restore(originals)
            run = _run_both(torch.float64, tested, reference, pixels, exact)
            check, trace = _judge(name, run)
        check = _inconclusive(check, run, reference)
        controls = _run_controls(make_mistakes, run, trace) if check.verdict == PASSED else ()
        _restore(originals)
    last_probe = next(reversed(run.reference))
    last_features = (pixels, run.reference[last_probe], run.tested[last_probe]) if last_probe in run.tested else None
    return Comparison(check, trace, reference.label, last_features, note, controls)


def _run_both(
    precision: torch.dtype, tested: ProbedEncoder, reference: ProbedEncoder, pixels: Tensor, exact: Features
) -> _Run:
    """Run both implementations in one precision; `exact` has the reference's features in float64."""
    if precision is torch.float64:
        rounded, changed, margin = exact, _run_perturbed(reference, pixels), MARGIN_FLOAT64
    else:
        rounded = changed = run_in(precision, reference, pixels)
        margin = MARGIN
    # A noise floor is at least one rounding, even if the reference happens to round nothing.
    epsilon = torch.finfo(precision).eps
    noise_floors = {probe: max(distance(changed[probe], exact[probe]), epsilon) for probe in changed}
    return _Run(run_in(precision, tested, pixels), rounded, noise_floors, margin)


def _nearly_passed(check: Check, trace: Trace) -> bool:
    """Return whether a check failed by at most `NEAR_TOLERANCES`, which amplified rounding errors can cause."""
    worst = max((point.error / point.tolerance for point in trace.points), default=math.inf)
    return check.verdict == FAILED and worst <= NEAR_TOLERANCES


@torch.inference_mode()
def _run_controls(make_mistakes: MakeMistakes, run: _Run, trace: Trace) -> list[Control]:
    """Compare the features with each mistake to the reference's, as the features of the tested encoder are."""
    tolerances = {point.probe: point.tolerance for point in trace.points}
    return [
        Control(mistake, probe, distance(features, run.reference[probe]), tolerances[probe])
        for mistake, probe, features in make_mistakes(run.tested)
    ]


def run_in(precision: torch.dtype, encoder: ProbedEncoder, pixels: Tensor) -> Features:
    """Run an encoder in a precision. Its model is cast in place.

    Args:
        precision: The dtype of weights and pixels.
        encoder: The encoder and its probes.
        pixels: Images (B, 3, H, W).
    """
    encoder.model.to(precision)
    with KeepFloat64():
        return record_features(encoder, pixels.to(precision))


def _weights_lost_in(precision: torch.dtype, model: nn.Module) -> dict[str, Tensor]:
    """Return the weights that a cast to `precision` rounds. They are not copied, as the cast replaces the tensors."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
        and tensor.dtype != precision
        and torch.finfo(tensor.dtype).bits >= torch.finfo(precision).bits
    }


def _restore(originals: Iterable[tuple[nn.Module, dict[str, Tensor]]]) -> None:
    for model, weights in originals:
        if weights:
            model.to(torch.float64).load_state_dict(weights, strict=False)


class KeepFloat64(TorchFunctionMode):
    """Keeps float64 where an implementation computes a step in float32, such as softmax or resampled positions."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype is torch.float64:
            if func is Tensor.float:
                return args[0]
            args = [_widened(value) for value in args]
            kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    """Replace float32 by float64 in a dtype or a tensor, as torch does not multiply matrices of both types."""
    if value is torch.float32:
        return torch.float64
    return value.double() if isinstance(value, Tensor) and value.dtype is torch.float32 else value


def _run_perturbed(encoder: ProbedEncoder, pixels: Tensor) -> Features:
    """Run in float64 with every weight changed by about one rounding of float64; the model keeps the change."""
    epsilon = torch.finfo(torch.float64).eps
    generator = torch.Generator(pixels.device).manual_seed(0)
    for weight in encoder.model.to(torch.float64).parameters():
        noise = torch.randn(weight.shape, dtype=weight.dtype, device=weight.device, generator=generator)
        weight.data *= 1 + epsilon * noise
    return run_in(torch.float64, encoder, pixels)


def _judge(name: str, run: _Run) -> tuple[Check, Trace]:
    """Compare the tested features with the reference's in the same precision, probe by probe."""
    for probe in {**run.reference, **run.tested}:
        actual, expected = (
            list(features[probe].shape) if probe in features else "none" for features in (run.tested, run.reference)
        )
        if actual != expected:
            return Check(GROUP, name, FAILED, f"{probe} has shape {actual}, expected {expected}", [probe]), Trace(name)
    points = [
        TracePoint(probe, distance(run.tested[probe], run.reference[probe]), floor, run.margin * floor)
        for probe, floor in run.noise_floors.items()
    ]
    last, diverging = points[-1], [point.probe for point in points if not point.within_tolerance]
    detail = f"relative error {last.error:.2g}, tolerance {last.tolerance:.2g} ({run.margin:g} x noise floor)"
    figures = {"error": last.error, "tolerance": last.tolerance, "noise_floor": last.noise_floor}
    if diverging:
        detail += f"; {diverging[0]} is the first of {len(diverging)} probes to diverge"
    return Check(GROUP, name, FAILED if diverging else PASSED, detail, diverging[:1], figures), Trace(name, points)


def _inconclusive(check: Check, run: _Run, reference: ProbedEncoder) -> Check:
    """Return the check of a run, changed to inconclusive if it passed but could not have failed."""
    if check.verdict != PASSED:
        return check
    if run.hides_mistakes:
        reason = f"no mistake would show: the noise floor is {run.noise_floor:.2g} in float64 too"
    elif any(type(probe.module).__module__.startswith(_OWN_PACKAGE) for probe in reference.probes):
        reason = f"{reference.label} is our own code, no second implementation"
    else:
        return check
    return replace(check, verdict=INCONCLUSIVE, detail=f"{reason}; {check.detail}")


def distance(a: Tensor, b: Tensor) -> float:
    """Return the norm of the difference relative to the norm of `b`; infinity if the result is not finite."""
    a, b = a.double(), b.double()
    value = float((a - b).norm() / b.norm().clamp_min(torch.finfo(torch.float64).tiny))
    return value if math.isfinite(value) else math.inf


def check_tokens(tested: ProbedEncoder, pixels: Tensor, precision: torch.dtype) -> Check:
    """Run a DeepEncoder without a reference, and check that its tokens are finite and have the right number.

    Args:
        tested: The DeepEncoder.
        pixels: The image (1, 3, size, size).
        precision: The dtype to compute in.
    """
    size, model = pixels.shape[-1], cast(Any, tested.model)
    with torch.inference_mode():
        tokens = model.to(precision)(pixels.to(precision))
    expected = model.num_tokens(size)
    name = f"{tested.label} at {size} x {size}"
    if tokens.shape[:2] != (1, expected) or not bool(tokens.isfinite().all()):
        return Check(GROUP, name, FAILED, f"tokens {list(tokens.shape)}: expected {expected}, all finite", [name])
    detail = f"tokens {list(tokens.shape)}, all finite; without --source there is nothing to compare with"
    return Check(GROUP, name, INCONCLUSIVE, detail)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Compute float32 without TensorFloat-32, whose ten bits of mantissa would hide small errors."""
    cudnn: Any = torch.backends.cudnn
    # Before torch 2.9, the setting is allow_tf32.
    recent = hasattr(cudnn, "conv")
    name, value = ("fp32_precision", "ieee") if recent else ("allow_tf32", False)
    owners: list[Any] = [torch.backends.cuda.matmul, cudnn.conv if recent else cudnn]
    before = [getattr(owner, name) for owner in owners]
    for owner in owners:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, setting in zip(owners, before, strict=True):
            setattr(owner, name, setting)

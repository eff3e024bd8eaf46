"""Outputs: the converted encoder computes the same features as the source's own implementation.

The tolerance is measured. The reference runs in the tested precision and in float64; the difference is the rounding
error of a correct implementation, probe by probe: the noise floor. Two correct implementations differ by at most the
sum of their rounding errors, so the tolerance is a small multiple of the noise floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from converter.verification.probes import ProbedEncoder, record_features
from converter.verification.result import FAILED, INCONCLUSIVE, PASSED, Check, Control, Trace, TracePoint

GROUP = "outputs"

# Two noise floors, as two errors add, and half as much again, as the other implementation's may be larger. The norms
# are of a hundred thousand elements and more, so chance hardly matters; correct conversions stay at one noise floor.
MARGIN = 3.0


# Features by probe, in the order of execution.
Features = dict[str, Tensor]


@dataclass(frozen=True)
class MistakenFeatures:
    """What a probe of the tested encoder would have recorded with a mistake in the encoder."""

    mistake: str
    probe: str
    features: Tensor


MakeMistakes = Callable[[Features], Iterable[MistakenFeatures]]


@dataclass(frozen=True)
class Comparison:
    """The result of one run: the verdict, the errors by probe, and the label of the reference, if there was one.

    `features` are the pixels, and the last features of the reference and of the tested encoder. A comparison that
    failed has no negative controls.
    """

    check: Check
    trace: Trace | None = None
    reference: str = ""
    features: tuple[Tensor, Tensor, Tensor] | None = None
    controls: Sequence[Control] = ()


def compare(
    tested: ProbedEncoder,
    reference: ProbedEncoder,
    pixels: Tensor,
    precision: torch.dtype,
    make_mistakes: MakeMistakes = lambda features: (),
) -> Comparison:
    """Run an encoder and its reference on the same pixels; both models are left in `precision`.

    Args:
        tested: The converted encoder.
        reference: Another implementation with the source's weights.
        pixels: The image (1, 3, size, size).
        precision: The type to compute in.
        make_mistakes: Makes mistakes in the tested encoder, given its features.
    """
    with exact_float32():
        # float64 first: a model that has been rounded does not get its weights back.
        exact = _run_in(torch.float64, reference, pixels)
        rounded = _run_in(precision, reference, pixels)
        features = _run_in(precision, tested, pixels)
        name = f"{reference.label} at {pixels.shape[-1]} x {pixels.shape[-1]}"
        check, trace = _judge(name, features, rounded, exact, torch.finfo(precision).eps)
        controls = _control(make_mistakes, features, rounded, trace) if check.verdict == PASSED else ()
    last = next(reversed(rounded))
    final = (pixels, rounded[last], features[last]) if last in features else None
    return Comparison(check, trace, reference.label, final, controls)


@torch.inference_mode()
def _control(make_mistakes: MakeMistakes, features: Features, rounded: Features, trace: Trace) -> list[Control]:
    """Compare the features of each mistake with the reference's, like those of the tested encoder."""
    tolerances = {point.probe: point.tolerance for point in trace.points}
    return [
        Control(each.mistake, each.probe, _distance(each.features, rounded[each.probe]), tolerances[each.probe])
        for each in make_mistakes(features)
    ]


def _run_in(precision: torch.dtype, encoder: ProbedEncoder, pixels: Tensor) -> Features:
    encoder.model.to(precision)
    return record_features(encoder, pixels.to(precision))


def _judge(name: str, tested: Features, rounded: Features, exact: Features, epsilon: float) -> tuple[Check, Trace]:
    """Compare the tested features with the reference's, in the same precision and in float64, probe by probe.

    No noise floor is below `epsilon`, one rounding, even where the reference happens to round nothing.
    """
    for probe in {**rounded, **tested}:
        shapes = [list(features[probe].shape) if probe in features else "none" for features in (tested, rounded)]
        if shapes[0] != shapes[1]:
            detail = f"{probe} has shape {shapes[0]}, expected {shapes[1]}"
            return Check(GROUP, name, FAILED, detail, [probe]), Trace(name)
    points = []
    for probe in rounded:
        floor = max(_distance(rounded[probe], exact[probe]), epsilon)
        points.append(TracePoint(probe, _distance(tested[probe], rounded[probe]), floor, MARGIN * floor))
    last, over = points[-1], [point.probe for point in points if not point.within_tolerance]
    detail = f"relative error {last.error:.2g}, tolerance {last.tolerance:.2g} ({MARGIN:g} x noise floor)"
    figures = {"error": last.error, "tolerance": last.tolerance, "noise_floor": last.noise_floor}
    if over:
        detail += f"; {over[0]} is the first of {len(over)} probes to diverge"
        return Check(GROUP, name, FAILED, detail, over[:1], figures), Trace(name, points)
    return Check(GROUP, name, PASSED, detail, figures=figures), Trace(name, points)


def _distance(a: Tensor, b: Tensor) -> float:
    """The norm of the difference relative to the norm of `b`; infinite where either is not finite."""
    a, b = a.double(), b.double()
    value = float((a - b).norm() / b.norm().clamp_min(torch.finfo(torch.float64).tiny))
    return value if math.isfinite(value) else math.inf


def check_tokens(tested: ProbedEncoder, pixels: Tensor, precision: torch.dtype) -> Check:
    """Run a DeepEncoder without a reference: whether its tokens have the right number and are finite.

    Args:
        tested: The DeepEncoder.
        pixels: The image (1, 3, size, size).
        precision: The type to compute in.
    """
    size, model = pixels.shape[-1], cast(Any, tested.model)
    with torch.inference_mode():
        tokens = model.to(precision)(pixels.to(precision))
    side = math.ceil(size / (4 * model.sam_model.config.patch))
    name = f"{tested.label} at {size} x {size}"
    if tokens.shape[:2] != (1, side * side) or not bool(tokens.isfinite().all()):
        return Check(GROUP, name, FAILED, f"tokens {list(tokens.shape)}: expected {side * side}, all finite", [name])
    detail = f"tokens {list(tokens.shape)}, all finite; no second implementation to compare with"
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

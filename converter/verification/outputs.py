"""Outputs: the converted encoder computes the same features as the source's own implementation.

The tolerance is measured. The reference runs in the tested precision and in float64; the difference is the rounding
error of a correct implementation, probe by probe: the noise floor. Two correct implementations differ by at most the
sum of their rounding errors, so the tolerance is a small multiple of the noise floor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from converter.verification.probes import ProbedEncoder, record_features
from converter.verification.result import FAILED, PASSED, Check, Trace, TracePoint

if TYPE_CHECKING:
    from PIL.Image import Image

GROUP = "outputs"

# Two noise floors, as two errors add, and half as much again, as the other implementation's may be larger. The norms
# are of a hundred thousand elements and more, so chance hardly matters; correct conversions stay at one noise floor.
MARGIN = 3.0


@dataclass(frozen=True)
class Comparison:
    """The result of one run.

    Attributes:
        check: The verdict.
        trace: The errors by probe, if there was a reference.
        reference: The reference's label.
        features: The pixels, and the last features of the reference and of the tested encoder.
    """

    check: Check
    trace: Trace | None = None
    reference: str = ""
    features: tuple[Tensor, Tensor, Tensor] | None = None


def compare(tested: ProbedEncoder, reference: ProbedEncoder, pixels: Tensor, precision: torch.dtype) -> Comparison:
    """Run an encoder and its reference on the same pixels; both models are left in `precision`.

    Args:
        tested: The converted encoder.
        reference: Another implementation with the source's weights.
        pixels: The image (1, 3, size, size).
        precision: The type to compute in.
    """
    with exact_float32():
        # float64 first: a model that has been rounded does not get its weights back.
        exact = _run_in(torch.float64, reference, pixels)
        rounded = _run_in(precision, reference, pixels)
        features = _run_in(precision, tested, pixels)
    name = f"{reference.label} at {pixels.shape[-1]} x {pixels.shape[-1]}"
    check, trace = judge(name, features, rounded, exact, torch.finfo(precision).eps)
    last = next(reversed(rounded))
    final = (pixels, rounded[last], features[last]) if last in features else None
    return Comparison(check, trace, reference.label, final)


def _run_in(precision: torch.dtype, encoder: ProbedEncoder, pixels: Tensor) -> dict[str, Tensor]:
    encoder.model.to(precision)
    return record_features(encoder, pixels.to(precision))


def judge(
    name: str, tested: Mapping[str, Tensor], rounded: Mapping[str, Tensor], exact: Mapping[str, Tensor], epsilon: float
) -> tuple[Check, Trace]:
    """Compare features probe by probe.

    Args:
        name: The name of the check.
        tested: Features of the converted encoder.
        rounded: Features of the reference in the same precision.
        exact: Features of the reference in float64.
        epsilon: The smallest noise floor: one rounding, even where the reference happens to round nothing.
    """
    for probe in {**rounded, **tested}:
        shapes = [list(features[probe].shape) if probe in features else "none" for features in (tested, rounded)]
        if shapes[0] != shapes[1]:
            return Check(GROUP, name, FAILED, f"{probe} has shape {shapes[0]}, expected {shapes[1]}", [probe]), Trace(
                name
            )
    floors = {probe: max(distance(rounded[probe], exact[probe]), epsilon) for probe in rounded}
    points = [
        TracePoint(probe, distance(tested[probe], rounded[probe]), floor, MARGIN * floor)
        for probe, floor in floors.items()
    ]
    last, over = points[-1], [point.probe for point in points if not point.within_tolerance]
    detail = f"relative error {last.error:.2g}, tolerance {last.tolerance:.2g} ({MARGIN:g} x noise floor)"
    figures = {"error": last.error, "tolerance": last.tolerance, "noise_floor": last.noise_floor}
    if over:
        detail += f"; {over[0]} is the first of {len(over)} probes to diverge"
        return Check(GROUP, name, FAILED, detail, over[:1], figures), Trace(name, points)
    return Check(GROUP, name, PASSED, detail, figures=figures), Trace(name, points)


def distance(a: Tensor, b: Tensor) -> float:
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
    return Check(
        GROUP, name, PASSED, f"tokens {list(tokens.shape)}, all finite; no second implementation to compare with"
    )


@contextmanager
def exact_float32() -> Iterator[None]:
    """Compute float32 without TensorFloat-32, whose ten bits of mantissa would hide small errors."""
    switches = _tensor_float_switches()
    before = [getattr(owner, name) for owner, name, _ in switches]
    for owner, name, value in switches:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(switches, before, strict=True):
            setattr(owner, name, value)


def _tensor_float_switches() -> list[tuple[Any, str, Any]]:
    """torch's settings of TensorFloat-32, each as an object, its attribute, and the value that disables it."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(cudnn, "conv"):
        return [(matmul, "fp32_precision", "ieee"), (cudnn.conv, "fp32_precision", "ieee")]
    # Before torch 2.9.
    return [(matmul, "allow_tf32", False), (cudnn, "allow_tf32", False)]


def pixels_of(image: Image | None, size: int, device: torch.device) -> Tensor:
    """Pixels (1, 3, size, size) as DeepSeek-OCR prepares them.

    Args:
        image: The image; a drawn page by default.
        size: Pixels along a side.
        device: Where the result is.
    """
    # PIL is not imported by a verification without runs.
    from converter.verification import pictures

    pixels = pictures.pixels(image or pictures.page(size), size)
    # Seeded noise, so that blank patches differ.
    noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(size))
    return (pixels + 0.02 * noise).to(device)

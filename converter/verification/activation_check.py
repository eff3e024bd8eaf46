"""Compares another implementation's activations with ours, stage by stage, and finds the mistake that explains them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from converter.errors import first_names
from converter.verification.activations import PIXELS, StagedEncoder
from converter.verification.families import FAMILIES
from converter.verification.outputs import MARGIN, TOLERANCE_LIMIT, Features, distance
from converter.verification.port_mistakes import COMMON_CAUSES, PIXEL_MISTAKES, Mistake, known_mistakes, with_mistakes
from converter.verification.result import ACTIVATIONS, FAILED, INCONCLUSIVE, PASSED, SKIPPED, Check, Trace, TracePoint

# A mistake explains a difference if it reduces the error to the tolerance, or to this fraction of the error.
_MAX_UNEXPLAINED = 0.1
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _ComparedStage:
    """The errors of one stage."""

    point: TracePoint
    scale_error: float  # The factor by which the activations are nearest to ours, minus one
    scale_tolerance: float

    @property
    def departs(self) -> bool:
        """Whether the stage differs by more than rounding."""
        return not (self.point.within_tolerance and abs(self.scale_error) <= self.scale_tolerance)


def compare_stages(encoder: StagedEncoder, pixels: Tensor, theirs: Mapping[str, Tensor]) -> tuple[Check, Trace | None]:
    """Compare another implementation's activations for one image with ours.

    Args:
        encoder: Our encoder, with the weights of the other implementation.
        pixels: The image (1, 3, size, size).
        theirs: The other implementation's activations by stage, with the axes in our order (channels first).
    """
    name = f"at {pixels.shape[-1]} x {pixels.shape[-1]}"
    exact = encoder.activations(pixels, torch.float64)
    for stage, tensor in theirs.items():
        if tensor.dtype not in _FLOATS:
            return Check(ACTIVATIONS, name, FAILED, f"{stage} is {tensor.dtype}, expected a float type", [stage]), None
        if tensor.shape != exact[stage].shape:
            shapes = f"{list(tensor.shape)}, expected {list(exact[stage].shape)}"
            return Check(ACTIVATIONS, name, FAILED, f"{stage} has shape {shapes}", [stage]), None
    compared = _compare_all(encoder, pixels, exact, theirs)
    trace = Trace(name, [stage.point for stage in compared])
    departing = [stage for stage in compared if stage.departs]
    point = departing[0].point if departing else compared[-1].point
    figures = {"error": point.error, "tolerance": point.tolerance, "noise_floor": point.noise_floor}
    if departing:
        detail = f"{_describe_departure(departing, compared)}; {_cause(encoder, pixels, exact, theirs, compared)}"
        return Check(ACTIVATIONS, name, FAILED, detail, [point.probe], figures), trace
    detail = f"{len(compared)} of {len(exact)} stages agree; {point.probe}: relative error {point.error:.2g}, "
    detail += f"tolerance {point.tolerance:.2g}"
    if any(stage.point.tolerance > TOLERANCE_LIMIT for stage in compared):
        detail = f"no mistake would show in this type: {detail}"
        return Check(ACTIVATIONS, name, INCONCLUSIVE, detail, figures=figures), trace
    return Check(ACTIVATIONS, name, PASSED, detail, figures=figures), trace


def _compare_all(
    encoder: StagedEncoder, pixels: Tensor, exact: Features, theirs: Mapping[str, Tensor]
) -> list[_ComparedStage]:
    """Compare the stages in the order of computation, each with the noise floor of its tensor's dtype."""
    dtypes = {_rounding_dtype(tensor) for tensor in theirs.values()}
    rounded = {dtype: encoder.activations(pixels, dtype) for dtype in dtypes}
    compared = []
    for stage in (stage for stage in exact if stage in theirs):
        dtype = _rounding_dtype(theirs[stage])
        ours, expected = rounded[dtype][stage], exact[stage]
        actual = theirs[stage].to(expected.device)
        floor = max(distance(ours, expected), torch.finfo(dtype).eps)
        point = TracePoint(stage, distance(actual, expected), floor, MARGIN * floor)
        # Rounding hardly changes the scale, so a scale error of 1 % shows even if rounding errors are larger than that.
        tolerance = max(MARGIN * abs(_scale_error(ours, expected)), floor / 4)
        compared.append(_ComparedStage(point, _scale_error(actual, expected), tolerance))
    return compared


def _rounding_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype that limits a tensor's precision: float32 for float64, as no port computes all in float64."""
    return torch.float32 if tensor.dtype is torch.float64 else tensor.dtype


def _scale_error(actual: Tensor, expected: Tensor) -> float:
    """Return the factor that brings `expected` nearest to `actual`, minus one."""
    actual, expected = actual.double(), expected.double()
    norm_squared = expected.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    return float((actual - expected).mul(expected).sum() / norm_squared)


def _describe_departure(departing: Sequence[_ComparedStage], compared: Sequence[_ComparedStage]) -> str:
    first = departing[0]
    text = f"{first.point.probe} is the first of {len(departing)} stages to depart, of {len(compared)}: relative error "
    text += f"{first.point.error:.2g}, tolerance {first.point.tolerance:.2g}"
    return text if first.point.error != float("inf") else f"{text}; it has NaN or infinity"


def _cause(
    encoder: StagedEncoder,
    pixels: Tensor,
    exact: Features,
    theirs: Mapping[str, Tensor],
    compared: Sequence[_ComparedStage],
) -> str:
    """Describe the known mistake that explains the first departing stage, or else what is usually wrong there."""
    first = next(stage.point for stage in compared if stage.departs)
    common_cause = next(text for pattern, text in COMMON_CAUSES.items() if fnmatchcase(first.probe, pattern))
    if first.error != float("inf"):
        target = theirs[first.probe].to(exact[first.probe].device)
        scale = 1 + _scale_error(target, exact[first.probe])
        if distance(target, scale * exact[first.probe]) <= first.tolerance:
            return f"its values are ours times {scale:.4g}"
        explanation = _best_explanation(_try_mistakes(encoder, pixels, exact, compared, target), first)
        if explanation is not None:
            error, mistake = explanation
            extent = "explained by" if error <= first.tolerance else f"explained but for {error:.2g} by"
            return f"{extent}: {mistake}"
    return f"usually wrong there: {common_cause}" if common_cause else "no known mistake explains it"


def _best_explanation(trials: Iterable[tuple[float, str]], point: TracePoint) -> tuple[float, str] | None:
    """Return the smallest error and its mistake, or None if that mistake explains too little."""
    best: tuple[float, str] | None = None
    for error, mistake in trials:
        if best is None or error < best[0]:
            best = error, mistake
        if error <= point.tolerance:
            break
    return best if best is not None and best[0] <= max(point.tolerance, _MAX_UNEXPLAINED * point.error) else None


def _try_mistakes(
    encoder: StagedEncoder, pixels: Tensor, exact: Features, compared: Sequence[_ComparedStage], target: Tensor
) -> Iterator[tuple[float, str]]:
    """Yield the error at the first departing stage with each known mistake, then with the best and each other one."""
    first = next(stage.point.probe for stage in compared if stage.departs)
    suspects = _suspect_stages(list(exact), compared, first)
    if PIXELS in suspects:
        for name, change in PIXEL_MISTAKES.items():
            changed = change(pixels)
            features = changed if first == PIXELS else encoder.activations(changed, torch.float32)[first]
            yield distance(target, features), name
    families = [name for name, family in FAMILIES.items() if any(stage.startswith(family.prefix) for stage in suspects)]

    def error_with(*mistakes: Mistake) -> float:
        model: nn.Module = with_mistakes(encoder.model, mistakes)
        features = encoder.activations(pixels, torch.float32, model)[first]
        return distance(target, features) if features.shape == target.shape else float("inf")

    mistakes = known_mistakes(families)
    errors = {mistake: error_with(mistake) for mistake in mistakes}
    yield from ((error, mistake.name) for mistake, error in errors.items())
    if errors:
        best = min(errors, key=lambda mistake: errors[mistake])
        others = [other for other in mistakes if other is not best]
        yield from ((error_with(best, other), f"{best.name} and {other.name}") for other in others)


def _suspect_stages(order: Sequence[str], compared: Sequence[_ComparedStage], first: str) -> list[str]:
    """Return the stages after the last agreeing one, up to and including the first departing stage."""
    agreeing = [order.index(stage.point.probe) for stage in compared if not stage.departs]
    end = order.index(first)
    start = max((index for index in agreeing if index < end), default=-1)
    return list(order[start + 1 : end + 1])


def check_weights(encoder: StagedEncoder, metadata: Mapping[str, str]) -> Check:
    """Compare the digests of the weights in an activation file's metadata with those of our encoder."""
    if "weights" not in metadata:
        return Check(ACTIVATIONS, "weights", SKIPPED, "the file names no digest of the weights (docs/activations.md)")
    if metadata["weights"] == encoder.digests["weights"]:
        return Check(ACTIVATIONS, "weights", PASSED, "activations of the same weights")
    differing = [name for name, digest in encoder.digests.items() if metadata.get(name) not in (None, digest)]
    parts = [name.removeprefix("weights.") for name in differing if name != "weights"]
    names = f", in {first_names(parts)}" if parts else ""
    return Check(ACTIVATIONS, "weights", FAILED, f"the activations are of other weights{names}", parts)

"""Compares activations of another implementation with ours by stage, and names the mistake that explains them."""

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
from converter.verification.port_mistakes import PIXEL_MISTAKES, USUAL, Mistake, known_mistakes, with_mistakes
from converter.verification.result import ACTIVATIONS, FAILED, INCONCLUSIVE, PASSED, SKIPPED, Check, Trace, TracePoint

# Errors are multiplied by this if a mistake explains most, and not all of them.
_MOST = 0.1
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _ComparedStage:
    """One stage."""

    point: TracePoint
    scale: float  # The factor between their values and ours, less one
    scale_tolerance: float

    @property
    def departs(self) -> bool:
        """Whether the stage differs by more than rounding."""
        return not (self.point.within_tolerance and abs(self.scale) <= self.scale_tolerance)


def compare_stages(encoder: StagedEncoder, pixels: Tensor, theirs: Mapping[str, Tensor]) -> tuple[Check, Trace | None]:
    """Compare the activations of one image.

    Args:
        encoder: The encoder with the right weights.
        pixels: The image (1, 3, size, size).
        theirs: The other implementation's activations by stage, channels first as ours.
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
    last = (departing or compared)[0 if departing else -1].point
    figures = {"error": last.error, "tolerance": last.tolerance, "noise_floor": last.noise_floor}
    if departing:
        detail = _departure(departing, compared)
        cause = _cause(encoder, pixels, exact, theirs, compared)
        return Check(ACTIVATIONS, name, FAILED, f"{detail}; {cause}", [last.probe], figures), trace
    detail = f"{len(compared)} of {len(exact)} stages agree; {last.probe}: relative error {last.error:.2g}, tolerance "
    detail += f"{last.tolerance:.2g}"
    if any(stage.point.tolerance > TOLERANCE_LIMIT for stage in compared):
        return Check(
            ACTIVATIONS, name, INCONCLUSIVE, f"no mistake would show in this type: {detail}", [], figures
        ), trace
    return Check(ACTIVATIONS, name, PASSED, detail, figures=figures), trace


def _compare_all(
    encoder: StagedEncoder, pixels: Tensor, exact: Features, theirs: Mapping[str, Tensor]
) -> list[_ComparedStage]:
    """Compare the stages in the order of computation, each with the noise floor of its tensor's type."""
    types = {_computed_in(tensor) for tensor in theirs.values()}
    rounded = {dtype: encoder.activations(pixels, dtype) for dtype in types}
    compared = []
    for stage in (stage for stage in exact if stage in theirs):
        dtype = _computed_in(theirs[stage])
        ours, expected = rounded[dtype][stage], exact[stage]
        actual = theirs[stage].to(expected.device)
        floor = max(distance(ours, expected), torch.finfo(dtype).eps)
        point = TracePoint(stage, distance(actual, expected), floor, MARGIN * floor)
        # Rounding errors hardly change the scale, and the scale of a stage shows 1 % in types whose errors are larger.
        tolerance = max(MARGIN * abs(_scale(ours, expected)), floor / 4)
        compared.append(_ComparedStage(point, _scale(actual, expected), tolerance))
    return compared


def _computed_in(tensor: Tensor) -> torch.dtype:
    """Return the type whose rounding errors a tensor has: float32 for float64, as no port computes all in float64."""
    return torch.float32 if tensor.dtype is torch.float64 else tensor.dtype


def _scale(a: Tensor, b: Tensor) -> float:
    """Return the factor by which `b` is nearest to `a`, minus one."""
    a, b = a.double(), b.double()
    return float((a - b).mul(b).sum() / b.square().sum().clamp_min(torch.finfo(torch.float64).tiny))


def _departure(departing: Sequence[_ComparedStage], compared: Sequence[_ComparedStage]) -> str:
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
    usual = next(text for pattern, text in USUAL.items() if fnmatchcase(first.probe, pattern))
    if first.error != float("inf"):
        target = theirs[first.probe].to(exact[first.probe].device)
        scale = 1 + _scale(target, exact[first.probe])
        if distance(target, scale * exact[first.probe]) <= first.tolerance:
            return f"its values are ours times {scale:.4g}"
        found = _best(_trials(encoder, pixels, exact, compared, target), first)
        if found is not None:
            error, text = found
            how = "explained by" if error <= first.tolerance else f"explained but for {error:.2g} by"
            return f"{how}: {text}"
    return f"usually wrong there: {usual}" if usual else "no known mistake explains it"


def _best(trials: Iterable[tuple[float, str]], point: TracePoint) -> tuple[float, str] | None:
    """Return the mistake with the smallest error; None if it explains little."""
    best: tuple[float, str] | None = None
    for error, text in trials:
        if best is None or error < best[0]:
            best = error, text
        if error <= point.tolerance:
            break
    return best if best is not None and best[0] <= max(point.tolerance, _MOST * point.error) else None


def _trials(
    encoder: StagedEncoder, pixels: Tensor, exact: Features, compared: Sequence[_ComparedStage], target: Tensor
) -> Iterator[tuple[float, str]]:
    """Yield the error at the first departing stage for each known mistake, then for the best with each other one."""
    first = next(stage.point.probe for stage in compared if stage.departs)
    between = _between(list(exact), compared, first)
    if PIXELS in between:
        for name, change in PIXEL_MISTAKES.items():
            changed = change(pixels)
            found = changed if first == PIXELS else encoder.activations(changed, torch.float32)[first]
            yield distance(target, found), name
    families = [name for name, family in FAMILIES.items() if any(stage.startswith(family.prefix) for stage in between)]

    def error(*mistakes: Mistake) -> float:
        model: nn.Module = with_mistakes(encoder.model, mistakes)
        found = encoder.activations(pixels, torch.float32, model)[first]
        return distance(target, found) if found.shape == target.shape else float("inf")

    mistakes = known_mistakes(families)
    errors = {mistake: error(mistake) for mistake in mistakes}
    yield from ((value, mistake.name) for mistake, value in errors.items())
    if errors:
        best = min(errors, key=lambda mistake: errors[mistake])
        others = [other for other in mistakes if other is not best]
        yield from ((error(best, other), f"{best.name} and {other.name}") for other in others)


def _between(order: Sequence[str], compared: Sequence[_ComparedStage], first: str) -> list[str]:
    """Return the stages after the last agreeing one, up to and including the first departing stage."""
    agreeing = [order.index(stage.point.probe) for stage in compared if not stage.departs]
    end = order.index(first)
    start = max((index for index in agreeing if index < end), default=-1)
    return list(order[start + 1 : end + 1])


def check_weights(encoder: StagedEncoder, metadata: Mapping[str, str]) -> Check:
    """Compare the digests of the weights in a file's metadata with those of the encoder."""
    if "weights" not in metadata:
        return Check(ACTIVATIONS, "weights", SKIPPED, "the file names no digest of the weights (docs/activations.md)")
    if metadata["weights"] == encoder.digests["weights"]:
        return Check(ACTIVATIONS, "weights", PASSED, "activations of the same weights")
    other = [name for name, digest in encoder.digests.items() if metadata.get(name) not in (None, digest)]
    parts = [name.removeprefix("weights.") for name in other if name != "weights"]
    names = f", in {first_names(parts)}" if parts else ""
    return Check(ACTIVATIONS, "weights", FAILED, f"the activations are of other weights{names}", parts)

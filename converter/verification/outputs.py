"""The third proof: the converted encoder computes what the source's own implementation computes.

The bar is not chosen but measured. The reference runs in the tested precision and in float64; its distance from itself
is the rounding error that any correct implementation has in that precision, block by block. Two correct implementations
lie at most the sum of their errors apart, so the bar is a small multiple of that floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from converter.verification.reference_models import Runner
from converter.verification.result import Check, Trace, TracePoint, failed, passed

if TYPE_CHECKING:
    from PIL.Image import Image

GROUP = "outputs"

# Told what was compared, what both saw, the reference's final features and the converted encoder's.
Look = Callable[[str, Tensor, Tensor, Tensor], None]

# The errors of two implementations add, which makes two floors, and theirs need not be alike: half as much again. Luck
# has little part in it, for the norms are of a hundred thousand elements and more; correct ones were seen at one floor.
MARGIN = 3.0


def pixels_of(image: Image | None, size: int, device: torch.device) -> Tensor:
    """Pixels (1, 3, size, size) as DeepSeek-OCR prepares them: of `image`, or of a page that has what documents have.

    Faint seeded noise keeps a blank patch from being as blank as the next.
    """
    # PIL, which a verification that runs nothing can do without.
    from converter.verification import pictures

    looked_at = pictures.pixels(image or pictures.page(size), size)
    noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(size))
    return (looked_at + 0.02 * noise).to(device)


@contextmanager
def exact_float32() -> Iterator[None]:
    """float32 without TensorFloat-32, whose ten bits of mantissa would hide what is looked for."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def run_recorded(encoder: Runner, pixels: Tensor) -> list[Tensor]:
    """The features at every place, in the order in which they are passed, and last what the whole gives."""
    recorded: list[Tensor] = []

    def leaving(module: nn.Module, arguments: Any, output: Any) -> None:
        recorded.append(_tensor(output).detach().clone())

    def entering(module: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
        recorded.append((arguments or tuple(named.values()))[0].detach().clone())

    handles = [
        place.module.register_forward_pre_hook(entering, with_kwargs=True)
        if place.entering
        else place.module.register_forward_hook(leaving)
        for place in encoder.places
    ]
    try:
        with torch.inference_mode():
            final = _tensor(encoder.run(pixels)).detach()
    finally:
        for handle in handles:
            handle.remove()
    return [*recorded, final]


def _tensor(output: Any) -> Tensor:
    """The features in what a module returns: a tensor, a tuple that begins with it, or transformers' output object."""
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "last_hidden_state"):
        found: Tensor = output.last_hidden_state
        return found
    return _tensor(output[0])


def distance(a: Tensor, b: Tensor) -> float:
    """The norm of the difference relative to the norm of `b`; infinite where either is not finite."""
    a, b = a.double(), b.double()
    value = float((a - b).norm() / b.norm().clamp_min(torch.finfo(torch.float64).tiny))
    return value if math.isfinite(value) else math.inf


def check_encoder(
    tested: Runner, names: list[str], reference: Runner, pixels: Tensor, precision: torch.dtype, look: Look
) -> tuple[Check, Trace]:
    """The converted encoder against the reference on the same pixels, and the floor measured in the same run.

    `names` are those of the converted encoder's places, and a last one for the whole, if that is no place. Both models
    are left in `precision`. `look` is shown the features at the end.
    """
    with exact_float32():
        # From the source's own type down: a model once rounded does not get its weights back.
        exact = _run_in(torch.float64, reference, pixels)
        rounded = _run_in(precision, reference, pixels)
        found = _run_in(precision, tested, pixels)
    what = f"{reference.label} at {pixels.shape[-1]} x {pixels.shape[-1]}"
    last = len(names) - 1
    if len(found) > last:
        look(what, pixels, rounded[last], found[last])
    return judge(what, names, found, rounded, exact, precision)


def _run_in(precision: torch.dtype, encoder: Runner, pixels: Tensor) -> list[Tensor]:
    encoder.model.to(precision)
    return run_recorded(encoder, pixels.to(precision))


def judge(
    what: str, names: list[str], found: list[Tensor], rounded: list[Tensor], exact: list[Tensor], precision: torch.dtype
) -> tuple[Check, Trace]:
    """Errors against the rounded reference, floors of that reference against the exact one, and the verdict."""
    # A reference may go on where the DeepEncoder ends: its last output then has no name here.
    found, rounded, exact = (features[: len(names)] for features in (found, rounded, exact))
    if [tuple(tensor.shape) for tensor in found] != [tuple(tensor.shape) for tensor in rounded]:
        shapes = f"{[list(t.shape) for t in found[-1:]]} and {[list(t.shape) for t in rounded[-1:]]}"
        return failed(GROUP, what, f"outputs have other shapes: {shapes}", []), Trace(what)
    # No floor lies below one rounding, even where the reference happens to round nothing.
    smallest = torch.finfo(precision).eps
    floors = [max(distance(a, b), smallest) for a, b in zip(rounded, exact, strict=True)]
    errors = [distance(a, b) for a, b in zip(found, rounded, strict=True)]
    points = [
        TracePoint(name, error, floor, MARGIN * floor) for name, error, floor in zip(names, errors, floors, strict=True)
    ]
    over = [point.probe for point in points if not point.within_tolerance]
    last, trace = points[-1], Trace(what, points)
    detail = f"relative error {last.error:.2g}, tolerance {last.tolerance:.2g} ({MARGIN:g} x noise floor)"
    figures = {"error": last.error, "tolerance": last.tolerance, "noise_floor": last.noise_floor}
    if over:
        where = f"{over[0]} is the first of {len(over)} to diverge"
        return failed(GROUP, what, f"{detail}; {where}", over[:1], **figures), trace
    return passed(GROUP, what, detail, **figures), trace

"""Bytes: every converted tensor equals, bit by bit, what the mapping makes of its source tensors.

Both are read by the formats' own libraries. Only this check sees what outputs cannot show: k's bias, which the softmax
cancels, and any change below the noise floor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from converter.storage.progress import OnProgress
from converter.tensors.evaluate import bit_view, evaluate
from converter.tensors.lazy_tensor import Concat, LazyTensor, source_tensors
from converter.tensors.tensor_info import TensorInfo
from converter.verification.inputs import Converted, Origin
from converter.verification.result import FAILED, PASSED, Check

GROUP = "bytes"

# Differing tensors whose content is searched under other names: each search reads the whole source once more.
_SEARCHED = 12

Load = Callable[[TensorInfo], Tensor]


@dataclass(frozen=True)
class ComparedSource:
    """The source, its tensors by canonical names, and the checks of the converted tensors against them."""

    origin: Origin
    canonical: Mapping[str, Tensor]
    checks: Sequence[Check]

    @property
    def differing(self) -> list[str]:
        """The converted tensors that differ from the source's."""
        return [check.tensors[0] for check in self.checks if check.verdict == FAILED]


def check_bytes(target: Converted, origin: Origin, on_progress: OnProgress) -> ComparedSource:
    """Compare every converted tensor with its source tensors.

    Args:
        target: The converted file.
        origin: The source and its plan.
        on_progress: Called after each tensor.
    """
    tensors, outputs = target.tensors, origin.plan.outputs

    def load(tensor: TensorInfo) -> Tensor:
        return origin.read(tensor)

    missing = dict.fromkeys(outputs.keys() - tensors.keys(), "is missing, though the source has it")
    extra = dict.fromkeys(tensors.keys() - outputs.keys(), "is not produced from any source tensor")
    checks = [Check(GROUP, name, FAILED, f"{name} {why}", [name]) for name, why in sorted({**missing, **extra}.items())]
    expected: dict[str, Tensor] = {}
    for done, (name, value) in enumerate(outputs.items(), 1):
        expected[name] = evaluate(value, load)
        check = _compare(name, target.read(tensors[name]), expected[name], value, load) if name in tensors else None
        if check is not None:
            if len(checks) < _SEARCHED:
                check = _with_true_name(check, target.read(tensors[name]), name, outputs, load)
            if rule := origin.plan.rules.get(name):
                check = replace(check, detail=f"{check.detail}; made by {rule.location}")
            checks.append(check)
        on_progress(GROUP, done, len(outputs))
    if len(checks) > len(outputs) / 2:
        cause = "converted from a different checkpoint, or with other options"
        detail = f"{len(checks)} of {len(outputs)} tensors differ: {cause}"
        checks.insert(0, Check(GROUP, "source", FAILED, detail, [origin.source.name]))
    detail = f"{len(expected)} tensors equal their sources in every bit"
    return ComparedSource(origin, expected, checks or [Check(GROUP, "tensors", PASSED, detail)])


def _compare(name: str, actual: Tensor, expected: Tensor, value: LazyTensor, load: Load) -> Check | None:
    """None if all bits are equal; else a failed check with a likely cause."""
    sources = " + ".join(tensor.key for tensor in source_tensors(value)) or "generated values"
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        detail = f"{name} is {_kind(actual)}, expected {_kind(expected)} from {sources}"
        return Check(GROUP, name, FAILED, detail, [name])
    if torch.equal(bit_view(actual), bit_view(expected)):
        return None
    differing = int((bit_view(actual) != bit_view(expected)).sum())
    error = float((actual.double() - expected.double()).abs().max())
    detail = f"{name} differs from {sources}: {differing} of {actual.numel()} elements, by at most {error:.3g}"
    if cause := _likely_cause(actual, expected, value, load):
        detail += f"; {cause}"
    return Check(GROUP, name, FAILED, detail, [name], {"differing": differing, "error": error})


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _likely_cause(actual: Tensor, expected: Tensor, value: LazyTensor, load: Load) -> str:
    """The common mistake that gives exactly this tensor; empty if none does."""
    if order := _order(actual, _parts(expected, value, load)):
        return f"its parts are concatenated in the wrong order: {', '.join(str(i + 1) for i in order)}"
    if actual.dim() == 2 and actual.shape[0] == actual.shape[1] and torch.equal(actual, expected.T):
        return "it is transposed"
    if actual.dim() and torch.equal(actual, expected.flip(0)):
        return "its rows are in reverse order"
    for step in (1, -1):
        if actual.dim() and torch.equal(actual, expected.roll(step, 0)):
            return f"its rows are shifted by {step}"
    for dtype in (torch.bfloat16, torch.float16):
        if actual.is_floating_point() and torch.equal(actual, expected.to(dtype).to(actual.dtype)):
            return f"it was rounded to {str(dtype).removeprefix('torch.')}"
    return "" if bool(actual.any()) else "it is all zero"


def _parts(expected: Tensor, value: LazyTensor, load: Load) -> Sequence[Tensor]:
    """The parts that the tensor is concatenated from: q, k and v, which a source may have fused already."""
    if isinstance(value, Concat) and value.dim == 0 and len(value.parts) <= 4:
        return [evaluate(part, load) for part in value.parts]
    return expected.chunk(3) if expected.dim() and len(expected) % 3 == 0 else []


def _order(actual: Tensor, parts: Sequence[Tensor]) -> tuple[int, ...] | None:
    """The order in which `parts` are concatenated in the tensor, if any."""
    orders = itertools.permutations(range(len(parts))) if parts else ()
    return next((order for order in orders if torch.equal(actual, torch.cat([parts[i] for i in order]))), None)


def _with_true_name(check: Check, actual: Tensor, name: str, outputs: Mapping[str, LazyTensor], load: Load) -> Check:
    """Add the name of another tensor with the same content as the differing one, as in a shifted layer."""
    for other, value in outputs.items():
        if other == name or value.shape != tuple(actual.shape) or value.dtype.name != _kind(actual).split()[0]:
            continue
        if torch.equal(actual, evaluate(value, load)):
            return replace(check, detail=f"{check.detail}; it has the content of {other}", tensors=[name, other])
    return check

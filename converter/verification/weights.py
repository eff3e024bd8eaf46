"""The second proof: every output tensor, bit by bit, against its source tensors read by the formats' own libraries.

It alone sees what outputs do not show: k's bias, which the softmax cancels, and any change below the noise floor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from converter.plan.plan import Plan
from converter.storage.progress import OnProgress
from converter.tensors.evaluate import evaluate
from converter.tensors.lazy_tensor import Concat, LazyTensor, source_tensors
from converter.tensors.tensor_info import TensorInfo
from converter.verification.inputs import Converted, Origin
from converter.verification.reference_models import State
from converter.verification.reference_readers import Reader
from converter.verification.result import Check, failed, passed, skipped

GROUP = "bytes"

# Faulty tensors whose content is looked for under other names: each search reads the source once more, and where all is
# wrong, a few say enough.
_SEARCHED = 12

Load = Callable[[TensorInfo], torch.Tensor]


def prove(
    target: Converted, origin: Origin | None, found: Reader, on_progress: OnProgress
) -> tuple[State, list[Check]]:
    """What the source gives, by canonical names, and whether the converted tensors, given by `found`, equal it."""
    if origin is None:
        return {}, [skipped(GROUP, "tensors", "no --source was given: there is nothing to compare with")]
    there, outputs = target.state_dict.tensors, origin.plan.outputs

    def load(tensor: TensorInfo) -> torch.Tensor:
        return origin.read(tensor.key)

    checks = [failed(GROUP, name, _presence(name, outputs), [name]) for name in sorted(set(there) ^ set(outputs))]
    canonical: State = {}
    for done, (name, value) in enumerate(outputs.items()):
        canonical[name] = evaluate(value, load)
        fault = _compare(name, found(name), canonical[name], value, load) if name in there else None
        if fault is not None:
            if len(checks) < _SEARCHED:
                fault = _elsewhere(fault, found(name), name, outputs, load)
            checks.append(_with_rule(fault, origin.plan, name))
        on_progress(GROUP, done + 1, len(outputs))
    if len(checks) > len(outputs) / 2:
        detail = f"{len(checks)} of {len(outputs)} tensors differ: this was made from another checkpoint, or otherwise"
        checks.insert(0, failed(GROUP, "source", detail, [origin.source.name]))
    return canonical, checks or [passed(GROUP, "tensors", f"{len(canonical)} tensors equal their sources in every bit")]


def _presence(name: str, outputs: dict[str, LazyTensor]) -> str:
    return f"{name} is missing, though the source gives it" if name in outputs else f"{name} comes from nothing"


def _with_rule(fault: Check, plan: Plan, name: str) -> Check:
    """The fault with the mapping's rule that makes the tensor; none made what is filled in."""
    rule = plan.rules.get(name)
    return replace(fault, detail=f"{fault.detail}; made by {rule.place}") if rule else fault


def _compare(name: str, found: torch.Tensor, expected: torch.Tensor, value: LazyTensor, load: Load) -> Check | None:
    """None if the two are equal in every bit; else what differs, and which mistake would look like that."""
    origin = " + ".join(tensor.key for tensor in source_tensors(value)) or "filled in"
    if found.shape != expected.shape or found.dtype != expected.dtype:
        detail = f"{name} is {_kind(found)}; {origin} gives {_kind(expected)}"
        return failed(GROUP, name, detail, [name])
    if torch.equal(_bits(found), _bits(expected)):
        return None
    differing = int((_bits(found) != _bits(expected)).sum()) if found.dim() else 1
    error = float((found.double() - expected.double()).abs().max())
    detail = f"{name} differs from {origin}: {differing} of {found.numel()} elements, by at most {error:.3g}"
    guess = _guess(found, expected, value, load)
    if guess:
        detail += f"; {guess}"
    return failed(GROUP, name, detail, [name], differing=float(differing), error=error)


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as integers: a NaN equals itself, and 0 does not equal -0."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(sizes[tensor.element_size()])


def _guess(found: torch.Tensor, expected: torch.Tensor, value: LazyTensor, load: Load) -> str:
    """The mistake in words, if it is one of those that are often made."""
    if order := _order(found, _parts(expected, value, load)):
        return f"its parts are there in the order {', '.join(str(i + 1) for i in order)}"
    if found.dim() == 2 and found.shape[0] == found.shape[1] and torch.equal(found, expected.T):
        return "it is transposed"
    if found.dim() and torch.equal(found, expected.flip(0)):
        return "its rows are in reverse order"
    for step in (1, -1):
        if found.dim() and torch.equal(found, expected.roll(step, 0)):
            return f"its rows are shifted by {step}"
    for dtype in (torch.bfloat16, torch.float16):
        if found.is_floating_point() and torch.equal(found, expected.to(dtype).to(found.dtype)):
            return f"it has been rounded to {str(dtype).removeprefix('torch.')} on the way"
    if not bool(found.any()):
        return "it is all zero"
    return ""


def _parts(expected: torch.Tensor, value: LazyTensor, load: Load) -> Sequence[torch.Tensor]:
    """What the tensor is put together from: q, k and v, which a source may have fused already."""
    if isinstance(value, Concat) and value.dim == 0 and len(value.parts) <= 4:
        return [evaluate(part, load) for part in value.parts]
    return expected.chunk(3) if expected.dim() and len(expected) % 3 == 0 else []


def _order(found: torch.Tensor, parts: Sequence[torch.Tensor]) -> tuple[int, ...] | None:
    """The order in which `parts` make up what was found."""
    orders = itertools.permutations(range(len(parts))) if parts else ()
    return next((order for order in orders if torch.equal(found, torch.cat([parts[i] for i in order]))), None)


def _elsewhere(fault: Check, found: torch.Tensor, name: str, outputs: dict[str, LazyTensor], load: Load) -> Check:
    """The fault, with the name under which the tensor's content belongs, if there is one: a layer shifted, say."""
    for other, value in outputs.items():
        if other == name or value.shape != tuple(found.shape) or value.dtype.name != _kind(found).split()[0]:
            continue
        if torch.equal(found, evaluate(value, load)):
            return replace(fault, detail=f"{fault.detail}; it holds what belongs to {other}", tensors=[name, other])
    return fault

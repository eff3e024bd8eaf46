"""Checks that every converted tensor equals, bit by bit, the result of the mapping for its source tensors.

Both are read by the formats' own libraries. Outputs cannot show a wrong bias of k, which the softmax cancels, nor
changes below the noise floor. This check shows both.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from converter.errors import first_names
from converter.plan.plan import Plan
from converter.storage.progress import OnProgress
from converter.tensors.dtypes import dtype_name
from converter.tensors.evaluate import bit_view, evaluate
from converter.tensors.lazy_tensor import Concat, LazyTensor, source_tensors
from converter.verification.inputs import Converted, ConvertedEncoder, Expected, Origin
from converter.verification.merging import is_same_merge
from converter.verification.reference_readers import Reader
from converter.verification.result import FAILED, INCONCLUSIVE, PASSED, Check

GROUP = "bytes"

# The name of the check of a user's mapping.
_MAPPING = "mapping"

# Search the content of this many differing tensors under other names. Each search reads the whole source once more.
_MAX_SEARCHES = 12


def differing_tensors(encoder: ConvertedEncoder, checks: Sequence[Check]) -> list[str]:
    """Return the canonical names of the tensors of an encoder that `check_bytes` found different from the source."""
    failed = [check for check in checks if check.group == GROUP and check.verdict == FAILED]
    keys = {check.tensors[0] for check in failed if check.name != _MAPPING}
    names = {name for check in failed if check.name == _MAPPING for name in check.tensors}
    return [
        name
        for name, value in encoder.tensors.items()
        if name in names or any(tensor.key in keys for tensor in source_tensors(value))
    ]


def check_bytes(target: Converted, source: Expected, on_progress: OnProgress) -> list[Check]:
    """Compare every converted tensor with its source tensors.

    Args:
        target: The converted file.
        source: The expected output of the conversion.
        on_progress: Called after each tensor.
    """
    tensors, outputs = target.tensors, source.outputs
    missing = dict.fromkeys(outputs.keys() - tensors.keys(), "is missing, though the source has it")
    extra = dict.fromkeys(tensors.keys() - outputs.keys(), "is not produced from any source tensor")
    problems = {name: text for name, text in sorted((missing | extra).items()) if name not in source.not_compared}
    checks = [Check(GROUP, name, FAILED, f"{name} {problem}", [name]) for name, problem in problems.items()]
    for done, name in enumerate(outputs, 1):
        if name in tensors:
            checks += _check_tensor(name, target.read(tensors[name]), source, len(checks) < _MAX_SEARCHES)
        on_progress(GROUP, done, len(outputs))
    if len(checks) > len(outputs) / 2:
        cause = "converted from a different checkpoint, or with other options, such as --lora (--source lora=ADAPTER)"
        if extra:
            cause += " or --into (--source into=HOST)"
        detail = f"{len(checks)} of {len(outputs.keys() | tensors.keys())} tensors differ: {cause}"
        checks.insert(0, Check(GROUP, "source", FAILED, detail, [source.name]))
    if not checks:
        detail = f"{len(outputs)} tensors equal their sources in every bit"
        if merged := sum(not source.merged.isdisjoint(source_tensors(value)) for value in outputs.values()):
            detail += f", {merged} of them with the adapter merged by {source.merged_by}, but for single roundings"
        checks = [Check(GROUP, "tensors", PASSED, detail)]
    if names := list(source.not_compared):
        detail = f"{source.name} has none of {len(names)} tensors, which were not compared: {first_names(names)}"
        detail += "; give the checkpoint that supplied them: --source fill-from=CHECKPOINT"
        checks.append(Check(GROUP, "other sources", INCONCLUSIVE, detail, names))
    for origin in source.origins.values():
        if origin.builtin_plan is not None and origin.builtin_plan is not origin.plan:
            checks.append(_check_mapping(origin, origin.builtin_plan))
    return checks


def _check_tensor(name: str, actual: Tensor, source: Expected, search: bool) -> list[Check]:
    """Return no check if all bits are equal, else a failed check with the likely cause."""
    value, names, figures = source.outputs[name], [name], dict[str, float]()
    expected = evaluate(value, source.read)
    sources = " + ".join(tensor.key for tensor in source_tensors(value)) or "generated values"
    if _type_and_shape(actual) != _type_and_shape(expected):
        detail = f"{name} is {_type_and_shape(actual)}, expected {_type_and_shape(expected)} from {sources}"
    elif _same_bits(actual, expected) or _is_equal_merge(actual, expected, value, source):
        return []
    else:
        differing = int((bit_view(actual) != bit_view(expected)).sum())
        figures = {"differing": differing, "error": float((actual.double() - expected.double()).abs().max())}
        detail = f"{name} differs from {sources}: {differing} of {actual.numel()} elements, "
        detail += f"by at most {figures['error']:.3g}"
        if cause := _likely_cause(actual, expected, value, source.read):
            detail += f"; {cause}"
    if search and (duplicate := _find_content(name, actual, source)):
        detail += f"; it has the content of {duplicate}"
        names.append(duplicate)
    if rule := source.rules.get(name):
        detail += f"; made by {rule.location}"
    return [Check(GROUP, name, FAILED, detail, names, figures)]


def _is_equal_merge(actual: Tensor, expected: Tensor, value: LazyTensor, source: Expected) -> bool:
    """Return whether a tensor with a merged adapter equals the library's merge, but for single roundings."""
    base_dtype = next((tensor.dtype.name for tensor in source_tensors(value) if tensor in source.merged), None)
    return base_dtype is not None and is_same_merge(actual, expected, base_dtype, source.merged_by)


def _find_content(name: str, actual: Tensor, source: Expected) -> str:
    """Return the name of another tensor with the same content, as if layers were shifted; empty if there is none."""
    type_and_shape = _type_and_shape(actual)
    for candidate, value in source.outputs.items():
        if candidate == name or f"{value.dtype.name} {list(value.shape)}" != type_and_shape:
            continue
        if torch.equal(actual, evaluate(value, source.read)):
            return candidate
    return ""


def _check_mapping(origin: Origin, builtin: Plan) -> Check:
    """Compare the plan of the user's mapping for a source with the plan of the built-in mapping that fits it."""
    plan = origin.plan
    file = Path(plan.mapping.location.file).name
    unknown = [output for output in plan.outputs if output not in builtin.outputs]
    differing = [
        output
        for output in plan.outputs
        if output in builtin.outputs and _differ(plan.outputs[output], builtin.outputs[output], origin.read)
    ]
    if differing:
        rule = plan.rules.get(differing[0])
        detail = (
            f"the source has the layout {builtin.mapping.name}, of which {file} makes {len(differing)} wrong tensors"
        )
        detail += f": {first_names(differing)}" + (f", made by {rule.location}" if rule else "")
        return Check(GROUP, _MAPPING, FAILED, detail, differing)
    if unknown:
        return Check(GROUP, _MAPPING, INCONCLUSIVE, f"only {file} says what {first_names(unknown)} is made of", unknown)
    detail = f"{file} makes the same tensors as {builtin.mapping.name}, which fits the source"
    return Check(GROUP, _MAPPING, PASSED, detail)


def _differ(a: LazyTensor, b: LazyTensor, read: Reader) -> bool:
    """Return whether two lazy tensors have different values."""
    if a == b:
        return False
    first, second = evaluate(a, read), evaluate(b, read)
    return _type_and_shape(first) != _type_and_shape(second) or not _same_bits(first, second)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bit_view(a), bit_view(b))


def _type_and_shape(tensor: Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"


def _likely_cause(actual: Tensor, expected: Tensor, value: LazyTensor, read: Reader) -> str:
    """Return the common mistake that gives exactly this tensor; empty if none does."""
    if order := _concatenation_order(actual, _parts(expected, value, read)):
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
            return f"it was rounded to {dtype_name(dtype)}"
    return "" if bool(actual.any()) else "it is all zero"


def _parts(expected: Tensor, value: LazyTensor, read: Reader) -> Sequence[Tensor]:
    """Return the tensors that a tensor is concatenated from, or its thirds, as the source may have q, k and v fused."""
    if isinstance(value, Concat) and value.dim == 0 and len(value.parts) <= 4:
        return [evaluate(part, read) for part in value.parts]
    return expected.chunk(3) if expected.dim() and len(expected) % 3 == 0 else []


def _concatenation_order(actual: Tensor, parts: Sequence[Tensor]) -> tuple[int, ...] | None:
    """Return the order in which `parts` concatenate to `actual`, or None."""
    orders = itertools.permutations(range(len(parts))) if parts else ()
    return next((order for order in orders if torch.equal(actual, torch.cat([parts[i] for i in order]))), None)

"""The plan of a conversion: every output tensor and what it is made of, known before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Mapping as Mapping
from dataclasses import dataclass, field

from converter.errors import MappingError, UsageError
from converter.layouts.claims import summary
from converter.layouts.shapes import Sizes, fits, resolve, written
from converter.layouts.spec import CanonicalLayout, LayoutMapping, Rule, TensorSpec
from converter.plan.apply import Applied, apply
from converter.tensors.lazy_tensor import LARGEST_GRID, LazyTensor, arange, cast, nbytes, resampled, source_tensors

# A patch is one position, and the class token another: numbers for more of them would be made for nothing, in memory.
MOST_POSITIONS = LARGEST_GRID**2 + 1


@dataclass(slots=True, eq=False)
class Plan:
    """What one checkpoint becomes: `outputs` by name, in the order they are written.

    `dropped` gives each source tensor that is left out and why; `missing` each target tensor that the source cannot
    give and may lack, and why; `generated` each tensor that was generated. `sizes` holds the sizes found and `unusual`
    those that are not the DeepEncoder's, as name -> (found, DeepEncoder's). `rules` gives each output the rule that
    made it, but for those generated. `extra_tensors` holds tensors that the family has and the target does not.
    `layout` names the layout of the outputs. Where it is not the target, `canonical_tensors` holds the tensors that
    the outputs are made of, by their canonical names.
    """

    mapping: LayoutMapping
    target: CanonicalLayout
    outputs: dict[str, LazyTensor]
    dropped: dict[str, str]
    missing: dict[str, str] = field(default_factory=dict)
    generated: dict[str, str] = field(default_factory=dict)
    sizes: Sizes = field(default_factory=dict)
    unusual: dict[str, tuple[int, int]] = field(default_factory=dict)
    rules: dict[str, Rule] = field(default_factory=dict)
    extra_tensors: dict[str, LazyTensor] = field(default_factory=dict)
    layout: str = ""
    canonical_tensors: dict[str, LazyTensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data in the output."""
        return sum(nbytes(value) for value in self.outputs.values())


def make_plan(
    mapping: LayoutMapping,
    prefix: str,
    target: CanonicalLayout,
    tensors: Mapping[str, LazyTensor],
    source: str,
    *,
    dtype: str = "keep",
    image_size: int | None = None,
) -> Plan:
    """The plan that turns `tensors` (by source name) into `target`; MappingError where they do not fit."""
    kept = {name: value for name, value in tensors.items() if not (mapping.drop_rest and not name.startswith(prefix))}
    where = f"{source}: by {mapping.place.file}"
    applied = apply(mapping.rules_for(prefix), kept, where)
    applied.dropped.update((name, mapping.drop_rest) for name in tensors if name not in kept)
    # By the names in the file, which may have wrappers that `tensors` was rid of.
    dropped = {tensor.key: why for name, why in applied.dropped.items() for tensor in source_tensors(tensors[name])}
    plan = Plan(mapping, target, {}, dropped, layout=target.name)
    plan.sizes["depth"] = depth = _depth(target, applied)
    # Said here, before a name is made for every layer that a single wild index stands for.
    if depth > len(applied.values):
        raise MappingError(f"{where}: layer {depth - 1} of only {len(applied.values)} tensors")
    if image_size is not None:
        _resample(plan, applied, image_size)
    _roll_back(plan, applied, where)
    plan.outputs = sort_outputs(plan.outputs, dtype)
    plan.unusual = {
        name: (plan.sizes[name], usual) for name, usual in target.sizes.items() if plan.sizes.get(name, usual) != usual
    }
    return plan


def sort_outputs(outputs: dict[str, LazyTensor], dtype: str) -> dict[str, LazyTensor]:
    """The tensors in safetensors' own order, floating-point ones cast unless `dtype` is keep.

    Wider types come first, so that every tensor is aligned, then names.
    """
    if dtype != "keep":
        outputs = {name: cast(value, dtype) if value.dtype.is_float else value for name, value in outputs.items()}
    return dict(sorted(outputs.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))


def _depth(target: CanonicalLayout, applied: Applied) -> int:
    """How many layers there are: one more than the highest index."""
    numbered = [spec.name for spec in target.tensors if any(field.kind == "int" for field in spec.name.fields)]
    found = (template.match(name) for name in applied.values for template in numbered)
    values = (value for bindings in found if bindings for value in bindings.values())
    return max((int(value) + 1 for value in values if value.isdigit()), default=0)


def _roll_back(plan: Plan, applied: Applied, where: str) -> None:
    """Fit what the rules made into the target: every tensor there, of the right shape, and nothing left over."""
    values = dict(applied.values)
    problems: list[str] = []
    absent: list[tuple[TensorSpec, str]] = []
    for spec in plan.target.tensors:
        for name in spec.name.names(plan.sizes["depth"]):
            if name in values:
                value = values.pop(name)
                problems += _misfit(spec, name, value, plan.sizes)
                plan.outputs[name], plan.rules[name] = value, applied.rules[name]
            else:
                absent.append((spec, name))
    # What is too much comes before what is lacking: it may be the same, under a name of its own.
    for name, value in values.items():
        reason = _reason_beyond(plan.target, name)
        if reason is None:
            problems.append(f"{plan.target.name} has no tensor {name!r} ({applied.rules[name].place} makes it)")
        else:
            plan.extra_tensors[name] = value
            plan.dropped.update((tensor.key, reason) for tensor in source_tensors(value))
    problems += [problem for spec, name in absent for problem in _supply(plan, spec, name)]
    if problems:
        raise MappingError(f"{where}: {summary(problems)}")


def _misfit(spec: TensorSpec, name: str, value: LazyTensor, sizes: Sizes) -> list[str]:
    origin = next((f" (from {tensor.key!r})" for tensor in source_tensors(value)), "")
    if spec.dtype and value.dtype.name != spec.dtype:
        return [f"{name!r}{origin} is {value.dtype.name}; expected {spec.dtype}"]
    if not spec.dtype and not value.dtype.is_float:
        return [f"{name!r}{origin} is {value.dtype.name}; expected a floating-point type"]
    if fits(spec.shape, value.shape, sizes):
        return []
    known = ", ".join(f"{dim.name} = {sizes[dim.name]}" for dim in spec.shape if dim.name in sizes)
    return [f"{name!r}{origin} has shape {list(value.shape)}; expected {written(spec.shape)}, where {known or 'any'}"]


def _supply(plan: Plan, spec: TensorSpec, name: str) -> list[str]:
    """Make up, or do without, a tensor that the source does not give."""
    if spec.generate == "arange":
        if unknown := [str(dim.name) for dim in spec.shape if dim.name not in (None, *plan.sizes)]:
            return [f"{name!r} cannot be made: nothing of the right shape tells {', '.join(unknown)}"]
        shape = resolve(spec.shape, plan.sizes)
        if math.prod(shape) > MOST_POSITIONS:
            return [f"{name!r} cannot be made: {list(shape)} is more than any image has positions"]
        plan.outputs[name] = arange(shape)
        plan.generated[name] = "0, 1, 2, ..."
    elif spec.optional:
        plan.missing[name] = spec.optional
    else:
        return [f"nothing gives {name!r}"]
    return []


def _patch_size(target: CanonicalLayout, applied: Applied) -> int:
    """Pixels along a side of a patch: the source's, or the target's own where the source has no patch embedding."""
    sizes: Sizes = {}
    for spec in target.tensors:
        if any(dim.name == "patch" for dim in spec.shape) and spec.name.text in applied.values:
            fits(spec.shape, applied.values[spec.name.text].shape, sizes)
    return sizes.get("patch", target.sizes["patch"])


def _reason_beyond(target: CanonicalLayout, name: str) -> str | None:
    return next((reason for template, reason in target.extra_tensors if template.match(name) is not None), None)


def _resample(plan: Plan, applied: Applied, image_size: int) -> None:
    """Resample the table of positions, and leave the position indices to be made anew."""
    spec = next((spec for spec in plan.target.tensors if spec.positions), None)
    if spec is None:
        raise UsageError(f"--image-size: {plan.target.name} takes images of any size: there is nothing to resample")
    name = spec.name.text
    patch = _patch_size(plan.target, applied)
    if image_size < patch or image_size % patch:
        raise UsageError(f"--image-size {image_size}: not a multiple of the patch size, {patch}")
    if name not in applied.values:
        return
    before = applied.values[name].shape
    try:
        applied.values[name] = resampled(applied.values[name], image_size // patch)
    except ValueError as error:
        raise MappingError(f"{name}: {error}") from error
    if applied.values[name].shape == before:
        return
    for other in plan.target.tensors:
        if other.generate and other.name.text in applied.values:
            value = applied.values.pop(other.name.text)
            reason = "made anew for the new number of positions"
            plan.dropped.update((tensor.key, reason) for tensor in source_tensors(value))

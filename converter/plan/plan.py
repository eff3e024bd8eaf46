"""Plans: every output tensor of a conversion as a lazy tensor, before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from converter.errors import MappingError
from converter.layouts.claims import summary
from converter.layouts.shapes import Dim, Sizes, concrete_shape, format_shape, match_shape
from converter.layouts.spec import CanonicalLayout, LayoutMapping, Rule, TensorSpec
from converter.plan.apply import OUTSIDE, Applied, apply, outside_predicate
from converter.plan.assumptions import Assumption
from converter.tensors.lazy_tensor import (
    MAX_GRID_SIZE,
    LazyTensor,
    arange,
    cast,
    is_arange,
    nbytes,
    reshaped,
    source_tensors,
)

if TYPE_CHECKING:
    from converter.plan.merge import TensorChange

# One position per patch, and one for the class token.
MAX_POSITIONS = MAX_GRID_SIZE**2 + 1


@dataclass(slots=True, eq=False)
class Plan:
    """The plan of one conversion."""

    mapping: LayoutMapping  # The mapping from the checkpoint's layout to the canonical layout
    target: CanonicalLayout
    outputs: dict[str, LazyTensor]  # The tensors by name, in the order of the output file
    dropped: dict[str, str]  # The reason for each checkpoint tensor that is not converted
    layout: str  # The name of the layout of the outputs
    missing: dict[str, str] = field(default_factory=dict)  # The reason for each optional target tensor that is absent
    generated: dict[str, str] = field(default_factory=dict)  # How each generated tensor was generated
    sizes: Sizes = field(default_factory=dict)  # The sizes of the model by name, from the shapes of the tensors
    # The sizes that differ from DeepSeek-OCR's, each with DeepSeek-OCR's size
    unusual: dict[str, tuple[int, int]] = field(default_factory=dict)
    rules: dict[str, Rule] = field(default_factory=dict)  # The rule that produced each output, except generated ones
    # Tensors that other layouts have but the DeepEncoder does not, by canonical names
    extra_tensors: dict[str, LazyTensor] = field(default_factory=dict)
    # The tensors that the outputs are made of, by canonical names; empty if `layout` is canonical
    canonical_tensors: dict[str, LazyTensor] = field(default_factory=dict)
    assumptions: dict[str, Assumption] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)  # Messages for the user, such as on a config that cannot be used
    merged: dict[str, TensorChange] = field(default_factory=dict)  # The changes of a LoRA adapter by tensor name

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
    image_size: int | None = None,
    from_ggml: bool = False,
) -> Plan:
    """Plan the conversion of a checkpoint to the canonical layout.

    Args:
        mapping: The mapping from the checkpoint's layout.
        prefix: The prefix of the layout's names in the checkpoint.
        target: The canonical layout.
        tensors: The checkpoint's tensors by name.
        source: The checkpoint's name, for error messages.
        image_size: Image size in pixels for resampled position embeddings, or None.
        from_ggml: Whether the tensors may lack leading dimensions of 1, which ggml does not store.

    Raises:
        MappingError: The tensors do not fit the mapping or the canonical layout.
        UsageError: The canonical layout does not allow this image size.
    """
    where = f"{source}: by {mapping.location.file}"
    applied = _apply_mapping(mapping, prefix, target, tensors, where)
    if from_ggml:
        _restore_leading_ones(target, applied)
    # The keys are names in the file: the names in `tensors` may lack a common prefix.
    dropped = {tensor.key: why for name, why in applied.dropped.items() for tensor in source_tensors(tensors[name])}
    plan = Plan(mapping, target, {}, dropped, target.name)
    plan.sizes["depth"] = depth = _depth(target, applied)
    # Checked before names of all layers are listed: a hostile name can have any index.
    if depth > len(applied.values):
        raise MappingError(f"{where}: layer index {depth - 1} with only {len(applied.values)} tensors")
    if image_size is not None:
        from converter.plan.resample import resample_positions

        plan.dropped.update(resample_positions(target, applied, depth, image_size))
    _drop_position_indices(plan, applied)
    _fit_target(plan, applied, where)
    plan.remarks += _grid_remarks(plan)
    plan.outputs = sort_outputs(plan.outputs)
    plan.unusual = {
        name: (plan.sizes[name], usual) for name, usual in target.sizes.items() if plan.sizes.get(name, usual) != usual
    }
    return plan


def _apply_mapping(
    mapping: LayoutMapping, prefix: str, target: CanonicalLayout, tensors: Mapping[str, LazyTensor], where: str
) -> Applied:
    """Apply the rules of a mapping to the tensors of the encoder, and drop all others."""
    is_outside = outside_predicate(mapping, prefix, target)
    has_other_rules = bool(prefix and mapping.other_rules)
    inside = {name: value for name, value in tensors.items() if has_other_rules or not is_outside(name)}
    applied = apply(mapping.rules_for(prefix), inside, where, is_outside)
    applied.dropped.update((name, mapping.drop_rest or OUTSIDE) for name in tensors if name not in inside)
    return applied


def sort_outputs(outputs: dict[str, LazyTensor], dtype: str = "keep") -> dict[str, LazyTensor]:
    """Cast floating-point tensors unless `dtype` is "keep", and sort all tensors in the order of safetensors.

    Tensors with larger elements come first, so that all are aligned. Ties are sorted by name.
    """
    if dtype != "keep":
        outputs = {name: cast(value, dtype) if value.dtype.is_float else value for name, value in outputs.items()}
    return dict(sorted(outputs.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))


def _depth(target: CanonicalLayout, applied: Applied) -> int:
    """Return the number of layers: one more than the highest index."""
    numbered = [spec.name for spec in target.tensors if any(field.kind == "int" for field in spec.name.fields)]
    matches = [template.match(name) for name in applied.values for template in numbered]
    values = [value for bindings in filter(None, matches) for value in bindings.values()]
    return max((int(value) + 1 for value in values if value.isdigit()), default=0)


def _drop_position_indices(plan: Plan, applied: Applied) -> None:
    """Drop position indices of another type or number of dimensions, which are then generated."""
    for spec in plan.target.tensors:
        value = applied.values.get(spec.name.text) if spec.generate else None
        if value is None or (value.dtype.name == spec.dtype and len(value.shape) == len(spec.shape)):
            continue
        if is_arange(value):
            del applied.values[spec.name.text]
            reason = f"0, 1, 2, ... in {value.dtype.name} {list(value.shape)}: generated in {spec.dtype}"
            plan.dropped.update((tensor.key, reason) for tensor in source_tensors(value))


def _restore_leading_ones(target: CanonicalLayout, applied: Applied) -> None:
    """Reshape tensors that lack the leading dimension of 1 in the canonical layout."""
    for spec in target.tensors:
        value = applied.values.get(spec.name.text)
        if value is not None and spec.shape[0] == Dim(1, None) and len(value.shape) == len(spec.shape) - 1:
            applied.values[spec.name.text] = reshaped(value, (1, *value.shape))


def _grid_remarks(plan: Plan) -> list[str]:
    """Return a warning for position embeddings of a class token and a grid that is not square."""
    names = [spec.name.text for spec in plan.target.tensors if spec.positions == "tokens"]
    grid_numels = {name: plan.outputs[name].shape[0] - 1 for name in names if name in plan.outputs}
    return [
        f"warning: {name!r} has {numel} positions without the class token, which are no square: the encoder reads "
        "them as a square grid"
        for name, numel in grid_numels.items()
        if math.isqrt(numel) ** 2 != numel
    ]


def _fit_target(plan: Plan, applied: Applied, where: str) -> None:
    """Add the results of the rules to the plan; MappingError if they do not fit the canonical layout."""
    values = dict(applied.values)
    problems: list[str] = []
    absent: list[tuple[TensorSpec, str]] = []
    for spec in plan.target.tensors:
        for name in spec.name.names(plan.sizes["depth"]):
            if name in values:
                value = values.pop(name)
                problems += _mismatches(spec, name, value, plan.sizes)
                plan.outputs[name], plan.rules[name] = value, applied.rules[name]
            else:
                absent.append((spec, name))
    # Unknown names are listed first: they may explain the missing ones.
    for name, value in values.items():
        reason = plan.target.extra_reason(name)
        if reason is None:
            problems.append(
                f"{plan.target.name} has no tensor {name!r}{_origin(value)} (by {applied.rules[name].location})"
            )
        else:
            plan.extra_tensors[name] = value
            plan.dropped.update((tensor.key, reason) for tensor in source_tensors(value))
    problems += [problem for spec, name in absent for problem in _generate(plan, spec, name)]
    if problems:
        raise MappingError(f"{where}: {summary(problems)}")


def _mismatches(spec: TensorSpec, name: str, value: LazyTensor, sizes: Sizes) -> list[str]:
    origin = _origin(value)
    if spec.dtype and value.dtype.name != spec.dtype:
        return [f"{name!r}{origin} is {value.dtype.name}; expected {spec.dtype}"]
    if not spec.dtype and not value.dtype.is_float:
        return [f"{name!r}{origin} is {value.dtype.name}; expected a floating-point type"]
    if match_shape(spec.shape, value.shape, sizes):
        return []
    known = ", ".join(f"{dim.name} = {sizes[dim.name]}" for dim in spec.shape if dim.name in sizes)
    return [
        f"{name!r}{origin} has shape {list(value.shape)}; expected {format_shape(spec.shape)}, where {known or 'any'}"
    ]


def _origin(value: LazyTensor) -> str:
    """Return the key of the first source tensor of a value, for messages."""
    return next((f" (from {tensor.key!r})" for tensor in source_tensors(value)), "")


def _generate(plan: Plan, spec: TensorSpec, name: str) -> list[str]:
    """Generate a tensor that the checkpoint lacks, or record it as missing; return problems."""
    if spec.generate == "arange":
        if unknown := [str(dim.name) for dim in spec.shape if dim.name not in (None, *plan.sizes)]:
            return [f"{name!r} cannot be generated: unknown size {', '.join(unknown)}"]
        shape = concrete_shape(spec.shape, plan.sizes)
        if math.prod(shape) > MAX_POSITIONS:
            return [f"{name!r} cannot be generated: {list(shape)} has more positions than any image"]
        plan.outputs[name] = arange(shape)
        plan.generated[name] = "0, 1, 2, ..."
    elif spec.optional:
        plan.missing[name] = spec.optional
    else:
        return [f"missing tensor {name!r}"]
    return []

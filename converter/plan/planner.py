"""Plans the conversion of a checkpoint: detects its layout, maps it to the canonical layout, and that to the target."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from converter.checkpoint.folder import SWIFT_ENCODER
from converter.checkpoint.open import CONFIG_NAMES, Checkpoint
from converter.errors import LayoutError, MappingError, UsageError, first_names
from converter.layouts import registry
from converter.layouts.detect import DetectedLayout, detect_layout
from converter.layouts.marks import find_extra_modules
from converter.layouts.spec import CanonicalLayout, LayoutSpec
from converter.options import ConvertOptions, check_choices
from converter.plan.apply import OUTSIDE, outside_predicate
from converter.plan.assumptions import default_assumptions
from converter.plan.plan import Plan, make_plan, sort_outputs
from converter.plan.route import complete_from, retarget
from converter.tensors.lazy_tensor import LazyTensor, all_source_tensors, lazy_read

if TYPE_CHECKING:
    from converter.checkpoint.lora import Adapter


class ResolvedPlan(NamedTuple):
    """A detected checkpoint and the plan of its conversion."""

    detected: DetectedLayout
    plan: Plan


def resolve_to_canonical(opened: Checkpoint, options: ConvertOptions) -> ResolvedPlan:
    """Detect a checkpoint's layout and plan its conversion to the canonical layout.

    Raises:
        LayoutError: The checkpoint has no known layout.
        MappingError: Its tensors do not fit the detected layout.
    """
    detected = detect_layout(opened, _layouts(options), options)
    return ResolvedPlan(detected, plan_to_canonical(opened, detected, options))


def plan_to_canonical(opened: Checkpoint, detected: DetectedLayout, options: ConvertOptions) -> Plan:
    """Plan the conversion of a checkpoint with a detected layout to the canonical layout.

    Args:
        opened: The checkpoint, for error messages.
        detected: The tensors and the layout that was detected.
        options: The family and the image size.

    Raises:
        LayoutError: The encoder lacks a module of the adapter.
        MappingError: The tensors do not fit the layout, or the adapter does not fit them.
    """
    mapping, prefix = detected.match.layout.mapping, detected.match.prefix
    canonical = registry.canonical(options.family)
    _check_other_shards(opened, detected, canonical)
    tensors: dict[str, LazyTensor] = {name: lazy_read(tensor) for name, tensor in detected.tensors.items()}
    merged = None
    if opened.adapter:
        from converter.plan.merge import match_adapter, merge

        merged = match_adapter(opened.adapter, detected, canonical, opened.name)
        tensors = merge(tensors, merged.changes_under(detected.match.outer_prefix), opened.adapter)
    try:
        is_ggml, size = "GGUF" in opened.containers, options.image_size
        plan = make_plan(mapping, prefix, canonical, tensors, opened.name, size, from_ggml=is_ggml)
    except MappingError as error:
        raise _misfit_error(opened, detected, options, error) from error
    plan.dropped.update((tensor.key, mapping.drop_rest or OUTSIDE) for tensor in detected.outside.values())
    plan.assumptions = default_assumptions(canonical)
    if any(map(opened.has_config, CONFIG_NAMES)):
        from converter.plan.config_values import read_assumptions

        plan.assumptions, remarks = read_assumptions(opened, canonical, plan.sizes)
        plan.remarks += remarks
    if merged:
        plan.merged, plan.remarks = merged.changes, [*plan.remarks, *merged.notes]
    return plan


def _check_other_shards(opened: Checkpoint, detected: DetectedLayout, canonical: CanonicalLayout) -> None:
    """Raise LayoutError if tensors of the encoder are in shards that are not read."""
    match = detected.match
    is_outside = outside_predicate(match.layout.mapping, match.prefix, canonical, match.outer_prefix)
    for name in opened.in_other_shards:
        if not is_outside(name):
            raise LayoutError(f"{opened.name}: the encoder's {name!r} is in another shard", opened.all_shards_step)


def _misfit_error(
    opened: Checkpoint, detected: DetectedLayout, options: ConvertOptions, error: MappingError
) -> LayoutError | MappingError:
    """Return the error for a checkpoint that does not fit the detected layout, with the next step for its tensors."""
    if options.mapping is not None:
        return MappingError(str(error), f"correct {options.mapping}, or omit --mapping if the layout is a known one")
    if opened.all_shards_step:
        return MappingError(str(error), opened.all_shards_step)
    # Imported here, as only errors need it.
    from converter.layouts.explain import find_source_mark

    match = detected.match
    encoder = {key: tensor for key, tensor in detected.tensors.items() if key.startswith(match.prefix)}
    if mark := find_source_mark(opened, encoder, options.family, match.layout.is_channels_last):
        return mark.error(opened.name)
    step = (
        f"the encoder differs from {match.name}: convert the checkpoint that it was made from, or write your own "
        f"mapping:\ndsocr-convert mapping show {match.name} > mine.yaml; then --mapping mine.yaml"
    )
    if find_extra_modules(encoder):
        step = "the DeepEncoder has no such modules: convert the weights that they were added to, or merge them"
    return MappingError(str(error), step)


def resolve(opened: Checkpoint, options: ConvertOptions, donor: Checkpoint | None) -> ResolvedPlan:
    """Plan the conversion of a checkpoint to the layout of the options.

    Args:
        opened: The checkpoint.
        options: The conversion options.
        donor: A checkpoint of the same sizes that supplies missing tensors (--fill-from), or None.

    Raises:
        LayoutError: The checkpoint has no known layout.
        MappingError: Its tensors do not fit, or are incomplete.
        UsageError: The donor has other sizes.
    """
    detected, plan = resolve_to_canonical(opened, options)
    donor_plan = _plan_donor(donor, plan, options) if donor is not None else None
    if options.layout != options.canonical:
        plan = retarget(plan, _target(options).mapping, donor_plan, opened.name, options.full_model)
    else:
        plan = complete_from(plan, donor_plan)
    plan.outputs = sort_outputs(plan.outputs, options.dtype)
    resolved = ResolvedPlan(detected, plan)
    if opened.adapter:
        record_merge(opened.adapter, [resolved], plan.outputs.values())
    return resolved


def record_merge(adapter: Adapter, resolved: Sequence[ResolvedPlan], outputs: Iterable[LazyTensor]) -> None:
    """Remove changes that no output contains from each plan's `merged`, and add a remark to the first plan.

    Args:
        adapter: The adapter.
        resolved: The plans of all encoders.
        outputs: The tensors of the output.

    Raises:
        LayoutError: No change of the adapter is in the output.
    """
    used_tensors = set(all_source_tensors(outputs))
    merged_modules: set[str] = set()
    for _, plan in resolved:
        changes = plan.merged.items()
        plan.merged = {name: change for name, change in changes if not used_tensors.isdisjoint(change.tensors)}
        merged_modules |= {change.module for change in plan.merged.values()}
    if not merged_modules:
        raise _no_merge_error(adapter, resolved)
    unused = [module for module in adapter.modules if module not in merged_modules]
    note = f"; not in the output: {len(unused)} others, such as {unused[0]}" if unused else ""
    resolved[0].plan.remarks.append(f"merged {len(merged_modules)} modules of the adapter {adapter.name}{note}")


def _no_merge_error(adapter: Adapter, resolved: Sequence[ResolvedPlan]) -> LayoutError:
    """Return the error for an adapter that changes no tensor of the encoders."""
    hint = "the encoder is that of the base model (trainers freeze it by default): convert it without --lora"
    if adapter.has_encoder:
        hint = f"the encoder was trained whole, into {SWIFT_ENCODER} next to the adapter (ms-swift): convert that"
    evidence = [name for detected, _ in resolved for name in detected.match.evidence]
    return LayoutError(
        f"{adapter.name}: this adapter trains {len(adapter.modules)} modules, none of them in the encoder: "
        f"{first_names(adapter.modules)}; the encoder's tensors are {first_names(evidence, 2)}",
        hint,
    )


def _plan_donor(donor: Checkpoint, plan: Plan, options: ConvertOptions) -> Plan:
    donor_plan = resolve_to_canonical(donor, ConvertOptions(options.family, image_size=options.image_size)).plan
    sizes = donor_plan.sizes
    different = [name for name, size in plan.sizes.items() if sizes.get(name, size) != size]
    if different:
        listed = ", ".join(f"{name} {sizes[name]} (not {plan.sizes[name]})" for name in different)
        raise UsageError(f"--fill-from {donor.name}: has other sizes: {listed}")
    return donor_plan


def _layouts(options: ConvertOptions) -> Sequence[LayoutSpec]:
    if options.mapping is None:
        return registry.layouts(options.family)
    mapping = registry.load_mapping_file(Path(options.mapping))
    if mapping.family != options.family:
        raise UsageError(
            f"--mapping {options.mapping}: is for the family {mapping.family!r}, not {options.family!r}",
            f"run: dsocr-convert {mapping.family} ... --mapping {options.mapping}",
        )
    return [mapping]


def check_options(options: ConvertOptions) -> None:
    """Raise UsageError if the family or the target layout does not exist."""
    check_choices(family=(options.family, registry.families()))
    _target(options)


def _target(options: ConvertOptions) -> LayoutSpec:
    """Return the layout of the output."""
    if layout := registry.find(options.family, options.layout):
        return layout
    layouts = registry.names_of_family(options.family)
    raise UsageError(f"--to {options.to}: no layout of {options.family.upper()}", f"layouts: {', '.join(layouts)}")

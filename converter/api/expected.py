"""Expected output of a conversion, for `verify`: planned again from its sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from converter.api.expected_whole import (
    ADDITION_OPTIONS,
    check_not_itself,
    infer_dtype,
    join_readers,
    plan_whole_encoder,
    source_tensors_of,
)
from converter.checkpoint.adapter import with_adapter
from converter.checkpoint.lora import Adapter
from converter.checkpoint.open import Checkpoint, check_name
from converter.checkpoint.sources import lora_files
from converter.errors import LayoutError, MappingError, OtherFamilyError, UsageError
from converter.layouts import registry
from converter.layouts.detect import detect_layouts
from converter.layouts.template import any_match
from converter.options import ConvertOptions
from converter.plan.plan import Plan, sort_outputs
from converter.plan.planner import ResolvedPlan, plan_to_canonical, resolve_to_canonical
from converter.plan.route import complete_from, retarget
from converter.storage.progress import OnProgress
from converter.tensors.lazy_tensor import grid_size_of, source_tensors
from converter.verification.inputs import Converted, ConvertedEncoder, Expected, Origin, own_tensors
from converter.verification.merging import merged_by_library


def plan_expected(
    target: Converted,
    sources: Mapping[str, str | Path],
    open_file: Callable[[str | Path], Checkpoint],
    options: ConvertOptions,
    on_progress: OnProgress,
) -> Expected:
    """Plan a conversion again, with the options that the converted file shows.

    Args:
        target: The converted file.
        sources: Checkpoints by role: source, or the family, and fill-from; for a whole DeepEncoder source, or the
            families, compressor and queries, and into; lora in all cases.
        open_file: Opens a checkpoint.
        options: The family, and the mapping, state dict, prefix and adapter name of the conversion.
        on_progress: Called as tensors are fetched from a hub.

    Raises:
        DsocrError: A source is missing or of another kind, or is the converted file itself; as in `convert`.
    """
    families, family = [encoder.family for encoder in target.encoders], target.family
    whole = len(families) > 1 or "into" in sources
    roles = ("source", *families, *ADDITION_OPTIONS, "into") if whole else ("source", family, "fill-from", "into")
    roles = (*roles, "lora")
    for role, name in sources.items():
        check_name(name)
        if role not in roles:
            raise UsageError(f"--source {role}=: not for a file of {family}", f"expected {', '.join(roles)}")
    files = [open_file(path) for path in lora_files(sources.get("lora"), options.adapter_name)]
    adapters: list[Adapter] = []

    def open_source(name: str | Path) -> Checkpoint:
        if not files:
            return open_file(name)
        opened = with_adapter(open_file(name), files[0], options.adapter_name)
        adapters.extend(filter(None, [opened.adapter]))
        return replace(opened, adapter=None)

    expected = _expected_of(target, sources, open_source, options, on_progress)
    return merged_by_library(target, expected, adapters[0], files[0], on_progress) if adapters else expected


def _expected_of(
    target: Converted,
    sources: Mapping[str, str | Path],
    open_file: Callable[[str | Path], Checkpoint],
    options: ConvertOptions,
    on_progress: OnProgress,
) -> Expected:
    """Plan a conversion again, without its LoRA adapter."""
    if len(target.encoders) == 1 and "into" not in sources:
        return _expected_encoder(target, sources, open_file, options, on_progress)
    for option in ("mapping", "state_dict"):
        if getattr(options, option) is not None:
            raise UsageError(f"--{option.replace('_', '-')}: not for a whole DeepEncoder", "leave the option out")
    return plan_whole_encoder(target, sources, open_file, options.prefix, on_progress)


def _expected_encoder(
    target: Converted,
    sources: Mapping[str, str | Path],
    open_file: Callable[[str | Path], Checkpoint],
    options: ConvertOptions,
    on_progress: OnProgress,
) -> Expected:
    """Plan the conversion of one encoder again."""
    name = sources.get("source", sources.get(options.family))
    if name is None:
        raise UsageError("--source fill-from=: the source itself is missing", "add --source CHECKPOINT")
    encoder, source = target.encoders[0], open_file(name)
    donor = open_file(sources["fill-from"]) if "fill-from" in sources else None
    checkpoints = [each for each in (source, donor) if each]
    check_not_itself(target, checkpoints)
    try:
        detected, plan = resolve_to_canonical(source, options)
    except OtherFamilyError as error:
        hint = f"{target.source.name} holds {options.family.upper()}: specify the checkpoint that it was converted from"
        raise LayoutError(error.message, hint) from None
    options = replace(options, image_size=_infer_image_size(plan, encoder))
    resolved = ResolvedPlan(detected, plan_to_canonical(source, detected, options))
    known = resolved if options.mapping is None else _known_layout(source, resolved, options)
    donor_plan = None
    if donor is not None:
        donor_plan = resolve_to_canonical(donor, ConvertOptions(options.family, image_size=options.image_size)).plan
    written = _written(resolved.plan, encoder, donor_plan, target)
    dtype = infer_dtype(written.outputs, target.tensors)
    converted = _finished(resolved.plan, donor_plan, dtype)
    reference = converted if known is resolved or known is None else _finished(known.plan, donor_plan, dtype)
    own = own_tensors((known or resolved).detected) if options.image_size is None else {}
    needed = [*source_tensors_of(written.outputs), *source_tensors_of(reference.outputs), *own.values()]
    read = join_readers(checkpoints, needed, on_progress)
    return Expected(
        name=source.name,
        outputs=sort_outputs(written.outputs, dtype),
        rules=written.rules,
        origins={options.family: Origin(converted, reference if known else None, own, read, detected)},
        read=read,
        not_compared=_not_compared(encoder, resolved.plan, written, target),
    )


def _infer_image_size(plan: Plan, encoder: ConvertedEncoder) -> int | None:
    """`--image-size` of the conversion; None if positions were not resampled."""
    for spec in plan.target.tensors:
        tensor = encoder.tensors.get(spec.name.text) if spec.positions else None
        if tensor is None or tensor.shape == plan.outputs[spec.name.text].shape:
            continue
        # Other shapes cannot be resampled positions; they fail the comparison of bytes.
        if grid_size := grid_size_of(spec.positions, tensor.shape):
            return grid_size * plan.sizes.get("patch", plan.target.sizes["patch"])
    return None


def _written(plan: Plan, encoder: ConvertedEncoder, donor: Plan | None, target: Converted) -> Plan:
    """The plan with the names and the layout of the converted file; tensors that no source has are left out."""
    if encoder.layout.is_canonical:
        written = _finished(plan, donor, "keep")
    else:
        mapping = encoder.layout.mapping
        outside = [template for rule in mapping.other_rules for template in rule.sources]
        others = [name for name in target.tensors if not name.startswith(encoder.prefix)]
        full_model = any(any_match(outside, name) for name in others)
        written = retarget(plan, mapping, donor, full_model, "keep", target.source.name, partial=True)
    first = encoder.layout.mapping.signature.prefixes[0]
    names = {
        name: encoder.prefix + name.removeprefix(first) if name.startswith(first) else name for name in written.outputs
    }
    return replace(
        written,
        outputs={names[name]: value for name, value in written.outputs.items()},
        rules={names[name]: rule for name, rule in written.rules.items()},
    )


def _finished(plan: Plan, donor: Plan | None, dtype: str) -> Plan:
    """The plan to canonical names in a type, completed by a donor."""
    if donor is not None:
        return complete_from(plan, donor, dtype)
    return replace(plan, outputs=sort_outputs(plan.outputs, dtype))


def _known_layout(source: Checkpoint, converted: ResolvedPlan, options: ConvertOptions) -> ResolvedPlan | None:
    """The plan by a known layout that fits the tensors that the user's mapping converts; None if none fits.

    Detection gets all tensors, then those alone that the mapping uses: it may drop what no layout knows.
    """
    used = set(source_tensors_of(converted.plan.outputs))
    state_dict = converted.detected.state_dict
    some = {name: tensor for name, tensor in state_dict.tensors.items() if tensor in used}
    for candidate in (state_dict, state_dict._replace(tensors=some)):
        try:
            for detected in detect_layouts(source, registry.layouts(options.family), [candidate]):
                plan = plan_to_canonical(source, detected, replace(options, mapping=None))
                if 2 * len(used.intersection(source_tensors_of(plan.outputs))) > len(used):
                    return ResolvedPlan(detected, plan)
        except (LayoutError, MappingError):
            continue
    return None


def _not_compared(encoder: ConvertedEncoder, plan: Plan, written: Plan, target: Converted) -> tuple[str, ...]:
    """The file's tensors that the source lacks and may lack, so that another checkpoint supplied them."""
    canonical = registry.canonical(encoder.family)
    values = [
        value
        for name, value in {**encoder.tensors, **encoder.extra_tensors}.items()
        if name in plan.missing or canonical.extra_reason(name) is not None
    ]
    keys = [tensor.key for value in values for tensor in source_tensors(value)]
    return tuple(key for key in keys if key in target.tensors and key not in written.outputs)

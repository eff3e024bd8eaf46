"""Expected tensors of a converted file, for `verify`: its conversion is planned again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from converter.assembly.additions import ADDITIONS
from converter.assembly.arrange import LAYOUTS, arrange
from converter.assembly.host import Host, extract_shared, open_host
from converter.assembly.insert import plan_insertion
from converter.assembly.mmproj import matrix_dtype
from converter.assembly.options import refuse
from converter.assembly.parts import EncoderParts, build_encoder, extract_encoder
from converter.checkpoint.adapter import with_adapter
from converter.checkpoint.lora import Adapter
from converter.checkpoint.open import Checkpoint, check_name
from converter.checkpoint.sources import lora_files
from converter.errors import LayoutError, MappingError, OtherFamilyError, UsageError
from converter.layouts import registry
from converter.layouts.detect import detect_layouts
from converter.layouts.spec import Rule
from converter.layouts.template import any_match
from converter.options import ConvertOptions
from converter.plan.plan import Plan, sort_outputs
from converter.plan.planner import ResolvedPlan, plan_to_canonical, resolve_to_canonical
from converter.plan.projector import LLAMA_CPP, find_projector
from converter.plan.route import complete_from, retarget
from converter.storage.local_file import SourceFile
from converter.storage.progress import OnProgress
from converter.tensors.lazy_tensor import LazyTensor, all_source_tensors, cast, grid_size_of, source_tensors
from converter.tensors.tensor_info import TensorInfo
from converter.verification.inputs import Converted, ConvertedEncoder, Expected, Origin, own_tensors
from converter.verification.merging import merged_by_library
from converter.verification.reference_readers import Reader, open_independently

# The options that supply what joins the encoders.
_ADDITION_OPTIONS = [addition.option for addition in ADDITIONS]
# The first of the tensors that --with-projector adds.
_PROJECTOR = "projector.layers.weight"


class _Inputs(NamedTuple):
    """The arguments of `plan_expected`."""

    target: Converted
    sources: Mapping[str, str | Path]
    open_file: Callable[[str | Path], Checkpoint]
    options: ConvertOptions
    on_progress: OnProgress


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
        sources: Checkpoints by role. Of one encoder: source (or the family), fill-from. Of a whole DeepEncoder: source
            (or each family, compressor, queries). Of both: into, lora.
        open_file: Opens a checkpoint.
        options: The family, and the mapping, state dict, prefix and adapter name of the conversion.
        on_progress: Called as tensors are fetched from a hub.

    Raises:
        DsocrError: A source is missing or of another kind, or is the converted file itself; as in `convert`.
    """
    families, family = [encoder.family for encoder in target.encoders], target.family
    whole = len(families) > 1 or "into" in sources
    roles = ("source", *families, *_ADDITION_OPTIONS, "into") if whole else ("source", family, "fill-from", "into")
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

    if whole:
        not_for_whole = {"mapping": options.mapping, "state_dict": options.state_dict}
        refuse("not for a whole DeepEncoder", "leave the option out", **not_for_whole)
    plan = _expected_insertion if "into" in sources else _expected_whole if whole else _expected_encoder
    expected = plan(_Inputs(target, sources, open_source, options, on_progress))
    return merged_by_library(target, expected, adapters[0], files[0], on_progress) if adapters else expected


def _expected_encoder(inputs: _Inputs) -> Expected:
    target, sources, open_file, options, on_progress = inputs
    name = sources.get("source", sources.get(options.family))
    if name is None:
        raise UsageError("--source fill-from=: the source itself is missing", "add --source CHECKPOINT")
    encoder, source = target.encoders[0], open_file(name)
    donor = open_file(sources["fill-from"]) if "fill-from" in sources else None
    checkpoints = [each for each in (source, donor) if each]
    _check_not_itself(target, checkpoints)
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
    dtype = _infer_dtype(written.outputs, target.tensors)
    converted = _finished(resolved.plan, donor_plan, dtype)
    reference = converted if known is resolved or known is None else _finished(known.plan, donor_plan, dtype)
    own = own_tensors((known or resolved).detected) if options.image_size is None else {}
    needed = [*all_source_tensors((*written.outputs.values(), *reference.outputs.values())), *own.values()]
    read = _join_readers(checkpoints, needed, on_progress)
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
        written = retarget(plan, mapping, donor, target.source.name, full_model, partial=True)
    first = encoder.layout.mapping.prefixes[0]
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
    completed = complete_from(plan, donor) if donor is not None else plan
    return replace(completed, outputs=sort_outputs(completed.outputs, dtype))


def _known_layout(source: Checkpoint, converted: ResolvedPlan, options: ConvertOptions) -> ResolvedPlan | None:
    """Return the plan of a known layout for the tensors that the user's mapping converts; None if no layout fits.

    Detection tries all tensors, then only those that the mapping uses.
    """
    used = set(all_source_tensors(converted.plan.outputs.values()))
    state_dict = converted.detected.state_dict
    some = {name: tensor for name, tensor in state_dict.tensors.items() if tensor in used}
    for candidate in (state_dict, state_dict._replace(tensors=some)):
        try:
            for detected in detect_layouts(source, registry.layouts(options.family), [candidate]):
                plan = plan_to_canonical(source, detected, replace(options, mapping=None))
                if 2 * len(used.intersection(all_source_tensors(plan.outputs.values()))) > len(used):
                    return ResolvedPlan(detected, plan)
        except (LayoutError, MappingError):
            continue
    return None


def _not_compared(encoder: ConvertedEncoder, plan: Plan, written: Plan, target: Converted) -> tuple[str, ...]:
    """Return optional tensors of the file that the source lacks; another checkpoint supplied them."""
    canonical = registry.canonical(encoder.family)
    values = [
        value
        for name, value in {**encoder.tensors, **encoder.extra_tensors}.items()
        if name in plan.missing or canonical.extra_reason(name) is not None
    ]
    keys = [tensor.key for value in values for tensor in source_tensors(value)]
    return tuple(key for key in keys if key in target.tensors and key not in written.outputs)


def _expected_whole(inputs: _Inputs) -> Expected:
    target, sources, open_file, options, on_progress = inputs
    families, first = [encoder.family for encoder in target.encoders], target.encoders[0]
    prefix = first.prefix.removesuffix(registry.encoder_prefix(first.family))
    with_projector = not {prefix + _PROJECTOR, LLAMA_CPP[_PROJECTOR]}.isdisjoint(target.tensors)
    if "source" in sources:
        parts = extract_encoder(open_file(sources["source"]), with_projector, options.prefix, families)
    else:
        parts = _built(inputs, families)
    _check_not_itself(target, parts.sources)
    layout = target.layout if target.layout in LAYOUTS else ""
    arranged = arrange(parts, layout, prefix, "keep")
    is_mmproj = layout == "mmproj"
    dtype = matrix_dtype(target.tensors) if is_mmproj else _infer_dtype(arranged.outputs, target.tensors)
    outputs = arrange(parts, layout, prefix, dtype).outputs
    values = dict(parts.tensors)
    for name, value in parts.tensors.items():
        if arranged.names.get(name) and value.dtype.is_float:
            # In the type in which it is written.
            values[name] = cast(value, outputs[arranged.names[name][0]].dtype.name)
    plans = {}
    for family, (detected, plan) in parts.plans.items():
        start = registry.encoder_prefix(family)
        own = {name.removeprefix(start): value for name, value in values.items() if name.startswith(start)}
        plans[family] = ResolvedPlan(detected, replace(plan, outputs=own))
    return _expected(plans, outputs, arranged.rules, parts.sources, on_progress)


def _expected(
    plans: Mapping[str, ResolvedPlan],
    outputs: Mapping[str, LazyTensor],
    rules: Mapping[str, Rule],
    sources: Sequence[Checkpoint],
    on_progress: OnProgress,
) -> Expected:
    """Expected output of several checkpoints; `plans` make the canonical tensors of the outputs."""
    own = {family: own_tensors(resolved.detected) for family, resolved in plans.items()}
    needed = [*all_source_tensors(outputs.values()), *(tensor for each in own.values() for tensor in each.values())]
    read = _join_readers(sources, needed, on_progress)
    return Expected(
        name=", ".join(checkpoint.name for checkpoint in sources),
        outputs=outputs,
        rules=rules,
        origins={family: Origin(plan, plan, own[family], read, detected) for family, (detected, plan) in plans.items()},
        read=read,
    )


def _expected_insertion(inputs: _Inputs) -> Expected:
    target, sources, open_file, options, on_progress = inputs
    host = open_host(Path(sources["into"]), open_file)
    if "source" in sources:
        source = open_file(sources["source"])
        parts = extract_shared(source, host, False, options.prefix)
        first = next(iter(parts.plans))
        if any(find_projector(parts.plans[first]).values()) and _has_other_projector(target, host, first, on_progress):
            parts = extract_shared(source, host, True, options.prefix)
    else:
        families = [family for family in host.families if family in sources]
        if not families:
            raise UsageError("--source into=: the source of the encoder is missing", "add --source CHECKPOINT")
        parts = _built(inputs, families, host.resolve_all(families))
    # The host may be the file itself: its own encoder is not compared with itself.
    _check_not_itself(target, parts.sources)
    insertion = plan_insertion(host, parts, "keep")
    written = {name: tensor for name, tensor in target.tensors.items() if name in insertion.replaced}
    dtype = _infer_dtype(insertion.replaced, written)
    if dtype != "keep":
        insertion = plan_insertion(host, parts, dtype)
    # An encoder that is not replaced is the host's.
    plans = host.resolve_all(encoder.family for encoder in target.encoders) | parts.plans
    plans = {
        family: ResolvedPlan(detected, replace(plan, outputs=insertion.canonical_tensors(family)))
        for family, (detected, plan) in plans.items()
    }
    checkpoints = [*parts.sources, host.checkpoint]
    return _expected(plans, insertion.tensors, insertion.placement.rules, checkpoints, on_progress)


def _has_other_projector(target: Converted, host: Host, family: str, on_progress: OnProgress) -> bool:
    """Whether the projector next to an encoder is not the host's: `--with-projector` of the insertion."""
    old = [tensor for tensor in find_projector(host.resolve(family)).values() if tensor]
    read = open_independently(host.checkpoint, old, on_progress)
    shared = [tensor for tensor in old if tensor.key in target.tensors]
    return any(not read(tensor).equal(target.read(target.tensors[tensor.key])) for tensor in shared)


def _built(inputs: _Inputs, families: Sequence[str], host: Mapping[str, ResolvedPlan] | None = None) -> EncoderParts:
    """The encoders of several checkpoints; `host` has the plans of the one that they were inserted into."""
    sources = inputs.sources
    if missing := [family.upper() for family in families if family not in sources]:
        several = " ".join(f"--source {family}=CHECKPOINT" for family in families)
        raise UsageError(
            f"--source: the file holds a whole DeepEncoder, and no source of its {missing[0]} is given",
            f"name a checkpoint that holds all of it, or {several}",
        )
    encoders = {family: sources[family] for family in families}
    additions = {option: sources[option] for option in _ADDITION_OPTIONS if option in sources}
    try:
        return build_encoder(encoders, additions, inputs.open_file, inputs.options.prefix, host)
    except LayoutError as error:
        hint = error.hint
        for option in _ADDITION_OPTIONS:
            hint = hint.replace(f"--{option} ", f"--source {option}=")
        raise LayoutError(error.message, hint) from None


def _check_not_itself(target: Converted, sources: Iterable[Checkpoint]) -> None:
    """UsageError if a source is the converted file, which equals itself whatever it holds."""
    written = {file.identity for file in target.source.files} - {None}
    for source in sources:
        if written & {file.identity for file in source.files}:
            message = f"--source {source.name}: is the converted file itself"
            raise UsageError(message, "specify the checkpoint that it was converted from")


def _join_readers(sources: Iterable[Checkpoint], needed: Iterable[TensorInfo], on_progress: OnProgress) -> Reader:
    """A reader of the tensors of several checkpoints; those that are needed are fetched from a hub."""
    readers: dict[SourceFile, Reader] = {}
    for source in sources:
        own = [tensor for tensor in needed if tensor.storage.file in source.files]
        readers |= dict.fromkeys(source.files, open_independently(source, own, on_progress))
    return lambda tensor: readers[tensor.storage.file](tensor)


def _infer_dtype(outputs: Mapping[str, LazyTensor], tensors: Mapping[str, TensorInfo]) -> str:
    """Return `--dtype` of the conversion: the one floating-point type of the file, if it is not the sources'."""
    actual = {tensor.dtype.name for tensor in tensors.values() if tensor.dtype.is_float}
    kept = {value.dtype.name for value in outputs.values() if value.dtype.is_float}
    return next(iter(actual)) if len(actual) == 1 and actual != kept else "keep"

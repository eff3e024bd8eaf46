"""Plans a conversion again, to get the tensors that the converted file should contain. For `verify`."""

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
from converter.storage.progress import OnProgress
from converter.tensors.lazy_tensor import LazyTensor, all_source_tensors, cast, grid_size_of
from converter.tensors.tensor_info import TensorInfo
from converter.verification.inputs import Converted, ConvertedEncoder, Expected, Origin, native_tensors
from converter.verification.merging import merged_by_library
from converter.verification.reference_readers import join_readers, open_independently

# The options that supply the compressor and the queries.
_ADDITION_OPTIONS = [addition.option for addition in ADDITIONS]
# The first of the tensors that --with-projector adds.
_PROJECTOR_WEIGHT = "projector.layers.weight"


class Inputs(NamedTuple):
    """A converted file, and what is known of its conversion."""

    target: Converted  # The converted file
    # Checkpoints by role. Of one encoder: source (or the family), fill-from. Of a whole DeepEncoder: source (or each
    # family, compressor, queries). Of both: into, lora.
    sources: Mapping[str, str | Path]
    open_file: Callable[[str | Path], Checkpoint]
    options: ConvertOptions  # The family, and the mapping, state dict, prefix and adapter name of the conversion
    on_progress: OnProgress  # Called as tensors are fetched from a hub


def plan_expected(inputs: Inputs) -> Expected:
    """Plan a conversion again, with the options that the converted file shows.

    Raises:
        DsocrError: A source is missing or of another kind, or is the converted file itself; as in `convert`.
    """
    target, sources, open_file, options, on_progress = inputs
    is_deep_encoder = len(target.encoders) > 1 or "into" in sources
    _check_roles(target, sources, is_deep_encoder)
    if is_deep_encoder:
        refuse("not for a whole DeepEncoder", "leave it out", mapping=options.mapping, state_dict=options.state_dict)
    adapter_files = [open_file(path) for path in lora_files(sources.get("lora"), options.adapter_name)]
    adapters: list[Adapter] = []

    def open_without_adapter(name: str | Path) -> Checkpoint:
        """Open a source, and collect the adapter, which `merged_by_library` merges."""
        if not adapter_files:
            return open_file(name)
        opened = with_adapter(open_file(name), adapter_files[0], options.adapter_name)
        if opened.adapter:
            adapters.append(opened.adapter)
        return replace(opened, adapter=None)

    plan = _expect_deep_encoder if is_deep_encoder else _expect_encoder
    if "into" in sources:
        plan = _expect_insertion
    expected = plan(inputs._replace(open_file=open_without_adapter))
    if not adapters:
        return expected
    return merged_by_library(target, expected, adapters[0], adapter_files[0], on_progress)


def _check_roles(target: Converted, sources: Mapping[str, str | Path], is_deep_encoder: bool) -> None:
    """Raise UsageError for a source that is not a path, or whose role does not fit the converted file."""
    if is_deep_encoder:
        roles = ["source", *(encoder.family for encoder in target.encoders), *_ADDITION_OPTIONS, "into", "lora"]
    else:
        roles = ["source", target.family, "fill-from", "into", "lora"]
    for role, name in sources.items():
        check_name(name)
        if role not in roles:
            raise UsageError(f"--source {role}=: not for a file of {target.family}", f"expected {', '.join(roles)}")


def _expect_encoder(inputs: Inputs) -> Expected:
    """Plan the conversion of one encoder again."""
    target, sources, open_file, options, on_progress = inputs
    source_name = sources.get("source", sources.get(options.family))
    if source_name is None:
        raise UsageError("--source fill-from=: the source itself is missing", "add --source CHECKPOINT")
    encoder, source = target.encoders[0], open_file(source_name)
    donor = open_file(sources["fill-from"]) if "fill-from" in sources else None
    checkpoints = [source] if donor is None else [source, donor]
    _check_not_itself(target, checkpoints)
    detected, plan = _resolve_source(source, inputs)
    options = replace(options, image_size=_infer_image_size(plan, encoder))
    resolved = ResolvedPlan(detected, plan_to_canonical(source, detected, options))
    builtin = resolved if options.mapping is None else _resolve_builtin(source, resolved, options)
    donor_plan = None
    if donor is not None:
        donor_plan = resolve_to_canonical(donor, ConvertOptions(options.family, image_size=options.image_size)).plan
    written = _with_prefix_in_file(_plan_in_layout(resolved.plan, encoder, donor_plan, target), encoder)
    dtype = _infer_dtype(written.outputs, target.tensors)
    converted = _complete(resolved.plan, donor_plan, dtype)
    builtin_plan: Plan | None = converted
    if builtin is not resolved:
        builtin_plan = _complete(builtin.plan, donor_plan, dtype) if builtin else None
    native = native_tensors((builtin or resolved).detected) if options.image_size is None else {}
    values = [*written.outputs.values(), *(builtin_plan or converted).outputs.values()]
    read = join_readers(checkpoints, [*all_source_tensors(values), *native.values()], on_progress)
    return Expected(
        name=source.name,
        outputs=sort_outputs(written.outputs, dtype),
        rules=written.rules,
        origins={options.family: Origin(converted, builtin_plan, native, read, detected)},
        read=read,
        not_compared=_not_compared(encoder, resolved.plan, written, target),
    )


def _resolve_source(source: Checkpoint, inputs: Inputs) -> ResolvedPlan:
    """Detect the layout of the source, which must have the family of the converted file."""
    family = inputs.options.family
    try:
        return resolve_to_canonical(source, inputs.options)
    except OtherFamilyError as error:
        name = inputs.target.source.name
        hint = f"{name} holds {family.upper()}: specify the checkpoint that it was converted from"
        raise LayoutError(error.message, hint) from None


def _infer_image_size(plan: Plan, encoder: ConvertedEncoder) -> int | None:
    """Return the `--image-size` of the conversion; None if positions were not resampled."""
    for spec in plan.target.tensors:
        tensor = encoder.tensors.get(spec.name.text) if spec.positions else None
        if tensor is None or tensor.shape == plan.outputs[spec.name.text].shape:
            continue
        # Other shapes cannot be resampled positions; they fail the comparison of bytes.
        if grid_size := grid_size_of(spec.positions, tensor.shape):
            return grid_size * plan.sizes.get("patch", plan.target.sizes["patch"])
    return None


def _plan_in_layout(plan: Plan, encoder: ConvertedEncoder, donor: Plan | None, target: Converted) -> Plan:
    """Return the plan to the layout of the converted file, without tensors that neither source nor donor has."""
    if encoder.layout.is_canonical:
        return _complete(plan, donor, "keep")
    mapping = encoder.layout.mapping
    templates_outside = [template for rule in mapping.other_rules for template in rule.sources]
    names_outside = [name for name in target.tensors if not name.startswith(encoder.prefix)]
    full_model = any(any_match(templates_outside, name) for name in names_outside)
    return retarget(plan, mapping, donor, target.source.name, full_model, partial=True)


def _with_prefix_in_file(plan: Plan, encoder: ConvertedEncoder) -> Plan:
    """Replace the layout's first prefix in the names of the outputs by the prefix in the converted file."""
    old_prefix = encoder.layout.mapping.prefixes[0]

    def rename(name: str) -> str:
        return encoder.prefix + name.removeprefix(old_prefix) if name.startswith(old_prefix) else name

    return replace(
        plan,
        outputs={rename(name): value for name, value in plan.outputs.items()},
        rules={rename(name): rule for name, rule in plan.rules.items()},
    )


def _complete(plan: Plan, donor: Plan | None, dtype: str) -> Plan:
    """Complete a plan to the canonical layout with a donor's tensors, and cast its outputs to a type."""
    completed = complete_from(plan, donor)
    return replace(completed, outputs=sort_outputs(completed.outputs, dtype))


def _resolve_builtin(source: Checkpoint, converted: ResolvedPlan, options: ConvertOptions) -> ResolvedPlan | None:
    """Return the plan by a built-in layout for the tensors that the user's mapping converts; None if no layout fits.

    Detection tries all tensors, then only those that the mapping uses.
    """
    used = set(all_source_tensors(converted.plan.outputs.values()))
    state_dict = converted.detected.state_dict
    used_by_name = {name: tensor for name, tensor in state_dict.tensors.items() if tensor in used}
    for candidate in (state_dict, state_dict._replace(tensors=used_by_name)):
        try:
            for detected in detect_layouts(source, registry.layouts(options.family), [candidate]):
                plan = plan_to_canonical(source, detected, replace(options, mapping=None))
                shared = used.intersection(all_source_tensors(plan.outputs.values()))
                if len(shared) > len(used) / 2:
                    return ResolvedPlan(detected, plan)
        except (LayoutError, MappingError):
            continue
    return None


def _not_compared(encoder: ConvertedEncoder, plan: Plan, written: Plan, target: Converted) -> tuple[str, ...]:
    """Return the names of optional tensors that the source lacks: another checkpoint supplied them."""
    canonical = registry.canonical(encoder.family)
    optional = [
        value
        for name, value in {**encoder.tensors, **encoder.extra_tensors}.items()
        if name in plan.missing or canonical.extra_reason(name) is not None
    ]
    keys = [tensor.key for tensor in all_source_tensors(optional)]
    return tuple(key for key in keys if key in target.tensors and key not in written.outputs)


def _expect_deep_encoder(inputs: Inputs) -> Expected:
    """Plan the assembly or the extraction of a whole DeepEncoder again."""
    target, sources, open_file, options, on_progress = inputs
    families, first_encoder = [encoder.family for encoder in target.encoders], target.encoders[0]
    prefix = first_encoder.prefix.removesuffix(registry.encoder_prefix(first_encoder.family))
    has_projector = prefix + _PROJECTOR_WEIGHT in target.tensors or LLAMA_CPP[_PROJECTOR_WEIGHT] in target.tensors
    if "source" in sources:
        parts = extract_encoder(open_file(sources["source"]), has_projector, options.prefix, families)
    else:
        parts = _build_parts(inputs, families)
    _check_not_itself(target, parts.sources)
    layout = target.layout if target.layout in LAYOUTS else ""
    arranged = arrange(parts, layout, prefix, "keep")
    is_mmproj = layout == "mmproj"
    dtype = matrix_dtype(target.tensors) if is_mmproj else _infer_dtype(arranged.outputs, target.tensors)
    outputs = arrange(parts, layout, prefix, dtype).outputs
    tensors = dict(parts.tensors)
    for name, value in parts.tensors.items():
        names_in_file = arranged.names.get(name)
        if names_in_file and value.dtype.is_float:
            tensors[name] = cast(value, outputs[names_in_file[0]].dtype.name)
    parts = replace(parts, tensors=tensors)
    plans = {
        family: ResolvedPlan(detected, replace(plan, outputs=parts.encoder(family)))
        for family, (detected, plan) in parts.plans.items()
    }
    return _make_expected(plans, outputs, arranged.rules, parts.sources, on_progress)


def _make_expected(
    plans: Mapping[str, ResolvedPlan],
    outputs: Mapping[str, LazyTensor],
    rules: Mapping[str, Rule],
    sources: Sequence[Checkpoint],
    on_progress: OnProgress,
) -> Expected:
    """Return the expected output of several checkpoints; `plans` convert the encoders to canonical names."""
    native = {family: native_tensors(resolved.detected) for family, resolved in plans.items()}
    needed = all_source_tensors(outputs.values())
    for tensors in native.values():
        needed += tensors.values()
    read = join_readers(sources, needed, on_progress)
    return Expected(
        name=", ".join(checkpoint.name for checkpoint in sources),
        outputs=outputs,
        rules=rules,
        origins={
            family: Origin(plan, plan, native[family], read, detected) for family, (detected, plan) in plans.items()
        },
        read=read,
    )


def _expect_insertion(inputs: Inputs) -> Expected:
    """Plan the insertion of an encoder into a checkpoint again."""
    target, sources, open_file, options, on_progress = inputs
    host = open_host(Path(sources["into"]), open_file)
    if "source" in sources:
        source = open_file(sources["source"])
        parts = extract_shared(source, host, False, options.prefix)
        family, resolved = next(iter(parts.plans.items()))
        if any(find_projector(resolved).values()) and _has_other_projector(target, host, family, on_progress):
            parts = extract_shared(source, host, True, options.prefix)
    else:
        families = [family for family in host.families if family in sources]
        if not families:
            raise UsageError("--source into=: the source of the encoder is missing", "add --source CHECKPOINT")
        parts = _build_parts(inputs, families, host.resolve_all(families))
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
    return _make_expected(plans, insertion.tensors, insertion.placement.rules, checkpoints, on_progress)


def _has_other_projector(target: Converted, host: Host, family: str, on_progress: OnProgress) -> bool:
    """Return whether the file has another projector than the host, as after an insertion with `--with-projector`."""
    old = [tensor for tensor in find_projector(host.resolve(family)).values() if tensor]
    read = open_independently(host.checkpoint, old, on_progress)
    shared = [tensor for tensor in old if tensor.key in target.tensors]
    return any(not read(tensor).equal(target.read(target.tensors[tensor.key])) for tensor in shared)


def _build_parts(
    inputs: Inputs, families: Sequence[str], host: Mapping[str, ResolvedPlan] | None = None
) -> EncoderParts:
    """Combine the encoders of several checkpoints; `host` has the plans of the checkpoint that they replace."""
    sources = inputs.sources
    if missing := [family.upper() for family in families if family not in sources]:
        source_options = " ".join(f"--source {family}=CHECKPOINT" for family in families)
        raise UsageError(
            f"--source: the file holds a whole DeepEncoder, and no source of its {missing[0]} is given",
            f"name a checkpoint that holds all of it, or {source_options}",
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
    """Raise UsageError if a source is the converted file, which equals itself whatever it holds."""
    target_files = {file.identity for file in target.source.files} - {None}
    for source in sources:
        if target_files & {file.identity for file in source.files}:
            message = f"--source {source.name}: is the converted file itself"
            raise UsageError(message, "specify the checkpoint that it was converted from")


def _infer_dtype(outputs: Mapping[str, LazyTensor], tensors: Mapping[str, TensorInfo]) -> str:
    """Return the `--dtype` of the conversion: the only floating-point type of the file, unless the sources have it."""
    file_dtypes = {tensor.dtype.name for tensor in tensors.values() if tensor.dtype.is_float}
    source_dtypes = {value.dtype.name for value in outputs.values() if value.dtype.is_float}
    return file_dtypes.pop() if len(file_dtypes) == 1 and file_dtypes != source_dtypes else "keep"

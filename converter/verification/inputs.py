"""The inputs of a verification: the encoders in the converted file, and what the sources should have given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from converter.checkpoint.open import Checkpoint
from converter.checkpoint.state_dict import StateDict, largest_state_dict
from converter.errors import LayoutError, MappingError, UsageError
from converter.layouts import registry
from converter.layouts.detect import DetectedLayout, detect_layouts, select_state_dicts
from converter.layouts.spec import LayoutSpec, Rule
from converter.layouts.template import any_match
from converter.options import ConvertOptions
from converter.plan.assumptions import Assumptions
from converter.plan.plan import Plan, sort_outputs
from converter.plan.planner import ResolvedPlan, plan_to_canonical, resolve_to_canonical
from converter.plan.route import complete_from, retarget
from converter.storage.local_file import SourceFile
from converter.storage.progress import OnProgress
from converter.tensors.lazy_tensor import LazyTensor, grid_size_of, lazy_read, source_tensors
from converter.tensors.tensor_info import TensorInfo
from converter.verification.reference_readers import Reader, open_independently


@dataclass(frozen=True)
class ConvertedEncoder:
    """One encoder in the converted file."""

    family: str
    layout: LayoutSpec  # The layout of its names
    prefix: str  # The prefix of its names in the file
    tensors: Mapping[str, LazyTensor]  # Its tensors by canonical names, made of the file's
    # Tensors outside the encoder (CLIP's text tower) by canonical names
    extra_tensors: Mapping[str, LazyTensor] = field(default_factory=dict)
    # The file's tensors by the names that the layout's own library loads
    own: Mapping[str, TensorInfo] = field(default_factory=dict)
    in_deep_encoder: bool = True  # Whether the file is made for the DeepEncoder, not for the layout's own library
    # What no tensor shows, as the file's config states it; none for the DeepEncoder
    assumptions: Assumptions = field(default_factory=dict)
    remarks: tuple[str, ...] = ()  # On the file's config
    problem: str = ""  # Why the file does not fit the layout; empty if it does


@dataclass(frozen=True)
class Converted:
    """The converted file, its encoders, and a reader of its tensors by the format's own library."""

    source: Checkpoint
    encoders: tuple[ConvertedEncoder, ...]
    tensors: Mapping[str, TensorInfo]
    read: Reader

    @property
    def family(self) -> str:
        """The family of its encoder; deepencoder for several."""
        return self.encoders[0].family if len(self.encoders) == 1 else "deepencoder"


@dataclass(frozen=True)
class Origin:
    """The source of one encoder, and its conversion to canonical names with the options that the file shows."""

    plan: Plan  # The plan that the file was converted by: by the user's mapping if there is one
    # The plan by a known layout that fits the source: the same without a user's mapping; None if none fits
    known: Plan | None
    # The tensors that the known layout's own library loads; none if positions were resampled
    own: Mapping[str, TensorInfo]
    read: Reader  # Reads its tensors, and those that other sources supply

    @property
    def reference_plan(self) -> Plan:
        """The plan by which a reference is loaded."""
        return self.known or self.plan


@dataclass(frozen=True)
class Expected:
    """What the conversion should have written."""

    name: str  # The names of the sources
    outputs: Mapping[str, LazyTensor]  # All tensors by the file's names
    rules: Mapping[str, Rule]  # The rules that produce them
    origins: Mapping[str, Origin]  # The source of each encoder by family
    read: Reader  # Reads the tensors of all sources
    # Tensors of the file that no source has, though another checkpoint may have supplied them
    not_compared: tuple[str, ...] = ()


def open_any_layout(source: Checkpoint, on_progress: OnProgress, *encoders: ConvertedEncoder) -> Converted:
    """A converted file of any layout.

    Args:
        source: The opened file.
        on_progress: Called as tensors are fetched from a hub.
        encoders: The encoders in it, where they are compared.
    """
    tensors = _largest_state_dict(source).tensors
    return Converted(source, encoders, tensors, open_independently(source, tensors.values(), on_progress))


def _largest_state_dict(source: Checkpoint) -> StateDict:
    """The state dict with the most tensors; LayoutError for several of the same size, such as a model and its EMA."""
    candidates = select_state_dicts(source, None)
    try:
        return largest_state_dict(candidates, source.name)
    except LayoutError as error:
        raise LayoutError(error.message, "convert one of them, and verify the output: it has only one") from None


def open_converted(source: Checkpoint, on_progress: OnProgress) -> Converted:
    """The converted file: one encoder in a canonical or another layout, or a whole DeepEncoder.

    Raises:
        LayoutError: The file has no known layout.
    """
    state_dict = _largest_state_dict(source)
    found = [
        (family, detected)
        for family in registry.families()
        for detected in detect_layouts(source, registry.layouts(family), [state_dict])
    ]
    if len({family for family, _ in found}) == len(found) and any(not _is_canonical(each) for _, each in found):
        return open_any_layout(source, on_progress, *_encoders(source, dict(found)))
    counts = {family: registry.count_known(family, state_dict.tensors) for family in registry.families()}
    family = max(counts, key=lambda name: counts[name])
    # A damaged conversion fits no layout at all.
    if counts[family] > len(state_dict.tensors) / 2:
        tensors = {name: lazy_read(tensor) for name, tensor in state_dict.tensors.items()}
        return open_any_layout(source, on_progress, ConvertedEncoder(family, registry.canonical(family), "", tensors))
    commands = " or ".join(f"dsocr-convert {name} {source.name}" for name in registry.families())
    raise LayoutError(
        f"{source.name}: has no layout that dsocr-convert writes",
        f"convert it first: {commands}; or compare it with its conversion record alone (--record)",
    )


def _is_canonical(detected: DetectedLayout) -> bool:
    return detected.match.layout.is_canonical and not _prefix_in_file(detected)


def _prefix_in_file(detected: DetectedLayout) -> str:
    """The prefix of the encoder's names in the file, with a wrapper that detection removed."""
    prefix = detected.match.prefix
    name, tensor = next((name, each) for name, each in detected.tensors.items() if name.startswith(prefix))
    return tensor.key.removesuffix(name) + prefix


def _encoders(source: Checkpoint, found: Mapping[str, DetectedLayout]) -> list[ConvertedEncoder]:
    return [_encoder(source, family, detected, len(found) > 1) for family, detected in found.items()]


def _encoder(source: Checkpoint, family: str, detected: DetectedLayout, whole: bool) -> ConvertedEncoder:
    layout = detected.match.layout
    encoder = ConvertedEncoder(
        family,
        layout,
        _prefix_in_file(detected),
        {},
        own=own_tensors(detected),
        in_deep_encoder=whole or layout.is_canonical,
    )
    try:
        plan = plan_to_canonical(source, detected, ConvertOptions(family))
    except (LayoutError, MappingError) as error:
        return replace(encoder, problem=error.message)
    encoder = replace(encoder, tensors=plan.outputs, extra_tensors=plan.extra_tensors)
    if encoder.in_deep_encoder:
        return encoder
    return replace(encoder, assumptions=plan.assumptions, remarks=tuple(plan.remarks))


def open_expected(
    target: Converted,
    source: Checkpoint,
    donor: Checkpoint | None,
    options: ConvertOptions,
    on_progress: OnProgress,
) -> Expected:
    """Plan the conversion of one encoder again, with the options that the converted file shows.

    Args:
        target: The converted file.
        source: The opened source.
        donor: The checkpoint that supplied missing tensors (--fill-from), or None.
        options: The family, and the mapping and state dict of the conversion.
        on_progress: Called as tensors are fetched from a hub.

    Raises:
        UsageError: A source is the converted file itself.
    """
    encoder, sources = target.encoders[0], [source] if donor is None else [source, donor]
    check_not_itself(target, sources)
    detected, plan = resolve_to_canonical(source, options)
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
    read = join_readers(sources, needed, on_progress)
    return Expected(
        name=source.name,
        outputs=sort_outputs(written.outputs, dtype),
        rules=written.rules,
        origins={options.family: Origin(converted, reference if known else None, own, read)},
        read=read,
        not_compared=_not_compared(encoder, resolved.plan, written, target),
    )


def check_not_itself(target: Converted, sources: Iterable[Checkpoint]) -> None:
    """UsageError if a source is the converted file, which equals itself whatever it holds."""
    written = {file.identity for file in target.source.files} - {None}
    for source in sources:
        if written & {file.identity for file in source.files}:
            message = f"--source {source.name}: is the converted file itself"
            raise UsageError(message, "specify the checkpoint that it was converted from")


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


def own_tensors(detected: DetectedLayout) -> dict[str, TensorInfo]:
    """The encoder's tensors by the names that the layout's own library loads."""
    return {name: tensor for name, tensor in detected.tensors.items() if name.startswith(detected.match.prefix)}


def source_tensors_of(outputs: Mapping[str, LazyTensor]) -> list[TensorInfo]:
    """The tensors of checkpoints that outputs are made of."""
    return [tensor for value in outputs.values() for tensor in source_tensors(value)]


def join_readers(sources: Iterable[Checkpoint], needed: Iterable[TensorInfo], on_progress: OnProgress) -> Reader:
    """A reader of the tensors of several checkpoints.

    Args:
        sources: The opened checkpoints.
        needed: The tensors to fetch from those on a hub.
        on_progress: Called as they are fetched.
    """
    readers: dict[SourceFile, Reader] = {}
    for source in sources:
        own = [tensor for tensor in needed if tensor.storage.file in source.files]
        readers |= dict.fromkeys(source.files, open_independently(source, own, on_progress))
    return lambda tensor: readers[tensor.storage.file](tensor)


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


def infer_dtype(outputs: Mapping[str, LazyTensor], tensors: Mapping[str, TensorInfo]) -> str:
    """`--dtype` of the conversion: the one floating-point type of the file, if it is not the sources'."""
    actual = {tensor.dtype.name for tensor in tensors.values() if tensor.dtype.is_float}
    kept = {value.dtype.name for value in outputs.values() if value.dtype.is_float}
    return next(iter(actual)) if len(actual) == 1 and actual != kept else "keep"

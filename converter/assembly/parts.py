"""Plans a whole DeepEncoder, combined from several checkpoints or extracted from one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from converter.assembly.additions import ADDITIONS, Addition, is_seed
from converter.checkpoint.open import Checkpoint
from converter.errors import LayoutError, OtherFamilyError, UsageError
from converter.layouts import registry
from converter.layouts.detect import detect_families
from converter.layouts.marks import find_mixed_convolutions
from converter.layouts.shapes import Sizes
from converter.options import ConvertOptions
from converter.output.record import ConversionRecord, Destination, make_record
from converter.plan.apply import OUTSIDE
from converter.plan.planner import ResolvedPlan, resolve_to_canonical
from converter.plan.projector import read_projector
from converter.tensors.lazy_tensor import LazyTensor, all_source_tensors, cast, source_tensors

_Value = TypeVar("_Value")

_CONSTANT_REASON = "a constant that the model generates; DeepSeek-OCR's own checkpoint lacks it"
_NOT_IN_HOST = "the checkpoint of --into has no such tensor"


@dataclass(frozen=True)
class EncoderParts:
    """A DeepEncoder that is planned but not yet written."""

    sources: list[Checkpoint]  # The checkpoints that are read
    plans: dict[str, ResolvedPlan]  # The plan of each family, in the order of the model
    tensors: dict[str, LazyTensor]  # The tensors by names in DeepSeek-OCR's model, without `model.`
    generated: dict[str, str]  # The content of each tensor that no source has
    dropped: dict[str, str]  # The reason for each source tensor that is left out

    def encoder(self, family: str) -> dict[str, LazyTensor]:
        """Return the tensors of one encoder by canonical names."""
        prefix = registry.encoder_prefix(family)
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}

    @property
    def projector(self) -> dict[str, LazyTensor]:
        """The tensors outside all encoders."""
        prefixes = tuple(map(registry.encoder_prefix, self.plans))
        return {name: value for name, value in self.tensors.items() if not name.startswith(prefixes)}

    @property
    def untrained(self) -> dict[str, str]:
        """The descriptions of tensors that a seed generated, by the option that has the seed."""
        descriptions = {}
        for addition in ADDITIONS:
            if texts := [self.generated[name] for name in addition.full_names if name in self.generated]:
                descriptions[addition.option] = min(texts)
        return descriptions

    @property
    def constants(self) -> set[str]:
        """The names of constants (position_ids), which DeepSeek-OCR's checkpoint lacks."""
        return {
            registry.encoder_prefix(family) + spec.name.text
            for family in registry.families()
            for spec in registry.canonical(family).tensors
            if spec.generate
        }


def encoder_record(
    parts: EncoderParts,
    names: Mapping[str, Sequence[str]],
    outputs: Mapping[str, LazyTensor],
    destination: Destination,
    sources: Sequence[Checkpoint],
    notes: Sequence[str] = (),
    inserted: bool = False,
    target: str = "deepencoder",
) -> ConversionRecord:
    """Make the record of an encoder that is planned and not yet written.

    Args:
        parts: The encoder.
        names: For each tensor of the encoder that is written, its names in the output.
        outputs: All tensors of the output.
        destination: The path, format and type of the output.
        sources: The checkpoints that are read, including one that the encoder is inserted into.
        notes: Remarks for the user.
        inserted: Whether the encoder is inserted into a checkpoint, which keeps the tensors that the encoder lacks.
        target: The layout of the output.
    """
    missing, extra = dict[str, str](), dict[str, LazyTensor]()
    for family, resolved in parts.plans.items():
        missing |= _with_prefix(family, resolved.plan.missing)
        # For example CLIP's last norm, which only some hosts have.
        extra |= _with_prefix(family, resolved.plan.extra_tensors)
    written = [(name, new_name) for name, new_names in names.items() for new_name in new_names]
    dropped = parts.dropped | {
        tensor.key: _CONSTANT_REASON if name in parts.constants else _NOT_IN_HOST
        for name, value in parts.tensors.items()
        if name not in names
        for tensor in source_tensors(value)
    }
    kept = {tensor.key for name, value in extra.items() if name in names for tensor in source_tensors(value)}
    return make_record(
        sources,
        parts.plans,
        outputs,
        destination,
        target=target,
        has_config=inserted,
        generated={new_name: parts.generated[name] for name, new_name in written if name in parts.generated},
        missing={name: reason for name, reason in missing.items() if not inserted and name not in parts.tensors},
        dropped={key: reason for key, reason in dropped.items() if key not in kept},
        converted={new_name: outputs[new_name] for _, new_name in written},
        notes=notes,
    )


def build_encoder(
    names: Mapping[str, str | Path],
    additions: Mapping[str, str | Path],
    open_file: Callable[[str | Path], Checkpoint],
    prefix: str | None = None,
    host: Mapping[str, ResolvedPlan] | None = None,
) -> EncoderParts:
    """Combine the encoders of several checkpoints, with a compressor and queries.

    Args:
        names: The checkpoint of each family, in any layout, in the order of the model.
        additions: By option (compressor, queries), a checkpoint with trained tensors or random:SEED. Without an option,
            the tensors of the encoders' checkpoints are used.
        open_file: Opens a checkpoint; called once for each name.
        prefix: The prefix of the encoders' names in all checkpoints, or None.
        host: The plans of the checkpoint that the encoder is inserted into, which may keep its compressor; or None.

    Raises:
        LayoutError: A checkpoint has no encoder of the family, an addition is missing, or its sizes differ.
    """
    # Each is opened once, as the open files identify tensors.
    opened = {str(name): open_file(name) for name in dict.fromkeys(names.values())}
    plans = {
        family: resolve_to_canonical(opened[str(name)], ConvertOptions(family, prefix=prefix))
        for family, name in names.items()
    }
    _remove_required_sizes(plans)
    encoder_tensors = _encoder_tensors(plans)
    tensors, generated, replaced = dict(encoder_tensors), dict[str, str](), dict[str, str]()
    for addition in _additions(plans):
        origin = str(additions.get(addition.option, ""))
        values = list[LazyTensor]()
        if is_seed(origin):
            values = _seeded(addition, origin, plans, host)
            for name, value in zip(addition.full_names, values, strict=True):
                generated[name] = f"{origin}: untrained, {addition.describe_values(value.shape)}"
        elif origin:
            opened[origin] = opened.get(origin) or open_file(origin)
            values = addition.find(opened[origin], _model(plans))
        if values:
            tensors |= zip(addition.full_names, values, strict=True)
            old_values = [encoder_tensors[name] for name in addition.full_names if name in encoder_tensors]
            kept, reason = set(all_source_tensors(values)), f"--{addition.option} {origin} replaces it"
            replaced |= {tensor.key: reason for tensor in all_source_tensors(old_values) if tensor not in kept}
        if host is None:
            addition.check(tensors, _sizes(plans), origin or opened[str(names[addition.family])].name, _model(plans))
    return EncoderParts(list(opened.values()), plans, tensors, generated, _dropped(plans, tensors) | replaced)


def extract_encoder(
    source: Checkpoint,
    with_projector: bool,
    prefix: str | None = None,
    families: Sequence[str] = (),
    partial: bool = False,
) -> EncoderParts:
    """Extract both encoders from a checkpoint.

    Args:
        source: The checkpoint.
        with_projector: Whether to extract the projector too.
        prefix: The prefix of both encoders' names, or None.
        families: The families of the encoders; by default those of the version that the checkpoint has.
        partial: Whether one encoder is enough, and compressor and queries may be missing.

    Raises:
        LayoutError: The checkpoint does not have both encoders.
    """
    families = families or _detect_version(source, prefix)
    options = [ConvertOptions(family, prefix=prefix) for family in families]
    try:
        plans = {option.family: resolve_to_canonical(source, option) for option in options}
    except LayoutError as error:
        if partial:
            raise
        # Without the hint of an OtherFamilyError, which is to convert the only encoder.
        message = error.message if isinstance(error, OtherFamilyError) else str(error)
        raise LayoutError(
            message,
            "SOURCE must hold both SAM and CLIP, or SAM and Qwen2; to combine two checkpoints, name them with --sam "
            "and --clip, or --sam and --qwen2",
        ) from None
    _remove_required_sizes(plans)
    tensors = _encoder_tensors(plans)
    # One encoder's convolutions may be stored as torch does, and the other's as MLX does.
    read = {tensor.key: tensor for tensor in all_source_tensors(tensors.values())}
    if mark := find_mixed_convolutions(read):
        raise mark.error(source.name)
    for addition in _additions(plans) if not partial else ():
        addition.check(tensors, _sizes(plans), source.name, _model(plans))
    if with_projector:
        tensors |= read_projector(source, plans)
    other_parts = {resolved.plan.mapping.drop_rest or OUTSIDE for resolved in plans.values()}
    drop_rest = f"not part of the DeepEncoder (language model{'' if with_projector else ', projector'})"
    dropped = {key: drop_rest if reason in other_parts else reason for key, reason in _dropped(plans, tensors).items()}
    return EncoderParts([source], plans, tensors, {}, dropped)


def _detect_version(source: Checkpoint, prefix: str | None) -> list[str]:
    """Return the families of the first version whose encoders a checkpoint has; by default, of version 1."""
    detected, versions = detect_families(source, prefix), registry.versions()
    return next((families for families in versions if detected.keys() >= set(families)), versions[0])


def _additions(plans: Mapping[str, ResolvedPlan]) -> list[Addition]:
    return [addition for addition in ADDITIONS if addition.family in plans]


def _model(plans: Mapping[str, ResolvedPlan]) -> str:
    """Return the name of a published model that has these encoders."""
    return registry.canonical(list(plans)[-1]).model


def _sizes(plans: Mapping[str, ResolvedPlan]) -> dict[str, Sizes]:
    return {family: resolved.plan.sizes for family, resolved in plans.items()}


def _seeded(
    addition: Addition, seed: str, plans: Mapping[str, ResolvedPlan], host: Mapping[str, ResolvedPlan] | None
) -> list[LazyTensor]:
    """Return untrained tensors in the type of their encoder. The sizes are the host's, or without one the encoders'."""
    dtype = plans[addition.family].plan.outputs[addition.dtype_like].dtype.name
    if host is None:
        shapes = addition.shapes(_sizes(plans))
    else:
        host_tensors = host[addition.family].plan.outputs
        if addition.names[0] not in host_tensors:
            what = f"the checkpoint of --into has no {addition.noun}"
            raise UsageError(f"--{addition.option} {seed}: {what}", "leave it out")
        shapes = {name: host_tensors[name].shape for name in addition.names}
    return [cast(value, dtype) for value in addition.seeded(seed, shapes).values()]


def _dropped(plans: dict[str, ResolvedPlan], tensors: dict[str, LazyTensor]) -> dict[str, str]:
    """Return the reason for each source tensor that no tensor of the encoder is made of."""
    used = {(tensor.storage.file, tensor.key) for tensor in all_source_tensors(tensors.values())}
    dropped: dict[str, str] = {}
    for detected, plan in plans.values():
        available = (*detected.tensors.values(), *detected.outside.values())
        files = {tensor.key: tensor.storage.file for tensor in available}
        for key, reason in plan.dropped.items():
            if (files.get(key), key) in used:
                continue
            # A reason of one family replaces "outside the encoder" of the other one.
            if key not in dropped or reason != (plan.mapping.drop_rest or OUTSIDE):
                dropped[key] = reason
    return dropped


def _remove_required_sizes(plans: Mapping[str, ResolvedPlan]) -> None:
    """Remove the sizes that the next encoder requires from `unusual`, such as 896 channels in DeepSeek-OCR-2."""
    usual = {family: dict(registry.canonical(family).sizes) for family in plans}
    for addition in _additions(plans):
        plan = plans[addition.family].plan
        for name, size in addition.required_sizes(usual).items():
            if plan.sizes.get(name) == size:
                plan.unusual.pop(name, None)


def _encoder_tensors(plans: Mapping[str, ResolvedPlan]) -> dict[str, LazyTensor]:
    """Return the tensors of all plans by their names in DeepSeek-OCR's model."""
    outputs = (_with_prefix(family, resolved.plan.outputs) for family, resolved in plans.items())
    return {name: value for tensors in outputs for name, value in tensors.items()}


def _with_prefix(family: str, values: Mapping[str, _Value]) -> dict[str, _Value]:
    """Return values by the names of their tensors in DeepSeek-OCR's model."""
    return {registry.encoder_prefix(family) + name: value for name, value in values.items()}

"""A whole DeepEncoder: built from its encoders and what joins them, or extracted from a DeepSeek-OCR checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from converter.assembly.additions import ADDITIONS, SEED, Addition
from converter.checkpoint.open import Checkpoint
from converter.errors import LayoutError, UsageError
from converter.layouts import registry
from converter.layouts.detect import detect_families
from converter.layouts.marks import find_half_transposed
from converter.layouts.shapes import Sizes
from converter.options import ConvertOptions
from converter.output.record import ConversionRecord, Destination, make_record
from converter.plan.apply import OUTSIDE
from converter.plan.planner import ResolvedPlan, resolve_to_canonical
from converter.plan.projector import read_projector
from converter.tensors.lazy_tensor import LazyTensor, cast, source_tensors

_CONSTANT = "a constant that the model generates; DeepSeek-OCR's own checkpoint lacks it"
_NO_PLACE = "the checkpoint of --into has no such tensor"


@dataclass(frozen=True)
class EncoderParts:
    """A DeepEncoder that is planned but not yet written."""

    sources: list[Checkpoint]  # The checkpoints that it is read from
    plans: dict[str, ResolvedPlan]  # The plan of each family, in the order of the model
    tensors: dict[str, LazyTensor]  # Its tensors by their names in DeepSeek-OCR's model, without `model.`
    generated: dict[str, str]  # Tensors that no source has, and their content
    dropped: dict[str, str]  # Source tensors that are left out, and why

    def encoder(self, family: str) -> dict[str, LazyTensor]:
        """The tensors of one encoder by canonical names."""
        prefix = registry.encoder_prefix(family)
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}

    @property
    def projector(self) -> dict[str, LazyTensor]:
        """The tensors that belong to no encoder."""
        prefixes = tuple(map(registry.encoder_prefix, self.plans))
        return {name: value for name, value in self.tensors.items() if not name.startswith(prefixes)}

    @property
    def untrained(self) -> dict[str, str]:
        """The tensors that seeds generated, by the option that has the seed."""
        return {
            addition.option: min(texts)
            for addition in ADDITIONS
            if (texts := [self.generated[name] for name in _full_names(addition) if name in self.generated])
        }

    @property
    def constants(self) -> set[str]:
        """Names of constants (position_ids), which DeepSeek-OCR's own checkpoint lacks."""
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
        names: The names of its tensors that are written, and the names in the output of each one or of its parts.
        outputs: All tensors of the output.
        destination: Where they are written.
        sources: The checkpoints that are read, with the one that the encoder is inserted into.
        notes: Remarks for the user.
        inserted: Whether it replaces another encoder, which keeps what this one lacks.
        target: The layout of the output.
    """
    missing = {
        registry.encoder_prefix(family) + name: reason
        for family, resolved in parts.plans.items()
        for name, reason in resolved.plan.missing.items()
    }
    unwritten = {
        tensor.key: _CONSTANT if name in parts.constants else _NO_PLACE
        for name, value in parts.tensors.items()
        if name not in names
        for tensor in source_tensors(value)
    }
    written = [(name, new) for name, several in names.items() for new in several]
    # Such as CLIP's last norm, which only some hosts have.
    extra = {
        tensor.key
        for family, resolved in parts.plans.items()
        for name, value in _with_prefix(family, resolved.plan.extra_tensors).items()
        if name in names
        for tensor in source_tensors(value)
    }
    return make_record(
        sources,
        parts.plans,
        outputs,
        destination,
        target=target,
        has_config=inserted,
        generated={new: parts.generated[name] for name, new in written if name in parts.generated},
        missing={name: reason for name, reason in missing.items() if not inserted and name not in parts.tensors},
        dropped={key: reason for key, reason in (parts.dropped | unwritten).items() if key not in extra},
        converted={new: outputs[new] for _, new in written},
        notes=notes,
    )


def build_encoder(
    names: Mapping[str, str | Path],
    additions: Mapping[str, str | Path],
    open_file: Callable[[str | Path], Checkpoint],
    prefix: str | None = None,
    host: Mapping[str, ResolvedPlan] | None = None,
) -> EncoderParts:
    """Combine the encoders of several checkpoints and what joins them.

    Args:
        names: The checkpoint of each family, in any layout, in the order of the model.
        additions: By option (compressor, queries) a checkpoint with trained ones, or random:SEED. Those that are left
            out come with the encoders.
        open_file: Opens a checkpoint; called once for each name.
        prefix: The prefix of the encoders' names in all checkpoints, or None.
        host: The plans of the checkpoint that they are inserted into, which may keep its compressor; or None.

    Raises:
        LayoutError: A checkpoint has no encoder of the family, an addition is missing, or its sizes differ.
    """
    # Once, as its files identify the tensors that are used.
    opened = {str(name): open_file(name) for name in dict.fromkeys(names.values())}
    plans = {
        family: resolve_to_canonical(opened[str(name)], ConvertOptions(family, prefix=prefix))
        for family, name in names.items()
    }
    _expect_sizes(plans)
    own = tensors = _own_tensors(plans)
    generated, replaced = dict[str, str](), dict[str, str]()
    for addition in _additions(plans):
        origin = str(additions.get(addition.option, ""))
        if origin.startswith(SEED):
            new = _seeded(addition, origin, plans, host)
            generated |= {name: f"{origin}: untrained, {addition.distribution(new[name].shape)}" for name in new}
        elif origin:
            opened[origin] = opened.get(origin) or open_file(origin)
            new = _with_prefix(addition.family, addition.find(opened[origin], _model(plans)))
        else:
            new = {}
        tensors = tensors | new
        replaced |= dict.fromkeys(_keys(own, new), f"--{addition.option} {origin} replaces it")
        if host is None:
            _check(addition, plans, tensors, origin or opened[str(names[addition.family])].name)
    dropped = _dropped(plans, tensors) | replaced
    return EncoderParts(list(opened.values()), plans, tensors, generated, dropped)


def extract_encoder(
    source: Checkpoint,
    with_projector: bool,
    prefix: str | None = None,
    families: Sequence[str] = (),
    partial: bool = False,
) -> EncoderParts:
    """Take both encoders out of a checkpoint.

    Args:
        source: The checkpoint.
        with_projector: Whether to take the projector too.
        prefix: The prefix of both encoders' names, or None.
        families: Their families; by default those of the first version that the checkpoint has.
        partial: Whether one encoder is enough, and compressor and queries may be missing.

    Raises:
        LayoutError: The checkpoint does not have both encoders.
    """
    families = families or _version_in(source, prefix)
    options = [ConvertOptions(family, prefix=prefix) for family in families]
    try:
        plans = {option.family: resolve_to_canonical(source, option) for option in options}
    except LayoutError as error:
        if partial:
            raise
        raise LayoutError(
            f"{error}",
            "SOURCE must hold both SAM and CLIP, or SAM and Qwen2; to combine two checkpoints, name them with --sam "
            "and --clip, or --sam and --qwen2",
        ) from None
    _expect_sizes(plans)
    tensors = _own_tensors(plans)
    _check_order(source, tensors)
    for addition in _additions(plans) if not partial else ():
        _check(addition, plans, tensors, source.name)
    if with_projector:
        tensors |= read_projector(source, plans)
    other_parts = {resolved.plan.mapping.drop_rest or OUTSIDE for resolved in plans.values()}
    drop_rest = f"not part of the DeepEncoder (language model{'' if with_projector else ', projector'})"
    dropped = {key: drop_rest if reason in other_parts else reason for key, reason in _dropped(plans, tensors).items()}
    return EncoderParts([source], plans, tensors, {}, dropped)


def _check_order(source: Checkpoint, tensors: Mapping[str, LazyTensor]) -> None:
    """Raise LayoutError if one encoder's convolutions are stored as torch does, and the other's as MLX does."""
    read = {tensor.key: tensor for value in tensors.values() for tensor in source_tensors(value)}
    if mark := find_half_transposed(read):
        raise mark.error(source.name)


def _version_in(source: Checkpoint, prefix: str | None) -> list[str]:
    """The families of the first version of which a checkpoint has all encoders, else those of the first version."""
    found, versions = detect_families(source, prefix), registry.versions()
    return next((families for families in versions if found.keys() >= set(families)), versions[0])


def _expect_sizes(plans: Mapping[str, ResolvedPlan]) -> None:
    """Mark as usual what the next encoder requires: a compressor of 896 channels in DeepSeek-OCR-2."""
    usual = {family: dict(registry.canonical(family).sizes) for family in plans}
    for addition in _additions(plans):
        plan = plans[addition.family].plan
        for name, size in addition.sizes(usual).items():
            if plan.sizes.get(name) == size:
                plan.unusual.pop(name, None)


def _additions(plans: Mapping[str, ResolvedPlan]) -> list[Addition]:
    return [addition for addition in ADDITIONS if addition.family in plans]


def _full_names(addition: Addition) -> list[str]:
    return [registry.encoder_prefix(addition.family) + name for name in addition.names]


def _model(plans: Mapping[str, ResolvedPlan]) -> str:
    """A published model that has these encoders."""
    return registry.canonical(list(plans)[-1]).model


def _sizes(plans: Mapping[str, ResolvedPlan]) -> dict[str, Sizes]:
    return {family: resolved.plan.sizes for family, resolved in plans.items()}


def _seeded(
    addition: Addition, seed: str, plans: Mapping[str, ResolvedPlan], host: Mapping[str, ResolvedPlan] | None
) -> dict[str, LazyTensor]:
    """Untrained tensors of the host's sizes, or of the encoders' without a host, in the type of their encoder."""
    dtype = plans[addition.family].plan.outputs[addition.typed_as].dtype.name
    if host is None:
        shapes = addition.shapes(_sizes(plans))
    else:
        own = host[addition.family].plan.outputs
        if addition.names[0] not in own:
            what = f"the checkpoint of --into has no {addition.noun}"
            raise UsageError(f"--{addition.option} {seed}: {what}", "leave it out")
        shapes = {name: own[name].shape for name in addition.names}
    tensors = addition.seeded(seed, shapes)
    return _with_prefix(addition.family, {name: cast(value, dtype) for name, value in tensors.items()})


def _keys(own: Mapping[str, LazyTensor], new: Mapping[str, LazyTensor]) -> list[str]:
    """The source tensors of those of `own` that others replace."""
    kept = [tensor for value in new.values() for tensor in source_tensors(value)]
    replaced = [tensor for name in new if name in own for tensor in source_tensors(own[name])]
    return [tensor.key for tensor in replaced if tensor not in kept]


def _check(
    addition: Addition, plans: Mapping[str, ResolvedPlan], tensors: Mapping[str, LazyTensor], origin: str
) -> None:
    full_names = zip(addition.names, _full_names(addition), strict=True)
    found = {name: tensors[full] for name, full in full_names if full in tensors}
    addition.check(found, _sizes(plans), origin, _model(plans))


def _dropped(plans: dict[str, ResolvedPlan], tensors: dict[str, LazyTensor]) -> dict[str, str]:
    """Source tensors that no encoder tensor is made of, and why."""
    used = {(tensor.storage.file, tensor.key) for value in tensors.values() for tensor in source_tensors(value)}
    dropped: dict[str, str] = {}
    for detected, plan in plans.values():
        read = (*detected.tensors.values(), *detected.outside.values())
        files = {tensor.key: tensor.storage.file for tensor in read}
        for key, reason in plan.dropped.items():
            if (files.get(key), key) in used:
                continue
            # The other family may have a better reason.
            if key not in dropped or reason != (plan.mapping.drop_rest or OUTSIDE):
                dropped[key] = reason
    return dropped


def _own_tensors(plans: dict[str, ResolvedPlan]) -> dict[str, LazyTensor]:
    """The tensors of both plans by their names in DeepSeek-OCR's model."""
    return {
        name: value
        for family, resolved in plans.items()
        for name, value in _with_prefix(family, resolved.plan.outputs).items()
    }


def _with_prefix(family: str, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    return {registry.encoder_prefix(family) + name: value for name, value in tensors.items()}

"""Expected output of `encoder`, for `verify`: planned again from its sources."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from converter.assembly.additions import ADDITIONS
from converter.assembly.arrange import LAYOUTS, arrange
from converter.assembly.host import Host, extract_shared, open_host
from converter.assembly.insert import plan_insertion
from converter.assembly.mmproj import matrix_dtype
from converter.assembly.parts import EncoderParts, build_encoder, extract_encoder
from converter.checkpoint.open import Checkpoint
from converter.errors import LayoutError, UsageError
from converter.layouts import registry
from converter.layouts.spec import Rule
from converter.plan.plan import Plan
from converter.plan.planner import ResolvedPlan
from converter.plan.projector import LLAMA_CPP, find_projector
from converter.storage.local_file import SourceFile
from converter.storage.progress import OnProgress
from converter.tensors.lazy_tensor import LazyTensor, cast, source_tensors
from converter.tensors.tensor_info import TensorInfo
from converter.verification.inputs import Converted, Expected, Origin, own_tensors
from converter.verification.reference_readers import Reader, open_independently

# The options that supply what joins the encoders.
ADDITION_OPTIONS = [addition.option for addition in ADDITIONS]
# The first of the tensors that --with-projector adds.
_PROJECTOR = "projector.layers.weight"


def plan_whole_encoder(
    target: Converted,
    sources: Mapping[str, str | Path],
    open_file: Callable[[str | Path], Checkpoint],
    encoder_prefix: str | None,
    on_progress: OnProgress,
) -> Expected:
    """Plan again what `encoder` wrote.

    Args:
        target: The converted file.
        sources: Checkpoints by role: source, or the families and what joins them; into.
        open_file: Opens a checkpoint.
        encoder_prefix: The prefix of the encoders' names in the sources, or None.
        on_progress: Called as tensors are fetched from a hub.

    Raises:
        DsocrError: A source is missing or of another kind, or is the converted file itself; as in `encoder`.
    """
    families = [encoder.family for encoder in target.encoders]
    if "into" in sources:
        return _expected_insertion(target, sources, open_file, encoder_prefix, on_progress)
    first = target.encoders[0]
    prefix = first.prefix.removesuffix(registry.encoder_prefix(first.family))
    with_projector = not {prefix + _PROJECTOR, LLAMA_CPP[_PROJECTOR]}.isdisjoint(target.tensors)
    if "source" in sources:
        parts = extract_encoder(open_file(sources["source"]), with_projector, encoder_prefix, families)
    else:
        parts = _built(sources, open_file, encoder_prefix, families)
    check_not_itself(target, parts.sources)
    layout = target.layout if target.layout in LAYOUTS else ""
    arranged = arrange(parts, layout, prefix, "keep")
    is_mmproj = layout == "mmproj"
    dtype = matrix_dtype(target.tensors) if is_mmproj else infer_dtype(arranged.outputs, target.tensors)
    outputs = arrange(parts, layout, prefix, dtype).outputs
    values = {name: _like(value, outputs, arranged.names.get(name)) for name, value in parts.tensors.items()}
    plans = {
        family: ResolvedPlan(detected, _with_outputs(plan, values)) for family, (detected, plan) in parts.plans.items()
    }
    return _expected(plans, outputs, arranged.rules, parts.sources, on_progress)


def _like(value: LazyTensor, outputs: Mapping[str, LazyTensor], names: Sequence[str] | None) -> LazyTensor:
    """A tensor of the encoder in the type in which it is written."""
    return cast(value, outputs[names[0]].dtype.name) if names and value.dtype.is_float else value


def _expected(
    plans: Mapping[str, ResolvedPlan],
    outputs: Mapping[str, LazyTensor],
    rules: Mapping[str, Rule],
    sources: Sequence[Checkpoint],
    on_progress: OnProgress,
) -> Expected:
    """Expected output of several checkpoints; `plans` make the canonical tensors of the outputs."""
    own = {family: own_tensors(resolved.detected) for family, resolved in plans.items()}
    needed = [*source_tensors_of(outputs), *(tensor for each in own.values() for tensor in each.values())]
    read = join_readers(sources, needed, on_progress)
    return Expected(
        name=", ".join(checkpoint.name for checkpoint in sources),
        outputs=outputs,
        rules=rules,
        origins={family: Origin(plan, plan, own[family], read, detected) for family, (detected, plan) in plans.items()},
        read=read,
    )


def _expected_insertion(
    target: Converted,
    sources: Mapping[str, str | Path],
    open_file: Callable[[str | Path], Checkpoint],
    encoder_prefix: str | None,
    on_progress: OnProgress,
) -> Expected:
    """Plan the insertion of an encoder into a host again."""
    host = open_host(Path(sources["into"]), open_file)
    if "source" in sources:
        source = open_file(sources["source"])
        parts = extract_shared(source, host, False, encoder_prefix)
        first = next(iter(parts.plans))
        if any(find_projector(parts.plans[first]).values()) and _has_other_projector(target, host, first, on_progress):
            parts = extract_shared(source, host, True, encoder_prefix)
    else:
        families = [family for family in host.families if family in sources]
        if not families:
            raise UsageError("--source into=: the source of the encoder is missing", "add --source CHECKPOINT")
        parts = _built(sources, open_file, encoder_prefix, families, host.resolve_all(families))
    # The host may be the file itself: its own encoder is not compared with itself.
    check_not_itself(target, parts.sources)
    insertion = plan_insertion(host, parts, "keep")
    written = {name: tensor for name, tensor in target.tensors.items() if name in insertion.replaced}
    dtype = infer_dtype(insertion.replaced, written)
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


def _built(
    sources: Mapping[str, str | Path],
    open_file: Callable[[str | Path], Checkpoint],
    prefix: str | None,
    families: Sequence[str],
    host: Mapping[str, ResolvedPlan] | None = None,
) -> EncoderParts:
    """The encoders of several checkpoints; `host` has the plans of the one that they were inserted into."""
    missing = [family for family in families if family not in sources]
    if missing:
        raise UsageError(
            f"--source: the file holds a whole DeepEncoder, and no source of its {missing[0].upper()} is given",
            "name a checkpoint that holds all of it, or "
            + " ".join(f"--source {family}=CHECKPOINT" for family in families),
        )
    encoders = {family: sources[family] for family in families}
    try:
        additions = {option: sources[option] for option in ADDITION_OPTIONS if option in sources}
        return build_encoder(encoders, additions, open_file, prefix, host)
    except LayoutError as error:
        hint = error.hint
        for option in ADDITION_OPTIONS:
            hint = hint.replace(f"--{option} ", f"--source {option}=")
        raise LayoutError(error.message, hint) from None


def _with_outputs(plan: Plan, values: Mapping[str, LazyTensor]) -> Plan:
    """The plan of a family with the tensors of the whole DeepEncoder under its prefix."""
    prefix = registry.encoder_prefix(plan.mapping.family)
    outputs = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    return replace(plan, outputs=outputs)


def check_not_itself(target: Converted, sources: Iterable[Checkpoint]) -> None:
    """UsageError if a source is the converted file, which equals itself whatever it holds."""
    written = {file.identity for file in target.source.files} - {None}
    for source in sources:
        if written & {file.identity for file in source.files}:
            message = f"--source {source.name}: is the converted file itself"
            raise UsageError(message, "specify the checkpoint that it was converted from")


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


def infer_dtype(outputs: Mapping[str, LazyTensor], tensors: Mapping[str, TensorInfo]) -> str:
    """Return `--dtype` of the conversion: the one floating-point type of the file, if it is not the sources'."""
    actual = {tensor.dtype.name for tensor in tensors.values() if tensor.dtype.is_float}
    kept = {value.dtype.name for value in outputs.values() if value.dtype.is_float}
    return next(iter(actual)) if len(actual) == 1 and actual != kept else "keep"

"""What `encoder` should have written, for `verify`: planned again from its sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from converter.assembly.insert import plan_insertion
from converter.assembly.parts import EncoderParts, build_encoder, extract_encoder
from converter.checkpoint.open import Checkpoint
from converter.errors import LayoutError, UsageError
from converter.layouts import registry
from converter.plan.plan import Plan, sort_outputs
from converter.storage.progress import OnProgress
from converter.tensors.lazy_tensor import LazyTensor
from converter.verification.inputs import (
    Converted,
    Expected,
    Origin,
    check_not_itself,
    infer_dtype,
    join_readers,
    own_tensors,
    source_tensors_of,
)

# The first of the tensors that --with-projector adds.
_PROJECTOR = "projector.layers.weight"


def expected_encoder(
    target: Converted,
    sources: Mapping[str, str | Path],
    open_file: Callable[[str | Path], Checkpoint],
    encoder_prefix: str | None,
    on_progress: OnProgress,
) -> Expected:
    """Plan the assembly of a whole DeepEncoder again, with the options that the converted file shows.

    Args:
        target: The converted file.
        sources: Checkpoints by role: source; or sam, clip and compressor; into.
        open_file: Opens a checkpoint.
        encoder_prefix: The prefix of the encoders' names in the sources (--prefix), or None.
        on_progress: Called as tensors are fetched from a hub.

    Raises:
        LayoutError: A checkpoint is of another kind, or there is no compressor.
        UsageError: The checkpoint of an encoder is missing, or is the converted file itself.
    """
    first = target.encoders[0]
    prefix = first.prefix.removesuffix(registry.encoder_prefix(first.family))
    with_projector = prefix + _PROJECTOR in target.tensors and "into" not in sources
    parts = _parts(sources, open_file, with_projector, encoder_prefix)
    # The host may be the file itself: its own encoder is not compared with itself.
    check_not_itself(target, parts.sources)
    names, outputs, checkpoints = _outputs(parts, prefix, target, sources, open_file)
    own = {family: own_tensors(resolved.detected) for family, resolved in parts.plans.items()}
    needed = [*source_tensors_of(outputs), *(tensor for each in own.values() for tensor in each.values())]
    read = join_readers(checkpoints, needed, on_progress)
    values = {name: outputs[names[name]] if name in names else value for name, value in parts.tensors.items()}
    plans = {family: _with_outputs(resolved.plan, values) for family, resolved in parts.plans.items()}
    return Expected(
        name=", ".join(checkpoint.name for checkpoint in checkpoints),
        outputs=outputs,
        rules={
            names[registry.encoder_prefix(family) + name]: rule
            for family, plan in plans.items()
            for name, rule in plan.rules.items()
            if registry.encoder_prefix(family) + name in names
        },
        origins={family: Origin(plan, plan, own[family], read) for family, plan in plans.items()},
        read=read,
    )


def _parts(
    sources: Mapping[str, str | Path],
    open_file: Callable[[str | Path], Checkpoint],
    with_projector: bool,
    prefix: str | None,
) -> EncoderParts:
    if "source" in sources:
        return extract_encoder(open_file(sources["source"]), with_projector, prefix)
    missing = [family for family in registry.families() if family not in sources]
    if missing:
        raise UsageError(
            f"--source: the file holds a whole DeepEncoder, and no source of its {missing[0].upper()} is given",
            "name a checkpoint that holds all of it, or "
            + " ".join(f"--source {family}=CHECKPOINT" for family in registry.families()),
        )
    encoders = {family: sources[family] for family in registry.families()}
    try:
        return build_encoder(encoders, str(sources.get("compressor", "")), open_file, prefix)
    except LayoutError as error:
        if "compressor" in sources:
            raise
        raise LayoutError(error.message, "add --source compressor=CHECKPOINT, or compressor=random:SEED") from None


def _outputs(
    parts: EncoderParts,
    prefix: str,
    target: Converted,
    sources: Mapping[str, str | Path],
    open_file: Callable[[str | Path], Checkpoint],
) -> tuple[Mapping[str, str], dict[str, LazyTensor], list[Checkpoint]]:
    """The names of the encoder's tensors in the file, all tensors of the file, and the checkpoints."""
    if "into" in sources:
        host = Path(sources["into"])
        insertion = plan_insertion(host, open_file, parts.tensors, parts.constants, "keep")
        dtype = infer_dtype(insertion.replaced, {name: target.tensors[name] for name in insertion.replaced})
        if dtype != "keep":
            insertion = plan_insertion(host, open_file, parts.tensors, parts.constants, dtype)
        return insertion.keys, insertion.tensors, [*parts.sources, insertion.host]
    names = {name: prefix + name for name in parts.tensors if name not in parts.constants}
    outputs = {new: parts.tensors[name] for name, new in names.items()}
    return names, sort_outputs(outputs, infer_dtype(outputs, target.tensors)), parts.sources


def _with_outputs(plan: Plan, values: Mapping[str, LazyTensor]) -> Plan:
    """The plan of a family with the tensors of the whole DeepEncoder under its prefix."""
    prefix = registry.encoder_prefix(plan.mapping.family)
    outputs = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    return replace(plan, outputs=outputs)

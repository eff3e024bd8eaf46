"""A DeepEncoder before it is written: put together from SAM, compressor and CLIP, or taken out of a whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from converter.assembly.compressor import NAMES as NETS
from converter.assembly.compressor import check_compressor, find_compressor, seeded
from converter.checkpoint.open import Checkpoint
from converter.errors import LayoutError
from converter.layouts import registry
from converter.options import ConvertOptions
from converter.output.record import ConversionRecord, make_record
from converter.plan.planner import ResolvedPlan, resolve_to_canonical
from converter.tensors.lazy_tensor import LazyTensor, cast, lazy_read, source_tensors

PREFIX = "model."
_CONSTANT = "a constant that the model makes itself; DeepSeek-OCR's own checkpoint lacks it"
# What leads from the encoder to the language model, by DeepSeek's names, misspelling included, and by transformers'.
_PROJECTOR = {
    "projector.layers.weight": "multi_modal_projector.weight",
    "projector.layers.bias": "multi_modal_projector.bias",
    "image_newline": "image_newline",
    "view_seperator": "view_separator",
}


class Parts(NamedTuple):
    """A DeepEncoder before it is written: `outputs` by the names that it has inside of DeepSeek-OCR's model.

    position_ids, a constant that DeepSeek's checkpoint lacks, is among them. `filled` and `dropped` are the card's.
    """

    opened: list[Checkpoint]
    plans: dict[str, ResolvedPlan]
    outputs: dict[str, LazyTensor]
    generated: dict[str, str]
    dropped: dict[str, str]

    @property
    def constants(self) -> set[str]:
        """Those of the outputs that are written only where they replace one."""
        specs = {
            registry.encoder_prefix(f) + spec.name.text: spec
            for f in registry.families()
            for spec in registry.canonical(f).tensors
        }
        return {name for name, spec in specs.items() if spec.generate}


def encoder_record(
    parts: Parts,
    names: Mapping[str, str],
    outputs: Mapping[str, LazyTensor],
    *,
    output: Path,
    format: str,
    dtype: str,
    host: Checkpoint | None = None,
    notes: Sequence[str] = (),
) -> ConversionRecord:
    """Make the record of an encoder that is planned and not yet written.

    Args:
        parts: The encoder.
        names: The names of its tensors that are written, and their names in the output.
        outputs: All tensors of the output.
        output: The path of the output.
        format: safetensors or pth.
        dtype: The requested type.
        host: The checkpoint that the encoder is inserted into.
        notes: Remarks for the user.
    """
    missing = {
        registry.encoder_prefix(family) + name: reason
        for family, resolved in parts.plans.items()
        for name, reason in resolved.plan.missing.items()
    }
    unwritten = [value for name, value in parts.outputs.items() if name not in names]
    constants = {tensor.key: _CONSTANT for value in unwritten for tensor in source_tensors(value)}
    return make_record(
        [*parts.opened, host] if host else parts.opened,
        parts.plans,
        outputs,
        target="deepencoder",
        output=output,
        format=format,
        dtype=dtype,
        generated={new: parts.generated[name] for name, new in names.items() if name in parts.generated},
        missing={name: reason for name, reason in missing.items() if name not in parts.outputs},
        dropped=parts.dropped | constants,
        converted={new: outputs[new] for new in names.values()},
        notes=notes,
    )


def put_together(sam: Checkpoint, clip: Checkpoint, wanted: str, open_: Callable[[str], Checkpoint]) -> Parts:
    """The encoder of two checkpoints and a compressor: `wanted` is its SOURCE, random:SEED, or empty for SAM's own.

    LayoutError where a checkpoint is not of its kind or there is no compressor, UsageError where sizes do not fit.
    """
    plans = {
        "sam": resolve_to_canonical(sam, ConvertOptions("sam")),
        "clip": resolve_to_canonical(clip, ConvertOptions("clip")),
    }
    neck, width = plans["sam"].plan.sizes["neck"], plans["clip"].plan.sizes["width"]
    opened, nets, generated = [sam] if clip is sam else [sam, clip], {}, {}
    if wanted.startswith("random:"):
        dtype = plans["sam"].plan.outputs["neck.2.weight"].dtype.name
        nets = {name: cast(value, dtype) for name, value in seeded(wanted, neck, width).items()}
        generated = {
            name: f"{wanted}: untrained, uniform within 1/sqrt({9 * net.shape[1]})" for name, net in nets.items()
        }
    elif wanted:
        opened.append(open_(wanted))
        nets = find_compressor(opened[-1])
    outputs = {**_placed(plans), **{registry.encoder_prefix("sam") + name: value for name, value in nets.items()}}
    _check_compressor(plans, outputs, wanted or sam.name)
    own = [plans["sam"].plan.outputs[name] for name in nets if name in plans["sam"].plan.outputs]
    replaced = {tensor.key: f"--compressor {wanted} gives another" for net in own for tensor in source_tensors(net)}
    return Parts(
        opened,
        plans,
        outputs,
        {registry.encoder_prefix("sam") + name: how for name, how in generated.items()},
        {**_dropped(plans, outputs), **replaced},
    )


def taken_out(opened: Checkpoint, with_projector: bool) -> Parts:
    """The encoder, and the projector if wanted, out of a checkpoint with both encoders; LayoutError for another."""
    try:
        plans = {family: resolve_to_canonical(opened, ConvertOptions(family)) for family in registry.families()}
    except LayoutError as error:
        raise LayoutError(
            f"{error}",
            "an encoder is taken out of a checkpoint with both SAM and CLIP; "
            "to put one together, give them with --sam and --clip",
        ) from None
    outputs = _placed(plans)
    _check_compressor(plans, outputs, opened.name)
    if with_projector:
        outputs |= _projector(opened, plans["sam"])
    no_family = {resolve.plan.mapping.drop_rest for resolve in plans.values()}
    drop_rest = f"not part of the DeepEncoder (language model{'' if with_projector else ', projector'})"
    dropped = {key: drop_rest if why in no_family else why for key, why in _dropped(plans, outputs).items()}
    return Parts([opened], plans, outputs, {}, dropped)


def _dropped(plans: dict[str, ResolvedPlan], outputs: dict[str, LazyTensor]) -> dict[str, str]:
    """What of the two checkpoints, which may be one, is in none of the outputs, and why."""
    used = {(tensor.storage.file, tensor.key) for value in outputs.values() for tensor in source_tensors(value)}
    dropped: dict[str, str] = {}
    for known, plan in plans.values():
        files = {tensor.key: tensor.storage.file for tensor in known.tensors.values()}
        for key, why in plan.dropped.items():
            if why != plan.mapping.drop_rest:
                dropped[key] = why
            elif (files.get(key), key) not in used:
                # The other family may know more of it.
                dropped.setdefault(key, why)
    return dropped


def _placed(plans: dict[str, ResolvedPlan]) -> dict[str, LazyTensor]:
    return {
        registry.encoder_prefix(family) + name: value
        for family in plans
        for name, value in plans[family].plan.outputs.items()
    }


def _projector(opened: Checkpoint, sam: ResolvedPlan) -> dict[str, LazyTensor]:
    """The tensors of `_PROJECTOR`; LayoutError names those that are not there."""
    base = PREFIX if sam.detected.match.prefix.startswith(PREFIX) else ""
    tensors = sam.detected.tensors
    found = {name: tensors.get(base + name) or tensors.get(base + other) for name, other in _PROJECTOR.items()}
    lacking = [base + name for name, tensor in found.items() if tensor is None]
    if lacking:
        raise LayoutError(f"{opened.name}: --with-projector: holds no {', '.join(lacking)}", "leave the option out")
    return {name: lazy_read(tensor) for name, tensor in found.items() if tensor}


def _check_compressor(plans: dict[str, ResolvedPlan], outputs: dict[str, LazyTensor], origin: str) -> None:
    prefix = registry.encoder_prefix("sam")
    nets = {name: outputs[prefix + name] for name in NETS if prefix + name in outputs}
    check_compressor(nets, plans["sam"].plan.sizes["neck"], plans["clip"].plan.sizes["width"], origin)

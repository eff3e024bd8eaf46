"""A whole encoder as it is written: under DeepSeek-OCR's names, or in the layout of another program."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from converter.assembly.mmproj import as_stored, typed
from converter.assembly.parts import EncoderParts
from converter.layouts import registry
from converter.layouts.spec import Rule
from converter.plan.plan import sort_outputs
from converter.plan.projector import LLAMA_CPP
from converter.plan.route import retarget, target_names, writing_rules
from converter.tensors.lazy_tensor import LazyTensor

# The other programs. The layouts are those of the families, such as sam-mlx; the names are those of the projector's
# tensors that differ from DeepSeek's.
LAYOUTS = {"mlx": {"view_seperator": "view_separator"}, "mmproj": LLAMA_CPP}


class Arranged(NamedTuple):
    """An encoder as it is written."""

    outputs: dict[str, LazyTensor]  # The tensors of the output
    names: dict[str, list[str]]  # The names in the output of each tensor of the encoder that is written
    rules: dict[str, Rule]  # The rules that make the outputs


def arrange(parts: EncoderParts, layout: str, prefix: str, dtype: str) -> Arranged:
    """Return an encoder as it is written.

    Args:
        parts: The encoder.
        layout: One of LAYOUTS; empty for DeepSeek-OCR's names.
        prefix: The prefix of DeepSeek-OCR's names.
        dtype: The type of floating-point outputs, or "keep".

    Raises:
        MappingError: The encoder lacks tensors of the layout.
    """
    arranged = _in_layout(parts, layout) if layout else _under_prefix(parts, prefix)
    if layout == "mmproj":
        return arranged._replace(outputs=typed(arranged.outputs, dtype))
    return arranged._replace(outputs=sort_outputs(arranged.outputs, dtype))


def _under_prefix(parts: EncoderParts, prefix: str) -> Arranged:
    names = {name: prefix + name for name in parts.tensors if name not in parts.constants}
    made = {
        registry.encoder_prefix(family) + name: rule
        for family, resolved in parts.plans.items()
        for name, rule in resolved.plan.rules.items()
    }
    return Arranged(
        {new: parts.tensors[name] for name, new in names.items()},
        {name: [new] for name, new in names.items()},
        {new: made[name] for name, new in names.items() if name in made},
    )


def _in_layout(parts: EncoderParts, layout: str) -> Arranged:
    arranged = Arranged({}, {}, {})
    for family, resolved in parts.plans.items():
        mapping, encoder = registry.load(f"{family}-{layout}").mapping, parts.encoder(family)
        plan = replace(resolved.plan, outputs=encoder)
        made = retarget(plan, mapping, None, parts.sources[0].name)
        arranged.outputs.update(made.outputs)
        arranged.rules.update(made.rules)
        targets = {name: target_names(writing_rules(mapping, False), name) for name in encoder}
        arranged.names.update(
            (registry.encoder_prefix(family) + name, new)
            for name, new in targets.items()
            if new and name in made.canonical_tensors
        )
    names = {name: LAYOUTS[layout].get(name, name) for name in parts.projector}
    shaped = as_stored(parts.projector) if layout == "mmproj" else parts.projector
    arranged.outputs.update((new, shaped[name]) for name, new in names.items())
    arranged.names.update((name, [new]) for name, new in names.items())
    return arranged

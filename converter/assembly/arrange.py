"""Arranges the tensors of a whole encoder for output, under DeepSeek-OCR's names or in another program's layout."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from converter.assembly.mmproj import as_mmproj_shapes, cast_to_mmproj
from converter.assembly.parts import EncoderParts
from converter.layouts import registry
from converter.layouts.spec import Rule
from converter.plan.plan import sort_outputs
from converter.plan.projector import LLAMA_CPP
from converter.plan.route import retarget, target_names, writing_rules
from converter.tensors.lazy_tensor import LazyTensor

# By program, the names of projector tensors that differ from DeepSeek-OCR's. The layouts of the encoders are named by
# family and program, such as sam-mlx.
LAYOUTS = {"mlx": {"view_seperator": "view_separator"}, "mmproj": LLAMA_CPP}


class Arranged(NamedTuple):
    """The tensors and names of an encoder in its output."""

    outputs: dict[str, LazyTensor]  # The tensors of the output
    names: dict[str, list[str]]  # The names in the output by the name of the encoder's tensor
    rules: dict[str, Rule]  # The rules that produce the outputs, by their names


def arrange(parts: EncoderParts, layout: str, prefix: str, dtype: str) -> Arranged:
    """Return the tensors and names of an encoder in its output.

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
        return arranged._replace(outputs=cast_to_mmproj(arranged.outputs, dtype))
    return arranged._replace(outputs=sort_outputs(arranged.outputs, dtype))


def _under_prefix(parts: EncoderParts, prefix: str) -> Arranged:
    names = {name: prefix + name for name in parts.tensors if name not in parts.constants}
    rules = {
        registry.encoder_prefix(family) + name: rule
        for family, resolved in parts.plans.items()
        for name, rule in resolved.plan.rules.items()
    }
    return Arranged(
        {new_name: parts.tensors[name] for name, new_name in names.items()},
        {name: [new_name] for name, new_name in names.items()},
        {new_name: rules[name] for name, new_name in names.items() if name in rules},
    )


def _in_layout(parts: EncoderParts, layout: str) -> Arranged:
    arranged = Arranged({}, {}, {})
    for family, resolved in parts.plans.items():
        mapping, encoder = registry.load(f"{family}-{layout}").mapping, parts.encoder(family)
        plan = retarget(replace(resolved.plan, outputs=encoder), mapping, None, parts.sources[0].name)
        arranged.outputs.update(plan.outputs)
        arranged.rules.update(plan.rules)
        rules, converted = writing_rules(mapping, False), [name for name in encoder if name in plan.canonical_tensors]
        new_names = {name: target_names(rules, name) for name in converted}
        prefix = registry.encoder_prefix(family)
        arranged.names.update((prefix + name, targets) for name, targets in new_names.items() if targets)
    names = {name: LAYOUTS[layout].get(name, name) for name in parts.projector}
    projector = as_mmproj_shapes(parts.projector) if layout == "mmproj" else parts.projector
    arranged.outputs.update((new_name, projector[name]) for name, new_name in names.items())
    arranged.names.update((name, [new_name]) for name, new_name in names.items())
    return arranged

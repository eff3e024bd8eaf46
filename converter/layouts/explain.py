"""Explanations of checkpoints that no layout of a family fits."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from converter.checkpoint.adapter import factor_names, is_wrapped
from converter.checkpoint.adapter_config import CONFIG_NAME, base_model_of, read_adapter_config
from converter.checkpoint.file_kinds import by_product_step
from converter.checkpoint.open import Checkpoint
from converter.checkpoint.state_dict import StateDict, unwrapped_names
from converter.errors import LayoutError, OtherFamilyError, SourceError, printable
from converter.layouts import registry
from converter.layouts.claims import MAX_SHOWN, claim
from converter.layouts.marks import Mark, find_architecture, find_mark
from converter.layouts.match import LayoutMatch, find_prefixes, likely_prefixes, match_layouts, without_language_models
from converter.layouts.shapes import Sizes, format_shape, match_shape
from converter.layouts.spec import LayoutMapping, LayoutSpec
from converter.layouts.template import any_match
from converter.tensors.tensor_info import TensorInfo

Tensors = Mapping[str, TensorInfo]

# The search for the nearest layout tries all rules, so it is skipped for more tensors. OCR models have 3,000.
_MAX_TENSORS_COMPARED = 10_000
# Prefixes that are tried for each layout.
_MAX_PREFIXES = 8
# Of names and rules that must fit, for a layout without a tensor of its `detect`: fewer fit by chance.
_MIN_SHARE = 0.1
# Of a message: names of one kind, and lines.
_MAX_ITEMS = 3
_MAX_LINES = 9


def no_layout_error(
    source: Checkpoint, family: str, layouts: Sequence[LayoutSpec], candidates: list[StateDict]
) -> LayoutError:
    """Return the error for a checkpoint that no layout of a family fits.

    It says what the tensors are if that shows, or which other encoder is there, or the differences from the nearest
    layout.

    Args:
        source: The checkpoint.
        family: The family.
        layouts: The layouts that were tried.
        candidates: The state dicts of the checkpoint.
    """
    largest = max(candidates, key=lambda entry: len(entry.tensors))
    what = f"{source.name}: no {family.upper()} layout fits its {len(largest.tensors)} tensors"
    if step := source.whole_step or by_product_step(source.name):
        return LayoutError(what, step)
    tensors = unwrapped_names(largest.tensors, source.name)
    if language_models := match_layouts(tensors, layouts):
        prefix = language_models[0].full_prefix or "."
        return LayoutError(
            f"{source.name}: its {family.upper()} ({prefix}) is the language model next to a vision encoder",
            f"to convert the language model all the same, add --prefix {prefix}",
        )
    others = _other_encoders(tensors, family)
    found = {name: tensor for name, tensor in tensors.items() if any(_covers(match, name) for match in others)}
    rest = {name: tensor for name, tensor in tensors.items() if name not in found}
    is_absent = bool(others) and not any(likely_prefixes(rest, layout) for layout in layouts)
    # Adapters and quantised weights of a language model are no reason where the family is absent.
    is_mlx = any(match.layout.is_channels_last for match in others)
    if is_absent:
        mark = find_architecture(tensors) or find_mark(found, is_mlx)
    else:
        mark = find_source_mark(source, tensors, family, is_mlx)
    if mark:
        return mark.error(source.name)
    if is_absent:
        other = others[0].layout.family
        return OtherFamilyError(
            f"{source.name}: is a {other.upper()} checkpoint, not {family.upper()}", f"run: dsocr-convert {other} ..."
        )
    lines = [what]
    lines += [f"it holds {match.layout.family.upper()} ({match.full_prefix or 'no prefix'})" for match in others]
    near = _nearest(rest, [spec.mapping for spec in layouts if not spec.is_canonical])
    return LayoutError("\n".join([*lines, *_describe(near, rest)]), _next_step(near, rest))


def find_source_mark(source: Checkpoint, tensors: Tensors, family: str, is_channels_last: bool = False) -> Mark | None:
    """Return what tensors show that no layout describes, or None.

    Args:
        source: The checkpoint.
        tensors: Its tensors, or those of one encoder.
        family: The family, for the next step.
        is_channels_last: Whether the layout stores convolutions channels last.
    """
    factors = factor_names(tensors)
    base = base_model_of(source) if factors else None
    merge = f"dsocr-convert {family} {{}} --lora {printable(source.name)}"
    if factors and is_wrapped(tensors):
        what = "holds LoRA adapters that are not merged, and the model that they belong to"
        config = "" if base is not None else f", after putting the training's {CONFIG_NAME} next to it"
        return Mark(what, f"merge them: {merge.format(printable(source.name))}{config}", factors)
    if base is not None:
        try:
            read_adapter_config(source)
        except SourceError as error:
            return Mark(error.message.removeprefix(f"{source.name}: "), error.hint, factors)
    if base is not None or (factors and len(factors) == len(tensors)):
        what = f"is a LoRA adapter{f' of {base}' if base else ''}, without the weights of its model"
        return Mark(what, f"merge it into them: {merge.format(shlex.quote(base) if base else 'MODEL')}", factors)
    return find_mark(tensors, is_channels_last)


def nearest_layout(source: Checkpoint, state_dict: StateDict, mappings: list[LayoutMapping]) -> list[str]:
    """Describe what a state dict is, or the differences from the mapping that is closest to it.

    Args:
        source: The checkpoint, for error messages.
        state_dict: The state dict that fits no layout.
        mappings: The mappings to compare it with.

    Returns:
        Lines of text.
    """
    tensors = unwrapped_names(state_dict.tensors, source.name)
    if mark := find_source_mark(source, tensors, "|".join(registry.families())):
        return [mark.text, *mark.hint.split("\n")]
    return _describe(_nearest(tensors, mappings), tensors)


def _other_encoders(tensors: Tensors, family: str) -> list[LayoutMatch]:
    families = [registry.layouts(other) for other in registry.families() if other != family]
    return without_language_models(
        (match for layouts in families for match in match_layouts(tensors, layouts)), tensors
    )


def _covers(match: LayoutMatch, name: str) -> bool:
    """Whether a name belongs to an encoder that was found."""
    if match.full_prefix:
        return name.startswith(match.full_prefix)
    return any_match(match.layout.templates(""), name)


class _Nearest(NamedTuple):
    """A mapping that is close to tensors that fit none: names without a rule, rules without a name."""

    mapping: LayoutMapping
    prefix: str
    unclaimed: list[str]
    unmatched: list[str]
    known: float  # The share of the tensors of `detect` that are there
    share: float  # The share of names with a rule, times that of rules with a name


def _nearest(tensors: Tensors, candidates: list[LayoutMapping]) -> _Nearest | None:
    """Return the mapping whose `detect` and rules cover most, under one of its own prefixes if possible, or None."""
    if len(tensors) > _MAX_TENSORS_COMPARED:
        return None
    compared = []
    for mapping in candidates:
        found = (prefix for key in mapping.detect for prefix in find_prefixes(tensors, key))
        for prefix in dict.fromkeys(("", *mapping.prefixes, *islice(found, _MAX_PREFIXES))):
            compared.append(_compare(tensors, mapping, prefix))
    near = [each for each in compared if each.known or each.share > _MIN_SHARE]
    return max(near, key=lambda each: (each.known, each.prefix in each.mapping.prefixes, each.share), default=None)


def _compare(tensors: Tensors, mapping: LayoutMapping, prefix: str) -> _Nearest:
    inside = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
    claims = claim(mapping.rules, inside)
    num_used_rules = len({index for index, _ in claims.groups})
    # Both shares count: a mapping with a few general rules claims much by chance.
    share = (1 - len(claims.unclaimed) / max(len(inside), 1)) * num_used_rules / len(mapping.rules)
    # Each shape must fit by itself.
    shapes = [(shape, tensors.get(prefix + key)) for key, shape in mapping.detect.items()]
    known = sum(tensor is not None and match_shape(shape, tensor.shape, {}) for shape, tensor in shapes) / len(shapes)
    return _Nearest(mapping, prefix, claims.unclaimed, [rule.text for rule in claims.unmatched], known, share)


def _describe(near: _Nearest | None, tensors: Tensors) -> list[str]:
    """Describe the differences from the nearest layout; about a dozen lines at most."""
    if near is None:
        return [f"first names: {', '.join(map(repr, sorted(tensors)[:MAX_SHOWN]))}"]
    lines = [f"nearest is {near.mapping.name}{f' (prefix {near.prefix})' if near.prefix else ''}:"]
    lines += [f"  the checkpoint has no tensor for {text}" for text in _first(near.unmatched)]
    lines += [f"  {near.mapping.name} has no rule for {name}" for name in _first([*map(repr, near.unclaimed)])]
    absent = [] if near.unmatched else _absent(near, tensors)
    lines += [f"  the checkpoint has no tensor {name}" for name in _first([*map(repr, absent)])]
    sizes: Sizes = {}
    for key, shape in near.mapping.detect.items():
        tensor = tensors.get(near.prefix + key)
        if tensor and not match_shape(shape, tensor.shape, sizes):
            lines.append(f"  {near.prefix + key!r} has shape {list(tensor.shape)}; expected {format_shape(shape)}")
    return lines[:_MAX_LINES]


def _absent(near: _Nearest, tensors: Tensors) -> list[str]:
    """The names of a mapping's `detect` that are not there, such as those of matrices that were wrapped."""
    return [near.prefix + key for key in near.mapping.detect if near.prefix + key not in tensors]


def _first(items: list[str]) -> list[str]:
    """The first items, the last of them with the number of others."""
    more = f", and {len(items) - _MAX_ITEMS} more" if len(items) > _MAX_ITEMS else ""
    return [*items[: _MAX_ITEMS - 1], items[_MAX_ITEMS - 1] + more] if len(items) >= _MAX_ITEMS else items


def _next_step(near: _Nearest | None, tensors: Tensors) -> str:
    if near is not None and near.unmatched and not near.unclaimed:
        return "the encoder is not whole: convert a checkpoint that has these tensors"
    if near is not None and not (near.unmatched or near.unclaimed or _absent(near, tensors)):
        return (
            "the DeepEncoder cannot have these shapes, as of a pruned model, or of one rank's part of each tensor: "
            "convert the checkpoint that it was made from, or join the parts"
        )
    mapping = "write a mapping for it and give it with --mapping (`dsocr-convert mapping show` prints examples)"
    return mapping if near is not None else f"if a vision encoder of SAM or CLIP is among them: {mapping}"

"""Explains why no layout of a family fits a checkpoint."""

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

# The search for the nearest layout tries all rules, so it is skipped for larger models. OCR models have 3,000 tensors.
_MAX_TENSORS_COMPARED = 10_000
# Prefixes that are tried for each layout.
_MAX_PREFIXES = 8
# The smallest `rule_share` of a nearest layout if no tensor of its `detect` is there: less is a coincidence.
_MIN_RULE_SHARE = 0.1
_MAX_NAMES = 3  # that a line of a message lists
_MAX_LINES = 9


def no_layout_error(
    source: Checkpoint, family: str, layouts: Sequence[LayoutSpec], candidates: list[StateDict]
) -> LayoutError:
    """Return the error for a checkpoint that no layout of a family fits.

    The error says what the tensors are, names another family's encoder, or lists differences from the nearest layout.

    Args:
        source: The checkpoint.
        family: The family.
        layouts: The layouts that were tried.
        candidates: The state dicts of the checkpoint.
    """
    largest = max(candidates, key=lambda entry: len(entry.tensors))
    what = f"{source.name}: no {family.upper()} layout fits its {len(largest.tensors)} tensors"
    if step := source.all_shards_step or by_product_step(source.name):
        return LayoutError(what, step)
    tensors = unwrapped_names(largest.tensors, source.name)
    if language_models := match_layouts(tensors, layouts):
        prefix = language_models[0].full_prefix or "."
        return LayoutError(
            f"{source.name}: its {family.upper()} ({prefix}) is the language model next to a vision encoder",
            f"to convert the language model all the same, add --prefix {prefix}",
        )
    others = _other_encoders(tensors, family)
    covered = {name: tensor for name, tensor in tensors.items() if any(_covers(match, name) for match in others)}
    rest = {name: tensor for name, tensor in tensors.items() if name not in covered}
    is_absent = bool(others) and not any(likely_prefixes(rest, layout) for layout in layouts)
    # If the family is absent, adapters and quantised weights outside the other encoders are not the reason.
    is_mlx = any(match.layout.is_channels_last for match in others)
    if is_absent:
        mark = find_architecture(tensors) or find_mark(covered, is_mlx)
    else:
        mark = find_source_mark(source, tensors, family, is_mlx)
    if mark:
        return mark.error(source.name)
    if is_absent:
        other_family = others[0].layout.family
        return OtherFamilyError(
            f"{source.name}: is a {other_family.upper()} checkpoint, not {family.upper()}",
            f"run: dsocr-convert {other_family} ...",
        )
    lines = [what]
    lines += [f"it holds {match.layout.family.upper()} ({match.full_prefix or 'no prefix'})" for match in others]
    nearest = _find_nearest(rest, [spec.mapping for spec in layouts if not spec.is_canonical])
    return LayoutError("\n".join([*lines, *_describe(nearest, rest)]), _next_step(nearest, rest))


def find_source_mark(source: Checkpoint, tensors: Tensors, family: str, is_channels_last: bool = False) -> Mark | None:
    """Return a mark that shows why no layout describes the tensors, such as an adapter's factors, or None.

    Args:
        source: The checkpoint.
        tensors: The tensors of the checkpoint, or of one encoder in it.
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
    return _describe(_find_nearest(tensors, mappings), tensors)


def _other_encoders(tensors: Tensors, family: str) -> list[LayoutMatch]:
    families = [registry.layouts(other) for other in registry.families() if other != family]
    return without_language_models(
        (match for layouts in families for match in match_layouts(tensors, layouts)), tensors
    )


def _covers(match: LayoutMatch, name: str) -> bool:
    """Return whether a name belongs to the encoder of a match."""
    if match.full_prefix:
        return name.startswith(match.full_prefix)
    return any_match(match.layout.templates(""), name)


class _Nearest(NamedTuple):
    """The differences between tensors that fit no layout and a mapping under a prefix."""

    mapping: LayoutMapping
    prefix: str
    unclaimed: list[str]  # The names without a rule
    unmatched: list[str]  # The rules without a name
    detect_share: float  # The share of the tensors of `detect` that are there
    rule_share: float  # The share of names that have a rule, times the share of rules that match a name

    def rank(self) -> tuple[float, bool, float]:
        return self.detect_share, self.prefix in self.mapping.prefixes, self.rule_share


def _find_nearest(tensors: Tensors, candidates: list[LayoutMapping]) -> _Nearest | None:
    """Return the mapping whose `detect` and rules cover most, if possible under a prefix that it lists, or None."""
    if len(tensors) > _MAX_TENSORS_COMPARED:
        return None
    compared = []
    for mapping in candidates:
        prefixes = (prefix for key in mapping.detect for prefix in find_prefixes(tensors, key))
        for prefix in dict.fromkeys(("", *mapping.prefixes, *islice(prefixes, _MAX_PREFIXES))):
            compared.append(_compare(tensors, mapping, prefix))
    near = [item for item in compared if item.detect_share or item.rule_share > _MIN_RULE_SHARE]
    return max(near, key=_Nearest.rank, default=None)


def _compare(tensors: Tensors, mapping: LayoutMapping, prefix: str) -> _Nearest:
    inside = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
    claims = claim(mapping.rules, inside)
    num_used_rules = len({index for index, _ in claims.groups})
    # A product: a mapping with a few general rules has rules for many names by chance.
    rule_share = (1 - len(claims.unclaimed) / max(len(inside), 1)) * num_used_rules / len(mapping.rules)
    # New sizes for each shape: the shapes need not agree with each other.
    shapes = [(shape, tensors.get(prefix + key)) for key, shape in mapping.detect.items()]
    num_known = sum(tensor is not None and match_shape(shape, tensor.shape, {}) for shape, tensor in shapes)
    unmatched = [rule.text for rule in claims.unmatched]
    return _Nearest(mapping, prefix, claims.unclaimed, unmatched, num_known / len(shapes), rule_share)


def _describe(nearest: _Nearest | None, tensors: Tensors) -> list[str]:
    """Describe the differences from the nearest layout in at most _MAX_LINES lines."""
    if nearest is None:
        return [f"first names: {', '.join(map(repr, sorted(tensors)[:MAX_SHOWN]))}"]
    layout, prefix = nearest.mapping.name, nearest.prefix
    lines = [f"nearest is {layout}{f' (prefix {prefix})' if prefix else ''}:"]
    lines += [f"  the checkpoint has no tensor for {text}" for text in _shortened(nearest.unmatched)]
    lines += [f"  {layout} has no rule for {name}" for name in _shortened([*map(repr, nearest.unclaimed)])]
    absent = [] if nearest.unmatched else _absent(nearest, tensors)
    lines += [f"  the checkpoint has no tensor {name}" for name in _shortened([*map(repr, absent)])]
    sizes: Sizes = {}
    for key, shape in nearest.mapping.detect.items():
        tensor = tensors.get(prefix + key)
        if tensor and not match_shape(shape, tensor.shape, sizes):
            lines.append(f"  {prefix + key!r} has shape {list(tensor.shape)}; expected {format_shape(shape)}")
    return lines[:_MAX_LINES]


def _absent(nearest: _Nearest, tensors: Tensors) -> list[str]:
    """Return the names of a mapping's `detect` that the tensors lack, such as names of matrices that were wrapped."""
    return [nearest.prefix + key for key in nearest.mapping.detect if nearest.prefix + key not in tensors]


def _shortened(names: list[str]) -> list[str]:
    """Return at most _MAX_NAMES names; the last one ends with the number of names that are left out."""
    num_more = len(names) - _MAX_NAMES
    return [*names[: _MAX_NAMES - 1], f"{names[_MAX_NAMES - 1]}, and {num_more} more"] if num_more > 0 else names


def _next_step(nearest: _Nearest | None, tensors: Tensors) -> str:
    if nearest is not None and nearest.unmatched and not nearest.unclaimed:
        return "the encoder is not whole: convert a checkpoint that has these tensors"
    if nearest is not None and not (nearest.unmatched or nearest.unclaimed or _absent(nearest, tensors)):
        return (
            "the DeepEncoder cannot have these shapes, as of a pruned model, or of one rank's part of each tensor: "
            "convert the checkpoint that it was made from, or join the parts"
        )
    mapping = "write a mapping for it and give it with --mapping (`dsocr-convert mapping show` prints examples)"
    return mapping if nearest is not None else f"if a vision encoder of SAM or CLIP is among them: {mapping}"

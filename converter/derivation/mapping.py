"""Builds the mapping file for a list of matches, and checks that it converts the source as matched."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePath
from textwrap import wrap
from typing import Any

import yaml

from converter.derivation.comparison import Comparison, TensorMatch
from converter.derivation.rules import DerivedRule, Variables, common_start, generalise, words_variable
from converter.errors import LayoutError, MappingError
from converter.layouts.claims import summary
from converter.layouts.match import match_layouts
from converter.layouts.parse import parse_mapping
from converter.layouts.shapes import Dim, Shape, Sizes, match_shape
from converter.plan.plan import make_plan
from converter.tensors.lazy_tensor import source_tensors
from converter.tensors.ops import Deinterleave, Fuse, Op, Permute, Reorder, Reshape, Split, Squeeze, Unsqueeze


@dataclass(frozen=True, slots=True)
class Derived:
    """A derived mapping file.

    Attributes:
        layout: The name of the new layout.
        family: The encoder.
        source: The checkpoint in the new layout.
        target: The checkpoint or the layout that it was compared with.
        method: How tensors were matched: "values", or "names and shapes".
        num_matched: The number of matched tensors of the target.
        unmatched: The names of the other tensors of the target.
        dropped: The names of the source tensors that are not used.
        num_rules: The number of rules.
        text: The text of the mapping file.
        output: The path of the mapping file.
        written: Whether the mapping file was written.
    """

    layout: str
    family: str
    source: str
    target: str
    method: str
    num_matched: int
    unmatched: list[str]
    dropped: list[str]
    num_rules: int
    text: str
    output: str = ""
    written: bool = False

    @property
    def complete(self) -> bool:
        """Whether all tensors of the target were matched."""
        return not self.unmatched

    def to_json(self) -> dict[str, Any]:
        """Return the result as one JSON document."""
        return {"schema": 1, "kind": "derived", **asdict(self)}


def build_mapping(comparison: Comparison, matches: list[TensorMatch]) -> Derived:
    """Return the mapping file for some matches. If they cover the target, the file is checked against them.

    Raises:
        LayoutError: There is no match, or matched modules contain unmatched tensors.
        MappingError: Rules cannot express the names.
    """
    if not matches:
        hint = "SOURCE needs the names of a known layout; or give a checkpoint with the same weights as TARGET"
        if comparison.expected:
            hint = "the two must have the same weights in one element type"
        raise LayoutError(f"{comparison.source}: nothing matches {comparison.target}", hint)
    missing = comparison.missing(matches)
    used = {name for match in matches for name in match.sources}
    unused = [name for name in comparison.tensors if name not in used]
    spec = comparison.canonical.spec
    encoder_names = [name for match in matches if any(map(spec, match.targets)) for name in match.sources]
    segments = common_start([name.split(".")[:-1] for name in encoder_names])
    prefix = "".join(f"{segment}." for segment in segments)
    leftovers = _leftovers(comparison, encoder_names, unused, prefix)
    if leftovers and not missing:
        raise LayoutError(
            f"{comparison.source}: {len(leftovers)} tensors inside the matched modules have no counterpart in "
            f"{comparison.target}:\n{summary([f'  {name!r}' for name in leftovers])}",
            "merge adapters such as LoRA into the weights first; remove what the model does not need",
        )
    fields = _fields(comparison, matches, prefix, leftovers)
    method = "values" if comparison.expected else "names and shapes"
    text = _yaml_text(fields, comparison, method)
    if not missing:
        _check(comparison, matches, text)
    return Derived(
        layout=comparison.layout,
        family=comparison.canonical.family,
        source=comparison.source,
        target=comparison.target,
        method=method,
        num_matched=sum(len(match.targets) for match in matches),
        unmatched=missing,
        dropped=unused,
        num_rules=len(fields["rules"]) + len(fields.get("other_rules", ())),
        text=text,
    )


def _leftovers(comparison: Comparison, encoder_names: list[str], unused: list[str], prefix: str) -> list[str]:
    """Return the unused names inside modules of the encoder, such as LoRA factors and adapters.

    A module is the first segment after the encoder's prefix. Tensors with the type and shape of a tensor that the
    encoder generates, such as the position indices of a second encoder, are left out.
    """
    tails = [name.removeprefix(prefix) for name in encoder_names]
    modules = tuple({f"{prefix}{tail.partition('.')[0]}." for tail in tails if "." in tail})
    generated = {(value.dtype, value.shape) for value in comparison.generated.values()}
    inside = [(name, comparison.tensors[name]) for name in unused if name.startswith(modules)]
    return [name for name, value in inside if (value.dtype, value.shape) not in generated]


def _fields(comparison: Comparison, matches: list[TensorMatch], prefix: str, leftovers: list[str]) -> dict[str, Any]:
    """Return the content of a mapping file. Leftovers are neither converted nor dropped."""
    variables: Variables = {"rest": "path"}
    derived = [_rule(comparison, match, variables, prefix) for match in matches]
    rules_inside = [rule for rule in derived if all(name.startswith(prefix) for name in rule.source_names)]
    rules_outside = [rule for rule in derived if rule not in rules_inside]
    names = [name for name in comparison.tensors if name not in leftovers]
    names_inside = [name for name in names if name.startswith(prefix)]
    names_outside = [name for name in names if not name.startswith(prefix)]
    compared = "these values" if comparison.expected else "this name"
    reason = f"no tensor of {PurePath(comparison.target).name} has {compared}"
    rules = _items(rules_inside, names_inside, prefix, reason, variables)
    other_rules = _items(rules_outside, names_outside, "", reason, variables) if rules_outside else []
    used_variables = set(re.findall(r"\{([a-z_0-9]+)", str([*rules, *other_rules])))
    int_first = sorted(variables.items(), key=lambda item: item[1] != "int")
    kinds = {name: kind if isinstance(kind, str) else list(kind) for name, kind in int_first if name in used_variables}
    family = comparison.canonical.family
    fields = {
        "layout": comparison.layout,
        "family": family,
        "description": f"the layout of {PurePath(comparison.source).name}"[:100],
        "variables": kinds,
        "prefix": prefix,
        "detect": _detect(comparison, matches, prefix),
        "rules": rules,
        "other_rules": other_rules,
        "drop_rest": f"not part of {family.upper()}" if names_outside and not rules_outside else "",
    }
    # A mapping file has no keys without a value.
    return {key: value for key, value in fields.items() if value}


def _rule(comparison: Comparison, match: TensorMatch, variables: Variables, prefix: str) -> DerivedRule:
    """Return the rule for one match. Its only variable is the one for the parts of a `fuse` or `split`."""
    action = "rename"
    if len(match.sources) > 1 or len(match.targets) > 1:
        action = "fuse" if len(match.sources) > 1 else "split"
    source, source_parts = _list_parts(match.sources, variables)
    target, target_parts = _list_parts(match.targets, variables)
    # Other checkpoints in this layout may lack the tensors that the encoder does not require.
    if spec := comparison.canonical.spec(match.targets[0]):
        optional: bool | str = bool(spec.generate)
    else:
        optional = "on_read" if source.startswith(prefix) else True
    options = {
        "parts": source_parts or target_parts,
        "dim": next((op.dim for op in match.ops if isinstance(op, Fuse | Split)), 0),
        "then": [_operation(op) for op in match.ops if not isinstance(op, Fuse | Split)],
        "optional": optional,
    }
    # Empty values are the defaults of a rule.
    options = {key: value for key, value in options.items() if value}
    return DerivedRule(action, source, target, frozenset(match.sources), frozenset(match.targets), options)


def _list_parts(names: tuple[str, ...], variables: Variables) -> tuple[str, dict[str, list[str]]]:
    """Return a template for names that differ in one word, and their words by its variable.

    A single name is a template without a variable.
    """
    if len(names) == 1:
        return names[0], {}
    # Alternating words and separators, such as "attn", ".", "q", "_", "proj". At least one token is left to differ.
    rows = [re.split("([^a-zA-Z0-9]+)", name) for name in names]
    num_start = len(common_start([row[:-1] for row in rows]))
    num_end = len(common_start([list(reversed(row[num_start + 1 :])) for row in rows]))
    words = tuple("".join(row[num_start : len(row) - num_end]) for row in rows)
    if any("." in word or not word for word in words) or len(set(words)) < len(words):
        raise MappingError(f"no rule can list names that differ in several words: {', '.join(names)}")
    variable, tokens = words_variable(words, variables), rows[0]
    template = "".join([*tokens[:num_start], f"{{{variable}}}", *tokens[len(tokens) - num_end :]])
    return template, {variable: list(words)}


def _operation(op: Op) -> dict[str, Any]:
    """Return an operation as an item of `then`."""
    match op:
        case Squeeze(dims):
            return {"squeeze": list(dims)}
        case Unsqueeze(dims):
            return {"unsqueeze": list(dims)}
        case Permute(dims):
            return {"permute": list(dims)}
        case Reorder(order):
            return {"reorder": list(order)}
        case Reshape(before, after):
            return {"reshape": {"from": list(before), "to": list(after)}}
        case Deinterleave(num_heads, num_parts):
            return {"deinterleave": {"heads": num_heads, "parts": num_parts}}
        case Fuse() | Split():
            raise ValueError(f"{op} is not an operation of `then`")


def _items(
    rules: list[DerivedRule], names: list[str], prefix: str, reason: str, variables: Variables
) -> list[dict[str, Any]]:
    """Return the items of a list of rules for names with a prefix: the merged rules, and a drop of all other names."""
    used = {name.removeprefix(prefix) for rule in rules for name in rule.source_names}
    all_names = [name.removeprefix(prefix) for name in names]
    unused = [name for name in all_names if name not in used]
    items = [rule.item(prefix) for rule in generalise(rules, names, variables)]
    if unused:
        items.append({"drop": _drop_templates(unused, used), "because": reason, "optional": True})
    return items


def _drop_templates(names: list[str], used: set[str]) -> list[str]:
    """Return templates for names to drop: the largest modules that have no used name, else the names themselves."""
    used_modules = {module for name in used for module in _modules(name)}
    templates: list[str] = []
    for name in names:
        unused_modules = [module for module in _modules(name) if module not in used_modules]
        templates.append(f"{unused_modules[0]}{{rest}}" if unused_modules else name)
    return list(dict.fromkeys(templates))


def _modules(name: str) -> list[str]:
    """Return the modules that contain a tensor, outermost first, such as `blocks.` and `blocks.0.`."""
    return [name[: dot.end()] for dot in re.finditer(r"\.", name)]


def _check(comparison: Comparison, matches: list[TensorMatch], text: str) -> None:
    """Raise LayoutError or MappingError unless a plan for the source by the mapping file gives exactly the matches."""
    mapping = parse_mapping(text, "the derived mapping").mapping
    tensors = {name: tensor for name, value in comparison.tensors.items() for tensor in source_tensors(value)}
    layout_matches = match_layouts(tensors, [mapping])
    if not layout_matches:
        raise LayoutError(f"{comparison.source}: the derived mapping does not detect it: this is a bug")
    plan = make_plan(mapping, layout_matches[0].prefix, comparison.canonical, comparison.tensors, comparison.source)
    planned = {**plan.outputs, **plan.extra_tensors}
    for match in matches:
        # The search has compared these lazy tensors with the target, so equal ones are not read again.
        for name, value in match.outputs(comparison.tensors).items():
            if planned.get(name) != value:
                raise MappingError(f"{comparison.source}: the derived rules do not give {name!r}: this is a bug")


def _yaml_text(fields: Mapping[str, Any], comparison: Comparison, method: str) -> str:
    """Return the text of a mapping file: a comment on its origin, then the fields in order."""
    source, target = PurePath(comparison.source).name, PurePath(comparison.target).name
    comment = f"Derived by `dsocr-convert mapping derive` from {source} and {target}, by comparing {method}."
    # A file name may contain bytes that are not UTF-8.
    lines = wrap(comment.encode(errors="backslashreplace").decode(), 118)
    text = yaml.safe_dump(dict(fields), sort_keys=False, default_flow_style=None, width=120)
    # Each of these top-level keys starts a section, with a blank line before it.
    text = re.sub("^(?=(?:variables|prefix|detect|rules|other_rules|drop_rest):)", "\n", text, flags=re.MULTILINE)
    return "".join(f"# {line}\n" for line in lines) + text


def _detect(comparison: Comparison, matches: list[TensorMatch], prefix: str) -> dict[str, list[int | str]]:
    """Return the `detect` of the mapping file: names and shapes of source tensors.

    They are the sources of the tensors in `detect` of the canonical layout, or the first source if there are none.
    """
    canonical, tensors, sizes = comparison.canonical, comparison.tensors, Sizes()
    canonical_shapes: dict[str, Shape] = {}
    for match in matches:
        for target, value in match.outputs(tensors).items():
            spec = canonical.spec(target)
            if spec and match_shape(spec.shape, value.shape, sizes) and target in canonical.detect:
                canonical_shapes[match.sources[0]] = spec.shape
    if not canonical_shapes:
        canonical_shapes[matches[0].sources[0]] = ()
    return {
        name.removeprefix(prefix): [_dim(size, shape, sizes) for size in tensors[name].shape]
        for name, shape in canonical_shapes.items()
    }


def _dim(size: int, shape: Shape, sizes: Sizes) -> int | str:
    """Return a dimension as one to three times (q, k, v) a size of the canonical shape, or as a number."""
    names = [dim.name for dim in shape if dim.name in sizes]
    multiples = [Dim(size // sizes[name], name) for name in names if name and size % sizes[name] == 0]
    smallest = min(multiples, default=None)
    return str(smallest) if smallest and smallest.factor <= 3 else size

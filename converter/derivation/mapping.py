"""Builds the mapping file for a list of matches, and checks that it converts the source as matched."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any

from converter.derivation.comparison import Comparison, TensorMatch, encoder_prefix, find_leftovers, find_missing
from converter.derivation.rules import DerivedRule, Variables, generalise, list_parts
from converter.derivation.write import drop_templates, rule_item, used_variables, yaml_text
from converter.errors import LayoutError, MappingError
from converter.layouts.claims import summary
from converter.layouts.match import match_layouts
from converter.layouts.parse import parse_mapping
from converter.layouts.shapes import Dim, Shape, Sizes, match_shape
from converter.layouts.spec import CanonicalLayout
from converter.plan.plan import make_plan
from converter.tensors.lazy_tensor import source_tensors


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
        LayoutError: There is no match, or tensors are left over inside matched modules.
        MappingError: Rules cannot express the names.
    """
    if not matches:
        hint = "same weights in one element type" if comparison.expected else "names of a known layout"
        raise LayoutError(f"{comparison.source}: nothing matches {comparison.target}", f"needed are the {hint}")
    prefix = encoder_prefix(matches, comparison.canonical)
    missing, leftovers = find_missing(comparison, matches), find_leftovers(comparison, matches)
    if leftovers and not missing:
        raise LayoutError(
            f"{comparison.source}: {len(leftovers)} tensors inside the matched modules have no counterpart in "
            f"{comparison.target}:\n{summary([f'  {name!r}' for name in leftovers])}",
            "merge adapters such as LoRA into the weights first; remove what the model does not need",
        )
    method = "values" if comparison.expected else "names and shapes"
    source, target = PurePath(comparison.source).name, PurePath(comparison.target).name
    header = f"Derived by `dsocr-convert mapping derive` from {source} and {target}, by comparing {method}."
    fields = _fields(comparison, matches, prefix, leftovers)
    text = yaml_text(header, fields)
    if not missing:
        _check(comparison, matches, text)
    used = {name for match in matches for name in match.sources}
    return Derived(
        layout=comparison.layout,
        family=comparison.canonical.family,
        source=comparison.source,
        target=comparison.target,
        method=method,
        num_matched=sum(len(match.targets) for match in matches),
        unmatched=missing,
        dropped=[name for name in comparison.tensors if name not in used],
        num_rules=len(fields["rules"]) + len(fields.get("other_rules", ())),
        text=text,
    )


def _fields(comparison: Comparison, matches: list[TensorMatch], prefix: str, leftovers: list[str]) -> dict[str, Any]:
    """Return the content of a mapping file. Leftovers are neither converted nor dropped."""
    variables: Variables = {"rest": "path"}
    derived = [_rule(match, comparison.canonical, variables, prefix) for match in matches]
    inside = [rule for rule in derived if all(name.startswith(prefix) for name in rule.source_names)]
    outside = [rule for rule in derived if rule not in inside]
    names = [name for name in comparison.tensors if name not in leftovers]
    others = [name for name in names if not name.startswith(prefix)]
    compared = "these values" if comparison.expected else "this name"
    reason = f"no tensor of {PurePath(comparison.target).name} has {compared}"
    rules = _items(inside, [name for name in names if name.startswith(prefix)], prefix, reason, variables)
    other_rules = _items(outside, others, "", reason, variables) if outside else []
    family = comparison.canonical.family
    fields = {
        "layout": comparison.layout,
        "family": family,
        "description": f"the layout of {PurePath(comparison.source).name}"[:100],
        "variables": used_variables([*rules, *other_rules], variables),
        "prefix": prefix,
        "detect": _detect(comparison, matches, prefix),
        "rules": rules,
        "other_rules": other_rules,
        "drop_rest": f"not part of {family.upper()}" if others and not outside else "",
    }
    return {key: value for key, value in fields.items() if value}


def _items(
    rules: list[DerivedRule], names: list[str], prefix: str, reason: str, variables: Variables
) -> list[dict[str, Any]]:
    """Return the items of a list of rules for names with a prefix: the merged rules, and a drop of all other names."""
    used = {name.removeprefix(prefix) for rule in rules for name in rule.source_names}
    unused = [tail for name in names if (tail := name.removeprefix(prefix)) not in used]
    items = [rule_item(rule, prefix) for rule in generalise(rules, names, variables)]
    dropped = {"drop": drop_templates(unused, used), "because": reason, "optional": True}
    return [*items, dropped] if unused else items


def _check(comparison: Comparison, matches: list[TensorMatch], text: str) -> None:
    """Raise LayoutError or MappingError unless a plan for the source by the mapping file gives exactly the matches."""
    mapping = parse_mapping(text, "the derived mapping").mapping
    tensors = {name: tensor for name, value in comparison.tensors.items() for tensor in source_tensors(value)}
    layouts = match_layouts(tensors, [mapping])
    if not layouts:
        raise LayoutError(f"{comparison.source}: the derived mapping does not detect it: this is a bug")
    plan = make_plan(mapping, layouts[0].prefix, comparison.canonical, comparison.tensors, comparison.source)
    planned = {**plan.outputs, **plan.extra_tensors}
    for match in matches:
        # The search has compared these lazy tensors with the target, so equal ones are not read again.
        for name, value in match.outputs(comparison.tensors).items():
            if planned.get(name) != value:
                raise MappingError(f"{comparison.source}: the derived rules do not give {name!r}: this is a bug")


def _rule(match: TensorMatch, canonical: CanonicalLayout, variables: Variables, prefix: str) -> DerivedRule:
    action, source, target, parts = "rename", match.sources[0], match.targets[0], None
    if len(match.sources) > 1 or len(match.targets) > 1:
        action, names = ("fuse", match.sources) if len(match.sources) > 1 else ("split", match.targets)
        listed = list_parts(names, variables)
        if listed is None:
            raise MappingError(f"no {action} rule can list names that differ in several words: {', '.join(names)}")
        template, parts = listed
        source, target = (template, target) if action == "fuse" else (source, template)
    spec = canonical.spec(match.targets[0])
    # Other checkpoints in this layout may lack the tensors that the encoder does not require.
    optional = bool(spec.generate) if spec else ("on_read" if source.startswith(prefix) else True)
    sources, targets = frozenset(match.sources), frozenset(match.targets)
    return DerivedRule(action, source, target, sources, targets, match.ops, parts, optional)


def _detect(comparison: Comparison, matches: list[TensorMatch], prefix: str) -> dict[str, list[int | str]]:
    """Return the source tensors of the canonical signature with their shapes, or one tensor if there are none."""
    canonical, tensors, sizes = comparison.canonical, comparison.tensors, Sizes()
    shapes: dict[str, Shape] = {}
    for match in matches:
        for target, value in match.outputs(tensors).items():
            spec = canonical.spec(target)
            if spec and match_shape(spec.shape, value.shape, sizes) and target in canonical.signature.tensors:
                shapes[match.sources[0]] = spec.shape
    shapes = shapes or {match.sources[0]: () for match in matches[:1]}
    items = ((name, [_dim(size, shape, sizes) for size in tensors[name].shape]) for name, shape in shapes.items())
    return {name.removeprefix(prefix): dims for name, dims in items}


def _dim(size: int, shape: Shape, sizes: Sizes) -> int | str:
    """Return a dimension as one to three times (q, k, v) a size of the canonical shape, or as a number."""
    names = [dim.name for dim in shape if dim.name in sizes]
    multiples = [Dim(size // sizes[name], name) for name in names if name and size % sizes[name] == 0]
    return next((str(dim) for dim in sorted(multiples) if dim.factor <= 3), size)

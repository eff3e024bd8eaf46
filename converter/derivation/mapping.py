"""Makes the mapping file for the matches that were found, and proves that it does what they say."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import PurePath
from typing import Any

from converter.derivation.comparison import Comparison
from converter.derivation.matches import TensorMatch, check_leftovers, encoder_prefix, find_missing
from converter.derivation.rules import DerivedRule, Variables, generalise, list_parts
from converter.derivation.write import rule_items, used_variables, yaml_text
from converter.errors import LayoutError, MappingError
from converter.layouts import detect, registry
from converter.layouts.parse import parse_mapping
from converter.layouts.shapes import Dim, Shape, Sizes, fits
from converter.layouts.spec import CanonicalLayout
from converter.plan.plan import make_plan
from converter.tensors.lazy_tensor import source_tensors


@dataclass(frozen=True, slots=True)
class Derived:
    """A derived mapping.

    `found` counts the target's tensors by how they were matched, `unmatched` are those that were not, `dropped` the
    source's that give nothing. `written` says whether the file `output` was written.
    """

    layout: str
    family: str
    source: str
    target: str
    found: dict[str, int]
    unmatched: list[str]
    dropped: list[str]
    rules: int
    text: str
    output: str = ""
    written: bool = False

    @property
    def complete(self) -> bool:
        """Whether all of the target was found."""
        return not self.unmatched

    def to_json(self) -> dict[str, Any]:
        """Return the result as one JSON document."""
        return {"schema": 1, "kind": "derived", **asdict(self)}


def build_mapping(comparison: Comparison, matches: list[TensorMatch]) -> Derived:
    """Return the mapping file for some matches, proved if they cover the target.

    LayoutError if tensors are left over inside matched modules, MappingError for names that no rule can express.
    """
    if not matches:
        hint = "same weights in one element type" if comparison.expected else "names of a known layout"
        raise LayoutError(f"{comparison.source}: nothing matches {comparison.target}", f"needed are the {hint}")
    missing = find_missing(comparison, matches)
    if not missing or not comparison.expected:
        check_leftovers(comparison, matches)
    canonical, prefix = comparison.canonical, encoder_prefix(matches, comparison.canonical)
    source, target = PurePath(comparison.source).name, PurePath(comparison.target).name
    variables: Variables = {}
    used = {source for match in matches for source in match.sources}
    dropped = [source for source in comparison.tensors if source not in used]
    reason = f"no tensor of {target} has {'these values' if comparison.expected else 'this name'}"
    found = [_rule(match, canonical, variables, prefix) for match in matches]
    found += [DerivedRule("drop", key, "", frozenset({key}), frozenset(), reason=reason) for key in dropped]
    rules, other_rules = _generalised(found, prefix, variables)
    drop_others = not other_rules and not all(name.startswith(prefix) for name in comparison.tensors)
    how = "values" if comparison.expected else "names and shapes"
    text = yaml_text(
        f"Derived by `dsocr-convert mapping derive` from {source} and {target}, by comparing {how}.",
        {
            "layout": comparison.layout,
            "family": canonical.family,
            "description": f"the layout of {source}"[:100],
            "variables": used_variables([*rules, *other_rules], variables),
            "prefix": prefix,
            "detect": _detect(comparison, matches, prefix),
            "rules": rule_items(rules),
            "other_rules": rule_items(other_rules),
            "drop_rest": f"not part of {canonical.family.upper()}" if drop_others else "",
        },
    )
    if not missing:
        _prove(comparison, matches, text)
    return Derived(
        layout=comparison.layout,
        family=canonical.family,
        source=comparison.source,
        target=comparison.target,
        found={how: sum(len(match.targets) for match in matches)},
        unmatched=missing,
        dropped=dropped,
        rules=len(rules) + len(other_rules),
        text=text,
    )


def _generalised(rules: list[DerivedRule], prefix: str, variables: Variables) -> list[list[DerivedRule]]:
    """Return the rules for names under the prefix, and those for other names if they are not all drops."""
    inside = [rule for rule in rules if all(name.startswith(prefix) for name in rule.covers)]
    outside = [rule for rule in rules if not all(name.startswith(prefix) for name in rule.covers)]
    merged = [replace(rule, source=rule.source.removeprefix(prefix)) for rule in generalise(inside, variables)]
    return [merged, generalise(outside, variables) if any(rule.target for rule in outside) else []]


def _prove(comparison: Comparison, matches: list[TensorMatch], text: str) -> None:
    """Parse a mapping file and plan the source with it; MappingError unless that gives exactly what was matched."""
    mapping = parse_mapping(text, "the derived mapping").mapping
    tensors = {name: tensor for name, value in comparison.tensors.items() for tensor in source_tensors(value)}
    layouts = detect.match_layouts(tensors, registry.entry_of(mapping))
    if not layouts:
        raise LayoutError(f"{comparison.source}: the derived mapping does not detect it: this is a bug")
    plan = make_plan(mapping, layouts[0].prefix, comparison.canonical, comparison.tensors, comparison.source)
    planned = {**plan.outputs, **plan.extra_tensors}
    for match in matches:
        # The search has compared these expressions with the target: equal ones need not be read again.
        for name, value in match.outputs(comparison.tensors).items():
            if planned.get(name) != value:
                raise MappingError(f"{comparison.source}: the derived rules do not give {name!r}: this is a bug")


def _rule(match: TensorMatch, canonical: CanonicalLayout, variables: Variables, prefix: str) -> DerivedRule:
    verb, source, target, parts = "rename", match.sources[0], match.targets[0], None
    if len(match.sources) > 1 or len(match.targets) > 1:
        verb, names = ("fuse", match.sources) if len(match.sources) > 1 else ("split", match.targets)
        listed = list_parts(names, variables)
        if listed is None:
            raise MappingError(f"no {verb} rule can list names that differ in several words: {', '.join(names)}")
        template, parts = listed
        source, target = (template, target) if verb == "fuse" else (source, template)
    spec = canonical.spec(match.targets[0])
    # Files of the layout may lack what the encoder can do without.
    optional = bool(spec.generate) if spec else ("on_read" if source.startswith(prefix) else True)
    covers, gives = frozenset(match.sources), frozenset(match.targets)
    return DerivedRule(verb, source, target, covers, gives, match.ops, parts, optional)


def _detect(comparison: Comparison, matches: list[TensorMatch], prefix: str) -> dict[str, list[int | str]]:
    """Return what to detect the layout by: the sources of what the canonical layout is detected by, or the first."""
    canonical, tensors, sizes = comparison.canonical, comparison.tensors, Sizes()
    shapes: dict[str, Shape] = {}
    for match in matches:
        for target, value in match.outputs(tensors).items():
            spec = canonical.spec(target)
            if spec and fits(spec.shape, value.shape, sizes) and target in canonical.signature.tensors:
                shapes[match.sources[0]] = spec.shape
    shapes = shapes or {match.sources[0]: () for match in matches[:1]}
    items = ((name, [_dim(size, shape, sizes) for size in tensors[name].shape]) for name, shape in shapes.items())
    return {name.removeprefix(prefix): dims for name, dims in items}


def _dim(size: int, shape: Shape, sizes: Sizes) -> int | str:
    """Return a source's dimension as up to three times (q, k, v) a size of the canonical shape, or as a number."""
    names = [dim.name for dim in shape if dim.name in sizes]
    multiples = [Dim(size // sizes[name], name) for name in names if name and size % sizes[name] == 0]
    return next((str(dim) for dim in sorted(multiples) if dim.factor <= 3), size)

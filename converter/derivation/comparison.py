"""The source and the target of a derivation, and matches of their tensors by the names of known layouts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from converter.errors import LayoutError
from converter.layouts import registry
from converter.layouts.claims import claim
from converter.layouts.match import likely_prefixes, without_inner_copies
from converter.layouts.spec import CanonicalLayout, LayoutMapping
from converter.tensors.lazy_tensor import LazyTensor
from converter.tensors.ops import Op, apply_op

Tensors = Mapping[str, LazyTensor]


class TensorMatch(NamedTuple):
    """Source tensors that give canonical tensors."""

    sources: tuple[str, ...]  # Names of the source tensors
    targets: tuple[str, ...]  # Names of the canonical tensors
    ops: tuple[Op, ...]  # The operations from the sources to the targets

    def outputs(self, tensors: Tensors) -> dict[str, LazyTensor]:
        """Return the targets as lazy tensors; ValueError if the operations do not allow the shapes of the sources."""
        values: tuple[LazyTensor, ...] = tuple(tensors[name] for name in self.sources)
        for op in self.ops:
            values = apply_op(op, values)
        return dict(zip(self.targets, values, strict=True))


class Comparison(NamedTuple):
    """The source of a derivation, in an unknown layout, and the target, with the same weights in a known layout."""

    layout: str  # The new name for the layout of the source
    source: str  # The name of the source, for messages
    tensors: Tensors
    selected: Tensors  # The tensors that may match: those under `prefix`
    prefix: str | None  # The prefix that the user chose, or None
    target: str  # The name of the target, for messages
    canonical: CanonicalLayout
    expected: Tensors  # The target's tensors by canonical names; empty if the target is the name of a layout

    @property
    def generated(self) -> Tensors:
        """The target tensors that are generated where a checkpoint lacks them."""
        specs = {name: self.canonical.spec(name) for name in self.expected}
        return {name: self.expected[name] for name, spec in specs.items() if spec and spec.generate}

    def missing(self, matches: Iterable[TensorMatch]) -> list[str]:
        """Return the target tensors without a match, except those that may be generated."""
        present = self.generated.keys() | {name for match in matches for name in match.targets}
        return [name for name in self.expected if name not in present]


def match_by_names(comparison: Comparison) -> list[TensorMatch]:
    """Match tensors by names of known layouts under any prefix, if there are no values to compare.

    Raises:
        LayoutError: Several prefixes have most of the tensors that identify a layout.
    """
    canonical = comparison.canonical
    subtrees: dict[str, list[TensorMatch]] = {}
    for mapping in (canonical.mapping, *registry.mappings(canonical.family)):
        # Subtrees that lack some tensors are tried too: an encoder with adapters is another copy.
        for prefix in likely_prefixes(comparison.selected, mapping):
            subtrees[prefix] = max(subtrees.get(prefix, []), _match_subtree(comparison, prefix, mapping), key=len)
    subtrees = _without_overlaps(subtrees)
    chosen = without_inner_copies(subtrees, comparison.prefix)
    if len(chosen) > 1:
        listed = [prefix or "." for prefix in sorted(chosen)[:10]]
        raise LayoutError(
            f"{comparison.source}: {len(chosen)} subtrees fit {comparison.target}: {', '.join(map(repr, listed))}",
            f"choose one, such as --prefix {listed[0]}",
        )
    return [match for prefix in chosen for match in subtrees[prefix]]


def _without_overlaps(subtrees: Mapping[str, list[TensorMatch]]) -> dict[str, list[TensorMatch]]:
    """Leave out subtrees that share tensors with a subtree of more matches: their layouts describe parts of it."""
    kept: dict[str, list[TensorMatch]] = {}
    used: set[str] = set()
    for prefix in sorted(subtrees, key=lambda prefix: (-len(subtrees[prefix]), len(prefix))):
        sources = {name for match in subtrees[prefix] for name in match.sources}
        if used.isdisjoint(sources):
            kept[prefix] = subtrees[prefix]
        used |= sources
    return kept


def _match_subtree(comparison: Comparison, prefix: str, mapping: LayoutMapping) -> list[TensorMatch]:
    """Return the matches that a mapping gives for the names that begin with `prefix`."""
    names = [name.removeprefix(prefix) for name in comparison.selected if name.startswith(prefix)]
    matches = []
    for (rule_index, bindings), names_by_part in claim(mapping.rules, names).groups.items():
        rule = mapping.rules[rule_index]
        targets = tuple(target.fill(dict(bindings)) for target in rule.targets)
        if targets and len(names_by_part) == len(rule.sources) and all(map(comparison.canonical.spec, targets)):
            sources = tuple(prefix + names_by_part[part] for part in range(len(rule.sources)))
            matches.append(TensorMatch(sources, targets, rule.ops))
    return sorted(matches, key=lambda match: match.targets)

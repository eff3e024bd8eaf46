"""The two sides of a derivation, and matches of their tensors by the names of known layouts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from converter.errors import LayoutError
from converter.layouts import registry
from converter.layouts.claims import claim
from converter.layouts.match import likely_prefixes, outermost
from converter.layouts.spec import CanonicalLayout, LayoutMapping
from converter.tensors.lazy_tensor import LazyTensor
from converter.tensors.ops import Op, apply_op

Tensors = Mapping[str, LazyTensor]


class TensorMatch(NamedTuple):
    """The source tensors `sources`, the canonical tensors `targets`, and the operations from one to the other."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    ops: tuple[Op, ...]

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
    selected: Tensors  # Those that may match: under the prefix that the user chose
    prefix: str | None  # This prefix; None if the user chose none
    target: str  # The name of the target, for messages
    canonical: CanonicalLayout
    expected: Tensors  # The tensors of the target by canonical names; empty if the target is only a layout's name

    @property
    def generated(self) -> Tensors:
        """The target tensors that are generated where a checkpoint lacks them."""
        specs = {name: self.canonical.spec(name) for name in self.expected}
        return {name: self.expected[name] for name, spec in specs.items() if spec and spec.generate}

    def missing(self, matches: Iterable[TensorMatch]) -> list[str]:
        """Return the target tensors without a match, except those that may be generated."""
        skipped = set(self.generated).union(*(match.targets for match in matches))
        return [name for name in self.expected if name not in skipped]


def match_by_names(comparison: Comparison) -> list[TensorMatch]:
    """Match tensors by names of known layouts under any prefix, if there are no values to compare.

    Raises:
        LayoutError: Several prefixes have most of the tensors that identify a layout.
    """
    canonical = comparison.canonical
    subtrees: dict[str, list[TensorMatch]] = {}
    for mapping in (canonical.mapping, *registry.mappings(canonical.family)):
        # Not only where all tensors are: an encoder with adapters is a copy too.
        for prefix in likely_prefixes(comparison.selected, mapping):
            subtrees[prefix] = max(subtrees.get(prefix, []), _match_subtree(comparison, prefix, mapping), key=len)
    subtrees = _without_parts(subtrees)
    chosen = outermost(subtrees, comparison.prefix)
    if len(chosen) > 1:
        listed = [prefix or "." for prefix in sorted(chosen)[:10]]
        raise LayoutError(
            f"{comparison.source}: {len(chosen)} subtrees fit {comparison.target}: {', '.join(map(repr, listed))}",
            f"choose one, such as --prefix {listed[0]}",
        )
    return [match for prefix in chosen for match in subtrees[prefix]]


def _without_parts(subtrees: Mapping[str, list[TensorMatch]]) -> dict[str, list[TensorMatch]]:
    """Leave out subtrees that share tensors with one that has more of them: their layouts name parts of it."""
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
    for (index, bound), parts in claim(mapping.rules, names).groups.items():
        rule = mapping.rules[index]
        targets = tuple(target.fill(dict(bound)) for target in rule.targets)
        if targets and len(parts) == len(rule.sources) and all(map(comparison.canonical.spec, targets)):
            sources = tuple(prefix + parts[i] for i in range(len(parts)))
            matches.append(TensorMatch(sources, targets, rule.ops))
    return sorted(matches, key=lambda match: match.targets)

"""Matches tensors by the names of known layouts under any prefix, if there are no values to compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from converter.derivation.comparison import Comparison, TensorMatch
from converter.errors import LayoutError
from converter.layouts import registry
from converter.layouts.claims import claim
from converter.layouts.match import outermost, prefixes_of
from converter.layouts.spec import LayoutMapping


def match_by_names(comparison: Comparison) -> list[TensorMatch]:
    """Return the matches for canonical tensors; LayoutError if several prefixes have most tensors of a signature."""
    canonical = comparison.canonical
    subtrees: dict[str, list[TensorMatch]] = {}
    for mapping in (canonical.mapping, *registry.mappings(canonical.family)):
        keys = mapping.detect
        counts = Counter(prefix for key in keys for prefix in prefixes_of(comparison.selected, key))
        # Not only where all are: an encoder with adapters is a copy too.
        for prefix in [prefix for prefix, count in counts.items() if 2 * count > len(keys)]:
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

"""Matches tensors by the names of known layouts under any prefix, if there are no values to compare."""

from __future__ import annotations

from collections.abc import Iterable

from converter.derivation.comparison import Comparison
from converter.derivation.matches import TensorMatch
from converter.errors import LayoutError
from converter.layouts import registry
from converter.layouts.claims import claim
from converter.layouts.spec import LayoutMapping


def match_by_names(comparison: Comparison) -> list[TensorMatch]:
    """Return the matches for canonical tensors; LayoutError if tensors under several prefixes fit equally well."""
    canonical = comparison.canonical
    subtrees: dict[str, list[TensorMatch]] = {"": []}
    for mapping in (canonical.mapping, *registry.mappings(canonical.family)):
        for prefix in _prefixes(comparison.tensors, mapping.signature.tensors):
            matches = _match_subtree(comparison, prefix, mapping)
            if len(matches) > len(subtrees.get(prefix, ())):
                subtrees[prefix] = matches
    most = max(map(len, subtrees.values()))
    best = [prefix for prefix, matches in subtrees.items() if len(matches) == most]
    if len(best) > 1:
        raise LayoutError(
            f"{comparison.source}: {len(best)} subtrees fit {comparison.target} equally well: "
            f"{', '.join(map(repr, best[:10]))}",
            "remove all but one of them from the checkpoint, then derive again",
        )
    return subtrees[best[0]]


def _prefixes(names: Iterable[str], keys: Iterable[str]) -> list[str]:
    """Return the prefixes of names that end in one of the keys of a signature."""
    prefixes = (name.removesuffix(key) for name in names for key in keys if name.endswith(key))
    return list(dict.fromkeys(prefix for prefix in prefixes if prefix[-1:] in ("", ".")))


def _match_subtree(comparison: Comparison, prefix: str, mapping: LayoutMapping) -> list[TensorMatch]:
    """Return the matches that a mapping gives for the names that begin with `prefix`."""
    names = [name.removeprefix(prefix) for name in comparison.tensors if name.startswith(prefix)]
    matches = []
    for (index, bound), parts in claim(mapping.rules, dict.fromkeys(names)).groups.items():
        rule = mapping.rules[index]
        targets = tuple(target.fill(dict(bound)) for target in rule.targets)
        if targets and len(parts) == len(rule.sources) and all(map(comparison.canonical.spec, targets)):
            sources = tuple(prefix + parts[i] for i in range(len(parts)))
            matches.append(TensorMatch(sources, targets, rule.ops))
    return sorted(matches, key=lambda match: match.targets)

"""Assigns tensor names to the rules that match them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from converter.errors import MappingError
from converter.layouts.spec import Rule

# The number of problems that an error lists: a wrong mapping can cause one for every tensor.
MAX_SHOWN = 5
# The number of names times the number of templates. 3,000 of each take a few seconds.
_MAX_COMPARISONS = 10_000_000


class Claims(NamedTuple):
    """Result of matching names with rules."""

    # For each rule (by its index) and values of its variables, the names by the index of the source template
    groups: dict[tuple[int, tuple[tuple[str, str], ...]], dict[int, str]]
    unclaimed: list[str]  # Names that no rule matches
    duplicates: list[tuple[str, Rule, Rule]]  # Names that two rules match, with both rules
    unmatched: list[Rule]  # Required rules that match no name


def claim(rules: tuple[Rule, ...], names: Iterable[str]) -> Claims:
    """Match every name with every rule; MappingError if there are too many names and rules."""
    names = list(names)
    templates = [(i, j, template) for i, rule in enumerate(rules) for j, template in enumerate(rule.sources)]
    if len(templates) * len(names) > _MAX_COMPARISONS:
        raise MappingError(
            f"{rules[0].location.file}: {len(templates)} rules are too many for {len(names)} tensors",
            "use templates such as blocks.{i}.{rest}, which match many names",
        )
    claims = Claims(defaultdict(dict), [], [], [])
    for name in names:
        matches = [(i, j, bindings) for i, j, template in templates if (bindings := template.match(name)) is not None]
        if not matches:
            claims.unclaimed.append(name)
            continue
        (i, j, bindings), *others = matches
        claims.groups[i, tuple(sorted(bindings.items()))][j] = name
        claims.duplicates.extend((name, rules[i], rules[other]) for other, *_ in others)
    used = {index for index, _ in claims.groups}
    claims.unmatched.extend(rule for i, rule in enumerate(rules) if i not in used and not rule.optional)
    return claims


def first_few(items: list[str]) -> list[str]:
    """Return the first items, followed by "and N more" if there are more."""
    more = [f"and {len(items) - MAX_SHOWN} more"] if len(items) > MAX_SHOWN else []
    return items[:MAX_SHOWN] + more


def summary(problems: list[str]) -> str:
    """Return the first problems, one per line."""
    return "\n".join(first_few(problems))

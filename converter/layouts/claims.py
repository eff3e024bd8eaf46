"""Assignment of tensor names to the rules that match them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from converter.errors import MappingError
from converter.layouts.spec import Rule

# Number of problems that an error lists. A wrong mapping can cause a problem for every tensor.
MAX_SHOWN = 5
# Names times templates. 3,000 rules and a language model with 3,000 tensors take a few seconds.
_MAX_COMPARISONS = 10_000_000


class Claims(NamedTuple):
    """Result of matching names with rules."""

    # Names by part number, for each pair of a rule's index and values of its variables
    groups: dict[tuple[int, tuple[tuple[str, str], ...]], dict[int, str]]
    unclaimed: list[str]  # Names that no rule matches
    duplicates: list[tuple[str, Rule, Rule]]  # Names that two rules match, with both rules
    unmatched: list[Rule]  # Required rules that match no name


def claim(rules: tuple[Rule, ...], names: Iterable[str]) -> Claims:
    """Match every name with every rule; MappingError if there are too many names and rules."""
    names = list(names)
    templates = [(i, part, template) for i, rule in enumerate(rules) for part, template in enumerate(rule.sources)]
    if len(templates) * len(names) > _MAX_COMPARISONS:
        raise MappingError(
            f"{rules[0].location.file}: {len(templates)} rules are too many for {len(names)} tensors",
            "use templates such as blocks.{i}.{rest}, which match many names",
        )
    claims = Claims(defaultdict(dict), [], [], [])
    for name in names:
        found = [(i, part, match) for i, part, template in templates if (match := template.match(name)) is not None]
        if not found:
            claims.unclaimed.append(name)
            continue
        (first, part, bindings), *others = found
        claims.groups[first, tuple(sorted(bindings.items()))][part] = name
        claims.duplicates.extend((name, rules[first], rules[other]) for other, *_ in others)
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

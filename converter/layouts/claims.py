"""Assignment of tensor names to the rules that match them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from converter.errors import MappingError
from converter.layouts.spec import Rule

# Number of problems that an error lists. A wrong mapping can cause a problem for every tensor.
MAX_SHOWN = 5
# Names times templates. 3,000 rules and a language model with 3,000 tensors take a few seconds.
_MAX_COMPARISONS = 10_000_000


@dataclass(slots=True, eq=False)
class Claims:
    """Result of matching names with rules."""

    # Names by part number, for each pair of a rule's index and values of its variables
    groups: dict[tuple[int, tuple[tuple[str, str], ...]], dict[int, str]]
    unclaimed: list[str]  # Names that no rule matches
    duplicates: list[tuple[str, Rule, Rule]]  # Names that two rules match, with both rules

    def unmatched_rules(self, rules: tuple[Rule, ...]) -> list[Rule]:
        """Return the required rules that matched nothing."""
        used = {index for index, _ in self.groups}
        return [rule for index, rule in enumerate(rules) if index not in used and not rule.optional]


def claim(rules: tuple[Rule, ...], names: Mapping[str, object]) -> Claims:
    """Match every name with every rule; MappingError if there are too many names and rules."""
    templates = [(i, part, template) for i, rule in enumerate(rules) for part, template in enumerate(rule.sources)]
    if len(templates) * len(names) > _MAX_COMPARISONS:
        raise MappingError(
            f"{rules[0].location.file}: {len(templates)} rules are too many for {len(names)} tensors",
            "use templates such as blocks.{i}.{rest}, which match many names",
        )
    claims = Claims(defaultdict(dict), [], [])
    for name in names:
        owner: Rule | None = None
        for index, part, template in templates:
            bindings = template.match(name)
            if bindings is None:
                continue
            if owner is not None:
                claims.duplicates.append((name, owner, rules[index]))
                continue
            owner = rules[index]
            claims.groups[index, tuple(sorted(bindings.items()))][part] = name
        if owner is None:
            claims.unclaimed.append(name)
    return claims


def first_few(items: list[str]) -> list[str]:
    """Return the first items, followed by "and N more" if there are more."""
    more = [f"and {len(items) - MAX_SHOWN} more"] if len(items) > MAX_SHOWN else []
    return items[:MAX_SHOWN] + more


def summary(problems: list[str]) -> str:
    """Return the first problems, one per line."""
    return "\n".join(first_few(problems))

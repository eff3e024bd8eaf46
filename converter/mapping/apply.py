"""Rules applied to tensors, all at once: each name is claimed by exactly one rule, each new name made exactly once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass, field

from converter.errors import MappingError
from converter.mapping.expr import Expr
from converter.mapping.ops import run
from converter.mapping.rules import Rule
from converter.mapping.template import Bindings

# Errors list this many names, then count: a wrong mapping can disagree with every tensor of a checkpoint.
SHOWN = 5
# Names times templates, a few seconds: 3,000 rules for the 3,000 tensors of a language model.
_MOST_COMPARED = 10_000_000


@dataclass(slots=True, eq=False)
class Applied:
    """What the rules made: tensors by their new names, the rule behind each, and why others were dropped."""

    values: dict[str, Expr] = field(default_factory=dict)
    rules: dict[str, Rule] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Claims:
    """Which rule claims which names; `groups` holds, per rule and variable values, the names of its parts."""

    groups: dict[tuple[int, tuple[tuple[str, str], ...]], dict[int, str]]
    unclaimed: list[str]
    twice: list[tuple[str, Rule, Rule]]

    def dead(self, rules: tuple[Rule, ...]) -> list[Rule]:
        """The rules that must match something and did not."""
        alive = {index for index, _ in self.groups}
        return [rule for index, rule in enumerate(rules) if index not in alive and not rule.optional]


def claim(rules: tuple[Rule, ...], names: MappingABC[str, object]) -> Claims:
    """Match every name against every rule; MappingError where there are too many of both to do so."""
    templates = [(i, part, template) for i, rule in enumerate(rules) for part, template in enumerate(rule.sources)]
    if len(templates) * len(names) > _MOST_COMPARED:
        raise MappingError(
            f"{rules[0].place.file}: {len(templates)} rules are too many for {len(names)} tensors\n"
            "a template such as blocks.{i}.{rest} stands for many names at once"
        )
    claims = Claims(defaultdict(dict), [], [])
    for name in names:
        owner: Rule | None = None
        for index, part, template in templates:
            bindings = template.match(name)
            if bindings is None:
                continue
            if owner is not None:
                claims.twice.append((name, owner, rules[index]))
                continue
            owner = rules[index]
            claims.groups[index, tuple(sorted(bindings.items()))][part] = name
        if owner is None:
            claims.unclaimed.append(name)
    return claims


def apply(rules: tuple[Rule, ...], tensors: MappingABC[str, Expr], source: str) -> Applied:
    """The tensors that `rules` make of `tensors`; MappingError names `source`, rule and name for any disagreement."""
    claims = claim(rules, tensors)
    problems = [
        f"{name!r} is claimed by two rules: {first.place} ({first.text}) and {second.place} ({second.text})"
        for name, first, second in claims.twice
    ]
    problems += [f"no rule claims {name!r}" for name in claims.unclaimed]
    problems += [f"{rule.place}: the rule matches nothing: {rule.text}" for rule in claims.dead(rules)]
    applied = Applied()
    for (index, bound), parts in claims.groups.items():
        problems += _apply_one(rules[index], dict(bound), parts, tensors, applied)
    if problems:
        raise MappingError(f"{source}: {summary(problems)}")
    return applied


def _apply_one(
    rule: Rule, bindings: Bindings, parts: dict[int, str], tensors: MappingABC[str, Expr], applied: Applied
) -> list[str]:
    """Apply a rule to the tensors of one set of variable values; what is wrong comes back as text."""
    if not rule.targets:
        applied.dropped.update((name, rule.reason) for name in parts.values())
        return []
    absent = [rule.sources[i].fill(bindings) for i in range(len(rule.sources)) if i not in parts]
    if absent:
        return [f"{rule.place}: {', '.join(map(repr, absent))} is missing beside {next(iter(parts.values()))!r}"]
    try:
        values = tuple(tensors[parts[i]] for i in range(len(rule.sources)))
        for op in rule.ops:
            values = run(op, values)
        names = [target.fill(bindings) for target in rule.targets]
    except ValueError as error:
        return [f"{rule.place}: {parts[0]!r}: {error}"]
    problems = []
    for name, value in zip(names, values, strict=True):
        if name in applied.values:
            first = applied.rules[name].place
            problems.append(f"{name!r} is made twice: by {first} and by {rule.place}, from {parts[0]!r}")
        applied.values[name] = value
        applied.rules[name] = rule
    return problems


def summary(problems: list[str]) -> str:
    """The first few problems, a line each, and how many more there are."""
    lines = problems[:SHOWN]
    if len(problems) > SHOWN:
        lines.append(f"and {len(problems) - SHOWN} more")
    return "\n".join(lines)

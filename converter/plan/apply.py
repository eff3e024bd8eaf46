"""Rules applied to tensors, all at once: each name is claimed by exactly one rule, each new name made exactly once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from converter.errors import MappingError
from converter.layouts.claims import claim, summary
from converter.layouts.spec import Rule
from converter.layouts.template import Bindings
from converter.tensors.lazy_tensor import LazyTensor
from converter.tensors.ops import apply_op


@dataclass(slots=True, eq=False)
class Applied:
    """What the rules made: tensors by their new names, the rule behind each, and why others were dropped."""

    values: dict[str, LazyTensor] = field(default_factory=dict)
    rules: dict[str, Rule] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)


def apply(rules: tuple[Rule, ...], tensors: Mapping[str, LazyTensor], source: str) -> Applied:
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
    rule: Rule, bindings: Bindings, parts: dict[int, str], tensors: Mapping[str, LazyTensor], applied: Applied
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
            values = apply_op(op, values)
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

"""Simultaneous application of rules to tensors. One rule claims each name, and one rule produces each new name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from converter.errors import MappingError
from converter.layouts.claims import claim, summary
from converter.layouts.spec import Rule
from converter.layouts.template import Bindings
from converter.tensors.lazy_tensor import LazyTensor
from converter.tensors.ops import apply_op

# Why a tensor outside the encoder is dropped, where the mapping gives no reason.
OUTSIDE = "not part of the encoder"


@dataclass(slots=True, eq=False)
class Applied:
    """Result of applying rules."""

    values: dict[str, LazyTensor] = field(default_factory=dict)  # Tensors by their new names
    rules: dict[str, Rule] = field(default_factory=dict)  # The rule that produced each tensor, by its new name
    dropped: dict[str, str] = field(default_factory=dict)  # The reason to drop a tensor, by its old name


def apply(
    rules: tuple[Rule, ...],
    tensors: Mapping[str, LazyTensor],
    source: str,
    is_outside: Callable[[str], bool] = lambda name: False,
) -> Applied:
    """Apply rules to tensors.

    Args:
        rules: The rules; their order does not matter.
        tensors: The tensors by name.
        source: The checkpoint's name, for error messages.
        is_outside: Whether a tensor of that name is outside the encoder. No such tensor is an error: if no rule claims
            it, or its rule does not fit it, it is dropped.

    Raises:
        MappingError: A name is claimed or produced by no rule or by two, or an operation does not fit a tensor.
    """
    claims = claim(rules, tensors)
    problems = [
        f"{name!r} is claimed by two rules: {first.location} ({first.text}) and {second.location} ({second.text})"
        for name, first, second in claims.duplicates
    ]
    problems += [f"no rule claims {name!r}" for name in claims.unclaimed if not is_outside(name)]
    problems += [f"{rule.location}: the rule matches nothing: {rule.text}" for rule in claims.unmatched]
    applied = Applied(dropped={name: OUTSIDE for name in claims.unclaimed if is_outside(name)})
    for (index, bindings), parts in claims.groups.items():
        found = _apply_rule(rules[index], dict(bindings), parts, tensors, applied)
        if found and all(map(is_outside, parts.values())):
            applied.dropped.update((name, f"{OUTSIDE}, and {found[0]}") for name in parts.values())
        else:
            problems += found
    if problems:
        raise MappingError(f"{source}: {summary(problems)}")
    return applied


def _apply_rule(
    rule: Rule, bindings: Bindings, parts: dict[int, str], tensors: Mapping[str, LazyTensor], applied: Applied
) -> list[str]:
    """Apply a rule to the tensors of one set of variable values; return problems."""
    if not rule.targets:
        applied.dropped.update((name, rule.reason) for name in parts.values())
        return []
    absent = [template.fill(bindings) for part, template in enumerate(rule.sources) if part not in parts]
    if absent:
        return [f"{rule.location}: {', '.join(map(repr, absent))} is missing next to {next(iter(parts.values()))!r}"]
    try:
        values = tuple(tensors[parts[part]] for part in range(len(rule.sources)))
        for op in rule.ops:
            values = apply_op(op, values)
        names = [target.fill(bindings) for target in rule.targets]
    except ValueError as error:
        return [f"{rule.location}: {parts[0]!r}: {error}"]
    problems = []
    for name, value in zip(names, values, strict=True):
        if name in applied.values:
            first = applied.rules[name].location
            problems.append(f"{name!r} is produced twice: by {first} and by {rule.location}, from {parts[0]!r}")
        applied.values[name] = value
        applied.rules[name] = rule
    return problems

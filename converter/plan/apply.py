"""Applies rules to tensors, all at once: exactly one rule claims each name, and one produces each new name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from converter.errors import MappingError
from converter.layouts.claims import claim, summary
from converter.layouts.marks import find_extra_modules
from converter.layouts.spec import CanonicalLayout, LayoutMapping, Rule
from converter.layouts.template import Bindings
from converter.tensors.lazy_tensor import LazyTensor
from converter.tensors.ops import apply_op

# Why a tensor outside the encoder is dropped, if the mapping gives no reason.
OUTSIDE = "not part of the encoder"


class Applied:
    """The result of `apply`."""

    def __init__(self) -> None:
        self.values: dict[str, LazyTensor] = {}  # Tensors by their new names
        self.rules: dict[str, Rule] = {}  # The rule that produced each tensor, by its new name
        self.dropped: dict[str, str] = {}  # Why a tensor is dropped, by its old name


def outside_predicate(
    mapping: LayoutMapping, prefix: str, target: CanonicalLayout, outer_prefix: str = ""
) -> Callable[[str], bool]:
    """Return a function that returns whether the tensor of a name is outside the encoder.

    With a prefix, every name under it belongs to the encoder. Without one, the modules that the layout names belong to
    it, and adapters.

    Args:
        mapping: The mapping of the source.
        prefix: The prefix of the encoder's names; empty if there is none.
        target: The canonical layout.
        outer_prefix: The part of the encoder's names before the prefix; often empty.
    """
    if prefix:
        return lambda name: not name.startswith(outer_prefix + prefix)
    layout = target if mapping.name == target.name else mapping
    modules = {template.text.partition(".")[0] for template in layout.templates("")}
    # A template such as {rest} names no module: everything is inside.
    if any("{" in module for module in modules):
        return lambda name: not name.startswith(outer_prefix)

    def is_outside(name: str) -> bool:
        if not name.startswith(outer_prefix):
            return True
        inner = name.removeprefix(outer_prefix)
        return inner.partition(".")[0] not in modules and not find_extra_modules([inner])

    return is_outside


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
        is_outside: Returns whether the tensor of a name is outside the encoder. Such a tensor never causes an error:
            it is dropped if no rule claims it, or if the rule does not fit it.

    Raises:
        MappingError: No rule or two rules claim a name, two rules produce one, a required rule matches nothing, one of
            several sources of a rule is missing, or an operation does not fit a tensor.
    """
    claims = claim(rules, tensors)
    problems = [
        f"{name!r} is claimed by two rules: {first.location} ({first.text}) and {second.location} ({second.text})"
        for name, first, second in claims.duplicates
    ]
    problems += [f"no rule claims {name!r}" for name in claims.unclaimed if not is_outside(name)]
    problems += [f"{rule.location}: the rule matches nothing: {rule.text}" for rule in claims.unmatched]
    applied = Applied()
    applied.dropped = {name: OUTSIDE for name in claims.unclaimed if is_outside(name)}
    for (index, bindings), names in claims.groups.items():
        rule_problems = _apply_rule(rules[index], dict(bindings), names, tensors, applied)
        if rule_problems and all(map(is_outside, names.values())):
            applied.dropped.update((name, f"{OUTSIDE}, and {rule_problems[0]}") for name in names.values())
        else:
            problems += rule_problems
    if problems:
        raise MappingError(f"{source}: {summary(problems)}")
    return applied


def _apply_rule(
    rule: Rule, bindings: Bindings, names: dict[int, str], tensors: Mapping[str, LazyTensor], applied: Applied
) -> list[str]:
    """Apply a rule to tensors, whose names are given by the index of the source template; return problems."""
    if not rule.targets:
        applied.dropped.update((name, rule.reason) for name in names.values())
        return []
    absent = [template.fill(bindings) for index, template in enumerate(rule.sources) if index not in names]
    if absent:
        return [f"{rule.location}: {', '.join(map(repr, absent))} is missing next to {next(iter(names.values()))!r}"]
    try:
        values = tuple(tensors[names[index]] for index in range(len(rule.sources)))
        for op in rule.ops:
            values = apply_op(op, values)
        new_names = [target.fill(bindings) for target in rule.targets]
    except ValueError as error:
        return [f"{rule.location}: {names[0]!r}: {error}"]
    problems = []
    for name, value in zip(new_names, values, strict=True):
        if name in applied.values:
            first = applied.rules[name].location
            problems.append(f"{name!r} is produced twice: by {first} and by {rule.location}, from {names[0]!r}")
        applied.values[name] = value
        applied.rules[name] = rule
    return problems

"""Simultaneous application of rules to tensors. One rule claims each name, and one rule produces each new name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from converter.errors import MappingError
from converter.layouts.claims import claim, summary
from converter.layouts.marks import find_extra_modules
from converter.layouts.spec import CanonicalLayout, LayoutMapping, Rule
from converter.layouts.template import Bindings
from converter.tensors.lazy_tensor import LazyTensor
from converter.tensors.ops import apply_op

# Why a tensor outside the encoder is dropped, where the mapping gives no reason.
OUTSIDE = "not part of the encoder"


class Applied:
    """Result of applying rules."""

    def __init__(self) -> None:
        self.values: dict[str, LazyTensor] = {}  # Tensors by their new names
        self.rules: dict[str, Rule] = {}  # The rule that produced each tensor, by its new name
        self.dropped: dict[str, str] = {}  # The reason to drop a tensor, by its old name


def outside_predicate(
    mapping: LayoutMapping, prefix: str, target: CanonicalLayout, outer_prefix: str = ""
) -> Callable[[str], bool]:
    """Return a function that says whether a tensor is outside the encoder.

    With a prefix, every name under it belongs to the encoder. Without one, the encoder consists of the modules that the
    layout names, and of adapters.

    Args:
        mapping: The mapping of the source.
        prefix: The prefix of the encoder's names; empty if there is none.
        target: The canonical layout.
        outer_prefix: What precedes the prefix in the encoder's names; often empty.
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
        is_outside: Whether a tensor of that name is outside the encoder. Such a tensor never causes an error: it is
            dropped if no rule claims it, or its rule does not fit.

    Raises:
        MappingError: No rule or two rules claim a name, two rules produce one, a required rule matches nothing, a part
            is missing, or an operation does not fit a tensor.
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

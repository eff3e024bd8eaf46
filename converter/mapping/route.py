"""From one layout to another through the family's hub: a plan to the hub, then its tensors as a spoke has them."""

from __future__ import annotations

from dataclasses import replace

from converter.errors import MappingError
from converter.mapping.apply import apply, claim, summary
from converter.mapping.expr import Expr, sources
from converter.mapping.plan import Plan, in_order
from converter.mapping.rules import Layout, Mapping, Rule, Signature, invert
from converter.mapping.template import Template


def identity(hub: Layout) -> Mapping:
    """The hub as a mapping to itself: every name is kept."""
    any_name = Template.parse("{rest}", {"rest": "path"})
    rule = Rule((any_name,), (any_name,), (), False, "", hub.place)
    signature = Signature(("",), hub.signature.tensors)
    return Mapping(hub.name, hub.family, hub.description, signature, (rule,), (), "", hub.place, hub.digest)


def retarget(plan: Plan, target: Mapping, fill: Plan | None, whole: bool, dtype: str, source: str) -> Plan:
    """A plan that leads to the hub, `plan`, made to lead to the layout `target`.

    What the target has and the source lacks is taken from `fill`, another plan to the hub; MappingError names what
    neither gives. Without `whole`, tensors beside the encoder are left out.
    """
    rules = writing_rules(target, whole)
    made = {spec.name.text for spec in plan.target.tensors if spec.fill}
    have = {name: value for name, value in {**plan.outputs, **plan.beyond}.items() if name not in made}
    lent = {**fill.outputs, **fill.beyond} if fill else {}
    claimed = claim(rules, {**lent, **have})
    taken = {name for parts in claimed.groups.values() for name in parts.values()} - made
    values = {name: value for name, value in {**lent, **have}.items() if name in taken}
    _check_complete(source, target, [new.text for rule in claim(rules, values).dead(rules) for new in rule.targets])
    applied = apply(rules, values, f"{source}: to {target.name}")
    # Some layouts are known by tensors that others of their family lack.
    prefix, known = target.signature.prefixes[0], target.signature.tensors
    _check_complete(source, target, [prefix + key for key in known if prefix + key not in applied.values])
    return Plan(
        plan.mapping,
        plan.target,
        in_order(applied.values, dtype),
        _dropped(plan, target.name, made, applied.values),
        sizes=plan.sizes,
        rules=applied.rules,
        layout=target.name,
    )


def completed(plan: Plan, lent: Plan, dtype: str) -> Plan:
    """A plan to the hub with what its source lacks taken from another plan to the hub."""
    taken = {name: lent.outputs[name] for name in plan.missing if name in lent.outputs}
    outputs = in_order({**plan.outputs, **taken}, dtype)
    missing = {name: why for name, why in plan.missing.items() if name not in taken}
    rules = {**plan.rules, **{name: lent.rules[name] for name in taken}}
    return replace(plan, outputs=outputs, missing=missing, rules=rules)


def _dropped(plan: Plan, target: str, made: set[str], outputs: dict[str, Expr]) -> dict[str, str]:
    """Each of the source's tensors that the outputs do not hold, and why."""
    why = dict(plan.dropped)
    for name, value in {**plan.outputs, **plan.beyond}.items():
        reason = "made anew by what loads it" if name in made else f"{target} has no such tensor"
        why.update((tensor.key, reason) for tensor in sources(value))
    for value in outputs.values():
        for tensor in sources(value):
            why.pop(tensor.key, None)
    return why


def _check_complete(source: str, target: Mapping, lacking: list[str]) -> None:
    if lacking:
        names = summary(lacking).replace("\n", ", ")
        raise MappingError(
            f"{source}: {target.name} has tensors that it lacks: {names}\n"
            "take them from a checkpoint that has them, with --fill-from"
        )


def writing_rules(target: Mapping, whole: bool) -> tuple[Rule, ...]:
    """The rules from the hub's names to a layout's, under the first of its prefixes."""
    prefix = target.signature.prefixes[0]
    rules = tuple(rule.prefixed(prefix) for rule in target.rules)
    if whole:
        rules += tuple(rule._replace(optional=False) for rule in target.beside)
    return invert(rules)

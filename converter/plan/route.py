"""Routes from one layout to another through the family's canonical layout."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace

from converter.errors import MappingError
from converter.layouts.claims import claim, first_few
from converter.layouts.spec import LayoutMapping, Rule, invert
from converter.layouts.template import Template, any_match
from converter.plan.apply import apply
from converter.plan.plan import Plan
from converter.tensors.lazy_tensor import LazyTensor, source_tensors


def retarget(
    plan: Plan,
    target: LayoutMapping,
    donor: Plan | None,
    source: str,
    full_model: bool = False,
    partial: bool = False,
) -> Plan:
    """Extend a plan that leads to the canonical layout to another layout.

    Args:
        plan: The plan to the canonical layout.
        target: The mapping of the other layout, which is applied backwards.
        donor: A plan to the canonical layout that supplies missing tensors, or None.
        source: The checkpoint's name, for error messages.
        full_model: Whether to convert tensors outside the encoder too.
        partial: Whether tensors of the target may be missing.

    Raises:
        MappingError: Neither the checkpoint nor the donor has all tensors of the target.
    """
    rules = writing_rules(target, full_model)
    generated = {spec.name.text for spec in plan.target.tensors if spec.generate}
    values = _claimed(rules, plan, donor, generated)
    # All optional: `missing_names` lists what is missing by name, which is clearer than the rules without a match.
    applied = apply(tuple(rule._replace(optional=True) for rule in rules), values, f"{source}: to {target.name}")
    if not partial and (missing := missing_names(rules, applied.values)):
        raise MappingError(
            f"{source}: lacks tensors of {target.name}: {', '.join(first_few(missing))}",
            "take them from a checkpoint that has them, with --fill-from",
        )
    return replace(
        plan,
        outputs=applied.values,
        dropped=_dropped(plan, target, generated, applied.values),
        layout=target.name,
        missing={},
        generated={},
        unusual={},
        rules=applied.rules,
        extra_tensors={},
        canonical_tensors=values,
    )


def _claimed(rules: tuple[Rule, ...], plan: Plan, donor: Plan | None, generated: set[str]) -> dict[str, LazyTensor]:
    """Return the canonical tensors that rules convert, from the checkpoint or else from the donor."""
    own = {name: value for name, value in {**plan.outputs, **plan.extra_tensors}.items() if name not in generated}
    available = {**donor.outputs, **donor.extra_tensors, **own} if donor else own
    claimed = {name for parts in claim(rules, available).groups.values() for name in parts.values()} - generated
    return {name: value for name, value in available.items() if name in claimed}


def missing_names(rules: Sequence[Rule], produced: Collection[str]) -> list[str]:
    """Return the names that required rules should have produced, with `*` for variables whose values are unknown.

    The number of layers follows from the highest index among the `produced` names.
    """
    templates = [template for rule in rules if not rule.optional for template in rule.targets]
    layers = {head: _count_layers(head, produced) for head in {template.head for template in templates}}
    expected = (name for template in templates for name in _expected(template, layers[template.head], produced))
    return list(dict.fromkeys(name for name in expected if name not in produced))


def _count_layers(head: str, names: Collection[str]) -> int:
    """Return the number of layers, one more than the highest index that follows `head`."""
    indices = (name.removeprefix(head).split(".")[0] for name in names if name.startswith(head))
    # Limited: with an index above the number of names, some names are missing anyway.
    return max((min(int(index), len(names)) + 1 for index in indices if index.isdigit()), default=0)


def _expected(template: Template, count: int, produced: Collection[str]) -> Iterator[str]:
    """Return the names that a template should produce with a number of layers.

    Args:
        template: The template; with an open-ended variable, one produced name is enough.
        count: The number of layers.
        produced: The names that were produced.
    """
    unknown = [field.name for field in template.fields if not field.choices(count)]
    if unknown and any(template.match(name) is not None for name in produced):
        return iter(())
    for name in unknown:
        template = template.bind(name, "*")
    return template.names(count)


def complete_from(plan: Plan, donor: Plan | None) -> Plan:
    """Complete a plan to the canonical layout with the tensors of another one, if there is one."""
    if donor is None:
        return plan
    taken = {name: donor.outputs[name] for name in plan.missing if name in donor.outputs}
    missing = {name: why for name, why in plan.missing.items() if name not in taken}
    rules = plan.rules | {name: donor.rules[name] for name in taken}
    return replace(plan, outputs=plan.outputs | taken, missing=missing, rules=rules)


def _dropped(plan: Plan, target: LayoutMapping, generated: set[str], outputs: dict[str, LazyTensor]) -> dict[str, str]:
    """Return why the outputs do not contain a tensor of the checkpoint, for each such tensor."""
    reasons = dict(plan.dropped)
    outside = [template for rule in target.other_rules for template in rule.targets]
    # By identity: a donor's tensor may have the same name as a dropped one.
    used = {id(tensor) for value in outputs.values() for tensor in source_tensors(value)}
    for name, value in {**plan.outputs, **plan.extra_tensors}.items():
        if name in generated:
            reason = "generated on load"
        elif any_match(outside, name):
            reason = "not part of the encoder; --full-model converts it"
        else:
            reason = f"{target.name} has no such tensor"
        for tensor in source_tensors(value):
            if id(tensor) in used:
                reasons.pop(tensor.key, None)
            else:
                reasons[tensor.key] = reason
    return reasons


def writing_rules(target: LayoutMapping, full_model: bool) -> tuple[Rule, ...]:
    """Return the rules from canonical names to the names of a layout with the first of the prefixes."""
    prefix = target.prefixes[0]
    rules = tuple(rule.prefixed(prefix) for rule in target.rules)
    if full_model:
        rules += tuple(rule._replace(optional=False) for rule in target.other_rules)
    return invert(rules)


def target_names(rules: Iterable[Rule], name: str) -> list[str]:
    """Return the names that rules make of one tensor."""
    matches = ((rule, source.match(name)) for rule in rules for source in rule.sources)
    return [target.fill(match) for rule, match in matches if match is not None for target in rule.targets]

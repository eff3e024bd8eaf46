"""Converts plans to the canonical layout into plans to other layouts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace

from converter.errors import MappingError
from converter.layouts.claims import claim, first_few
from converter.layouts.spec import LayoutMapping, Rule, invert
from converter.layouts.template import Template, any_match
from converter.plan.apply import apply
from converter.plan.plan import Plan
from converter.tensors.lazy_tensor import LazyTensor, all_source_tensors, source_tensors


def retarget(
    plan: Plan,
    target: LayoutMapping,
    donor: Plan | None,
    source: str,
    full_model: bool = False,
    partial: bool = False,
) -> Plan:
    """Extend a plan to the canonical layout by the conversion to another layout.

    Args:
        plan: The plan to the canonical layout.
        target: The mapping of the other layout, whose inverse is applied.
        donor: A plan to the canonical layout that supplies missing tensors, or None.
        source: The checkpoint's name, for error messages.
        full_model: Whether to convert tensors outside the encoder too.
        partial: Whether tensors of the target may be missing.

    Raises:
        MappingError: Neither the checkpoint nor the donor has all tensors of the target.
    """
    rules = writing_rules(target, full_model)
    generated = {spec.name.text for spec in plan.target.tensors if spec.generate}
    values = _convertible(rules, plan, donor, generated)
    # All are optional here: an error with the names from `missing_names` is clearer than one with unmatched rules.
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


def _convertible(rules: tuple[Rule, ...], plan: Plan, donor: Plan | None, generated: set[str]) -> dict[str, LazyTensor]:
    """Return the canonical tensors that a rule claims, from the checkpoint or else from the donor."""
    available = {**donor.outputs, **donor.extra_tensors} if donor else {}
    available |= {name: value for name, value in (plan.outputs | plan.extra_tensors).items() if name not in generated}
    unclaimed = set(claim(rules, available).unclaimed) | generated
    return {name: value for name, value in available.items() if name not in unclaimed}


def missing_names(rules: Sequence[Rule], produced: Collection[str]) -> list[str]:
    """Return the names that required rules should have produced, with `*` for a variable of unknown value.

    The number of layers follows from the highest index in the `produced` names.
    """
    templates = [template for rule in rules if not rule.optional for template in rule.targets]
    layers = {head: _count_layers(head, produced) for head in {template.head for template in templates}}
    expected = (name for template in templates for name in _expected_names(template, layers[template.head], produced))
    return list(dict.fromkeys(name for name in expected if name not in produced))


def _count_layers(head: str, names: Collection[str]) -> int:
    """Return the number of layers, one more than the highest index that follows `head`."""
    indices = (name.removeprefix(head).split(".")[0] for name in names if name.startswith(head))
    # A larger index than the number of names does not list more layers: some names are missing anyway.
    return max((min(int(index), len(names)) + 1 for index in indices if index.isdigit()), default=0)


def _expected_names(template: Template, num_layers: int, produced: Collection[str]) -> Iterator[str]:
    """Return the names that a template should produce in a model.

    Args:
        template: The template. With a variable of kind name or path, one produced name is enough.
        num_layers: The number of layers of the model.
        produced: The names that were produced.
    """
    unknown = [field.name for field in template.fields if not field.choices(num_layers)]
    if unknown and any(template.match(name) is not None for name in produced):
        return iter(())
    for name in unknown:
        template = template.bind(name, "*")
    return template.names(num_layers)


def complete_from(plan: Plan, donor: Plan | None) -> Plan:
    """Add the tensors that a plan to the canonical layout lacks from the plan of a donor, if there is one."""
    if donor is None:
        return plan
    taken = {name: donor.outputs[name] for name in plan.missing if name in donor.outputs}
    missing = {name: why for name, why in plan.missing.items() if name not in taken}
    rules = plan.rules | {name: donor.rules[name] for name in taken}
    return replace(plan, outputs=plan.outputs | taken, missing=missing, rules=rules)


def _dropped(plan: Plan, target: LayoutMapping, generated: set[str], outputs: dict[str, LazyTensor]) -> dict[str, str]:
    """Return the reason for each tensor of the checkpoint that is not in the outputs."""
    reasons = dict(plan.dropped)
    outside = [template for rule in target.other_rules for template in rule.targets]
    # By identity: a donor's tensor may have the same name as a dropped one.
    used = {id(tensor) for tensor in all_source_tensors(outputs.values())}
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
    """Return the rules from canonical names to a layout's names, with the first of its prefixes."""
    prefix = target.prefixes[0]
    rules = tuple(rule.prefixed(prefix) for rule in target.rules)
    if full_model:
        rules += tuple(rule._replace(optional=False) for rule in target.other_rules)
    return invert(rules)


def target_names(rules: Iterable[Rule], name: str) -> list[str]:
    """Return the new names that rules give to one tensor."""
    matches = ((rule, source.match(name)) for rule in rules for source in rule.sources)
    return [target.fill(match) for rule, match in matches if match is not None for target in rule.targets]

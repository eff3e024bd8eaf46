"""Routes from one layout to another through the family's canonical layout."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from converter.errors import MappingError
from converter.layouts.claims import claim, first_few
from converter.layouts.spec import LayoutMapping, Rule, invert
from converter.layouts.template import Template, any_match
from converter.plan.apply import apply
from converter.plan.plan import Plan, sort_outputs
from converter.tensors.lazy_tensor import LazyTensor, source_tensors


def retarget(plan: Plan, target: LayoutMapping, fill: Plan | None, full_model: bool, dtype: str, source: str) -> Plan:
    """A plan that leads to the canonical layout, `plan`, made to lead to the layout `target`.

    What the target has and the source lacks is taken from `fill`, another plan to the canonical layout; MappingError
    names what neither gives. Without `full_model`, tensors beside the encoder are left out.
    """
    rules = writing_rules(target, full_model)
    made = {spec.name.text for spec in plan.target.tensors if spec.generate}
    have = {name: value for name, value in {**plan.outputs, **plan.extra_tensors}.items() if name not in made}
    lent = {**fill.outputs, **fill.extra_tensors} if fill else {}
    claimed = claim(rules, {**lent, **have})
    taken = {name for parts in claimed.groups.values() for name in parts.values()} - made
    values = {name: value for name, value in {**lent, **have}.items() if name in taken}
    # What is lacking is told by name below, not by the rule that found nothing to do.
    applied = apply(tuple(rule._replace(optional=True) for rule in rules), values, f"{source}: to {target.name}")
    _check_complete(source, target, missing_names(rules, applied.values))
    return Plan(
        plan.mapping,
        plan.target,
        sort_outputs(applied.values, dtype),
        _dropped(plan, target, made, applied.values),
        sizes=plan.sizes,
        rules=applied.rules,
        layout=target.name,
        canonical_tensors=values,
    )


def missing_names(rules: Sequence[Rule], made: Collection[str]) -> list[str]:
    """The names that `rules` must make and did not; `*` stands for what only a checkpoint could tell.

    There are as many layers as the highest index among `made` says, whatever rule made that name.
    """
    templates = [template for rule in rules if not rule.optional for template in rule.targets]
    layers = _count_layers(templates, made)
    found = (name for template in templates for name in _expected(template, layers, made) if name not in made)
    return list(dict.fromkeys(found))


def _count_layers(templates: Sequence[Template], made: Collection[str]) -> dict[str, int]:
    """By what stands before an index in a name: one more than the highest."""
    heads = {template.head for template in templates if any(field.kind == "int" for field in template.fields)}
    counts: dict[str, int] = {}
    for name in made:
        for start in heads:
            index = name.removeprefix(start).split(".")[0]
            if name.startswith(start) and index.isdigit():
                # One more than there are names is lacking something all the same, however wild the index.
                counts[start] = max(counts.get(start, 0), min(int(index), len(made)) + 1)
    return counts


def _expected(template: Template, layers: dict[str, int], made: Collection[str]) -> Iterator[str]:
    """The names that a template stands for; none where a variable may be anything and something was made."""
    count = layers.get(template.head, 0)
    unknown = [field.name for field in template.fields if not field.choices(count)]
    if unknown and any(template.match(name) is not None for name in made):
        return iter(())
    for name in unknown:
        template = template.bind(name, "*")
    return template.names(count)


def complete_from(plan: Plan, lent: Plan, dtype: str) -> Plan:
    """A plan to the canonical layout with what its source lacks taken from another plan to the canonical layout."""
    taken = {name: lent.outputs[name] for name in plan.missing if name in lent.outputs}
    outputs = sort_outputs({**plan.outputs, **taken}, dtype)
    missing = {name: why for name, why in plan.missing.items() if name not in taken}
    rules = {**plan.rules, **{name: lent.rules[name] for name in taken}}
    return replace(plan, outputs=outputs, missing=missing, rules=rules)


def _dropped(plan: Plan, target: LayoutMapping, made: set[str], outputs: dict[str, LazyTensor]) -> dict[str, str]:
    """Each of the source's tensors that the outputs do not hold, and why."""
    why = dict(plan.dropped)
    beside = [template for rule in target.other_rules for template in rule.targets]
    # Not by name: a tensor that was filled in may have the name of one that was left out.
    used = {id(tensor) for value in outputs.values() for tensor in source_tensors(value)}
    for name, value in {**plan.outputs, **plan.extra_tensors}.items():
        if name in made:
            reason = "made anew by what loads it"
        elif any_match(beside, name):
            reason = "beside the encoder; --full-model takes it along"
        else:
            reason = f"{target.name} has no such tensor"
        for tensor in source_tensors(value):
            if id(tensor) in used:
                why.pop(tensor.key, None)
            else:
                why[tensor.key] = reason
    return why


def _check_complete(source: str, target: LayoutMapping, missing_names: list[str]) -> None:
    if missing_names:
        names = ", ".join(first_few(missing_names))
        raise MappingError(
            f"{source}: {target.name} has tensors that it lacks: {names}",
            "take them from a checkpoint that has them, with --fill-from",
        )


def writing_rules(target: LayoutMapping, full_model: bool) -> tuple[Rule, ...]:
    """The rules from the canonical names to a layout's, under the first of its prefixes."""
    prefix = target.signature.prefixes[0]
    rules = tuple(rule.prefixed(prefix) for rule in target.rules)
    if full_model:
        rules += tuple(rule._replace(optional=False) for rule in target.other_rules)
    return invert(rules)

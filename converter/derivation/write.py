"""Writes derived rules as the YAML text of a mapping file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import groupby
from textwrap import wrap
from typing import Any

import yaml

from converter.derivation.rules import DerivedRule, Variables
from converter.tensors.ops import Deinterleave, Fuse, Op, Permute, Reorder, Reshape, Split, Squeeze, Unsqueeze

_WIDTH = 120


def yaml_text(remark: str, keys: Mapping[str, Any]) -> str:
    """Return the text of a mapping file: a comment, then keys; those without a value are left out."""
    # A file's name may have bytes that are no UTF-8.
    lines = wrap(remark.encode(errors="backslashreplace").decode(), _WIDTH - 2)
    kept = {key: value for key, value in keys.items() if value}
    text = yaml.safe_dump(kept, sort_keys=False, default_flow_style=None, width=_WIDTH)
    text = re.sub("^(?=variables:|prefix:|detect:|rules:|other_rules:|drop_rest:)", "\n", text, flags=re.MULTILINE)
    return "".join(f"# {line}\n" for line in lines) + text


def used_variables(rules: list[DerivedRule], variables: Variables) -> dict[str, str | list[str]]:
    """Return the kinds of those variables that some rule uses."""
    used = set(re.findall(r"\{([a-z_0-9]+)", " ".join(f"{rule.source} {rule.target}" for rule in rules)))
    kinds = sorted(variables.items(), key=lambda item: item[1] != "int")
    return {name: kind if isinstance(kind, str) else list(kind) for name, kind in kinds if name in used}


def rule_items(rules: list[DerivedRule]) -> list[dict[str, Any]]:
    """Return the items of a list of rules: drops last, those with the same reason as one."""
    items = [_rule_item(rule) for rule in rules if rule.target]
    drops = sorted((rule for rule in rules if not rule.target), key=lambda rule: rule.reason)
    for reason, group in groupby(drops, key=lambda rule: rule.reason):
        items.append({"drop": [rule.source for rule in group], "because": reason, "optional": True})
    return items


def _rule_item(rule: DerivedRule) -> dict[str, Any]:
    item: dict[str, Any] = {rule.verb: rule.source, "to" if rule.verb == "rename" else "into": rule.target}
    if rule.verb == "rename" and rule.source == rule.target:
        item = {"keep": rule.source}
    if rule.parts is not None:
        item["parts"] = {rule.parts[0]: list(rule.parts[1])}
    item["dim"] = next((op.dim for op in rule.ops if isinstance(op, Fuse | Split)), 0)
    item["then"] = [_operation(op) for op in rule.ops if not isinstance(op, Fuse | Split)]
    item["optional"] = rule.optional
    return {key: value for key, value in item.items() if value}


def _operation(op: Op) -> dict[str, Any]:
    match op:
        case Squeeze(dims) | Unsqueeze(dims):
            return {type(op).__name__.lower(): list(dims)}
        case Permute(numbers) | Reorder(numbers):
            return {"permute" if isinstance(op, Permute) else "reorder": list(numbers)}
        case Reshape(before, after):
            return {"reshape": {"from": list(before), "to": list(after)}}
        case Deinterleave(heads, parts):
            return {"deinterleave": {"heads": heads, "parts": parts}}
    raise AssertionError(f"{op} is never derived")

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


def yaml_text(header_comment: str, fields: Mapping[str, Any]) -> str:
    """Return the text of a mapping file: a comment, then the fields in order."""
    # A file name may contain bytes that are not UTF-8.
    comment = wrap(header_comment.encode(errors="backslashreplace").decode(), _WIDTH - 2)
    text = yaml.safe_dump(dict(fields), sort_keys=False, default_flow_style=None, width=_WIDTH)
    # Each of these top-level keys starts a section, with a blank line before it.
    text = re.sub("^(?=(?:variables|prefix|detect|rules|other_rules|drop_rest):)", "\n", text, flags=re.MULTILINE)
    return "".join(f"# {line}\n" for line in comment) + text


def used_variables(rules: list[DerivedRule], variables: Variables) -> dict[str, str | list[str]]:
    """Return the variables that any rule uses, with their kinds, integer variables first."""
    used = set(re.findall(r"\{([a-z_0-9]+)", " ".join(f"{rule.source} {rule.target}" for rule in rules)))
    kinds = sorted(variables.items(), key=lambda item: item[1] != "int")
    return {name: kind if isinstance(kind, str) else list(kind) for name, kind in kinds if name in used}


def rule_items(rules: list[DerivedRule]) -> list[dict[str, Any]]:
    """Return the items of a list of rules. Drops come last, one item for each reason."""
    items = [_rule_item(rule) for rule in rules if rule.target]
    drops = sorted((rule for rule in rules if not rule.target), key=lambda rule: rule.reason)
    for reason, group in groupby(drops, key=lambda rule: rule.reason):
        items.append({"drop": [rule.source for rule in group], "because": reason, "optional": True})
    return items


def _rule_item(rule: DerivedRule) -> dict[str, Any]:
    if rule.action == "rename" and rule.source == rule.target:
        item: dict[str, Any] = {"keep": rule.source}
    else:
        item = {rule.action: rule.source, "to" if rule.action == "rename" else "into": rule.target}
    if rule.parts is not None:
        variable, words = rule.parts
        item["parts"] = {variable: list(words)}
    if dim := next((op.dim for op in rule.ops if isinstance(op, Fuse | Split)), 0):
        item["dim"] = dim
    if then := [_operation(op) for op in rule.ops if not isinstance(op, Fuse | Split)]:
        item["then"] = then
    if rule.optional:
        item["optional"] = rule.optional
    return item


def _operation(op: Op) -> dict[str, Any]:
    match op:
        case Squeeze(dims):
            return {"squeeze": list(dims)}
        case Unsqueeze(dims):
            return {"unsqueeze": list(dims)}
        case Permute(dims):
            return {"permute": list(dims)}
        case Reorder(order):
            return {"reorder": list(order)}
        case Reshape(before, after):
            return {"reshape": {"from": list(before), "to": list(after)}}
        case Deinterleave(num_heads, num_parts):
            return {"deinterleave": {"heads": num_heads, "parts": num_parts}}
        case Fuse() | Split():
            raise ValueError(f"{op} is not an operation of `then`")

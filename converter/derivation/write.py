"""Writes derived rules as the YAML text of a mapping file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import astuple
from textwrap import wrap
from typing import Any

import yaml

from converter.derivation.rules import DerivedRule, Variables
from converter.tensors.ops import Deinterleave, Fuse, Op, Reshape, Split

_WIDTH = 120


def yaml_text(header_comment: str, fields: Mapping[str, Any]) -> str:
    """Return the text of a mapping file: a comment, then the fields in order."""
    # A file name may contain bytes that are not UTF-8.
    comment = wrap(header_comment.encode(errors="backslashreplace").decode(), _WIDTH - 2)
    text = yaml.safe_dump(dict(fields), sort_keys=False, default_flow_style=None, width=_WIDTH)
    # Each of these top-level keys starts a section, with a blank line before it.
    text = re.sub("^(?=(?:variables|prefix|detect|rules|other_rules|drop_rest):)", "\n", text, flags=re.MULTILINE)
    return "".join(f"# {line}\n" for line in comment) + text


def used_variables(items: list[dict[str, Any]], variables: Variables) -> dict[str, str | list[str]]:
    """Return the variables that any item of a list of rules uses, with their kinds, integer variables first."""
    used = set(re.findall(r"\{([a-z_0-9]+)", str(items)))
    kinds = sorted(variables.items(), key=lambda item: item[1] != "int")
    return {name: kind if isinstance(kind, str) else list(kind) for name, kind in kinds if name in used}


def rule_item(rule: DerivedRule, prefix: str) -> dict[str, Any]:
    """Return a rule as an item of `rules`, where source names lack the prefix."""
    source = rule.source.removeprefix(prefix)
    if rule.action == "rename" and source == rule.target:
        item: dict[str, Any] = {"keep": source}
    else:
        item = {rule.action: source, "to" if rule.action == "rename" else "into": rule.target}
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


def drop_templates(names: list[str], used: set[str]) -> list[str]:
    """Return templates for names to drop: the largest modules that have no used name, else the names themselves."""
    modules = {module for name in used for module in _modules(name)}
    dropped = (next((f"{m}{{rest}}" for m in _modules(name) if m not in modules), name) for name in names)
    return list(dict.fromkeys(dropped))


def _modules(name: str) -> list[str]:
    """Return the modules that contain a tensor, from the outermost, such as `blocks.` and `blocks.0.`."""
    return [name[: dot.end()] for dot in re.finditer(r"\.", name)]


def _operation(op: Op) -> dict[str, Any]:
    match op:
        case Reshape(before, after):
            return {"reshape": {"from": list(before), "to": list(after)}}
        case Deinterleave(num_heads, num_parts):
            return {"deinterleave": {"heads": num_heads, "parts": num_parts}}
    # The others have their key in lower case, and one list.
    return {type(op).__name__.lower(): list(astuple(op)[0])}

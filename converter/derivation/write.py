"""Rules as the YAML of a mapping file, in the order and the style of those that ship."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from textwrap import wrap
from typing import NamedTuple

from converter.derivation.generalise import Entry, Variables, fields_of
from converter.layouts.shapes import Shape, written
from converter.layouts.template import Kind
from converter.tensors.ops import Deinterleave, Fuse, Op, Permuted, Reshaped, Split, Squeeze, Unsqueeze

_WIDTH = 120


class Draft(NamedTuple):
    """A mapping file to be: what it begins with, the rules under the prefix and beside it, and why others are left."""

    remark: str
    layout: str
    family: str
    description: str
    prefix: str
    recognise: Mapping[str, Shape]
    rules: list[Entry]
    other_rules: list[Entry]
    drop_rest: str


def yaml_text(draft: Draft, variables: Variables) -> str:
    """The text of a mapping file."""
    lines = [f"# {line}" for line in wrap(_text(draft.remark), _WIDTH - 2, break_on_hyphens=False)]
    lines += [f"layout: {_plain(_text(draft.layout))}", f"family: {draft.family}"]
    lines += [f"description: {_plain(_text(draft.description))}", ""]
    used = {
        field for entry in (*draft.rules, *draft.other_rules) for field in fields_of(f"{entry.source} {entry.target}")
    }
    if used:
        kinds = {name: kind for name, kind in variables.kinds.items() if name in used}
        # Indices, words, then what spans dots.
        order = sorted(kinds, key=lambda name: (kinds[name] == "path", kinds[name] != "int", name == "param"))
        lines += ["variables:", *(f"  {name}: {_kind(kinds[name])}" for name in order), ""]
    if draft.prefix:
        lines.append(f"prefix: {_plain(draft.prefix)}")
    lines.append("detect:")
    lines += [f"  {_plain(name)}: {written(shape)}" for name, shape in draft.recognise.items()]
    lines += ["", "rules:", *_rules(draft.rules)]
    if draft.other_rules:
        lines += ["", "other_rules:", *_rules(draft.other_rules)]
    if draft.drop_rest:
        lines += ["", f"drop_rest: {_plain(draft.drop_rest)}"]
    return "\n".join(lines) + "\n"


def _kind(kind: Kind) -> str:
    return kind if isinstance(kind, str) else f"[{', '.join(_flow(word) for word in kind)}]"


def _rules(entries: list[Entry]) -> list[str]:
    """The rules, each with its remarks before it; drops as one for each reason."""
    lines, told = [], frozenset[str]()
    for entry in (entry for entry in entries if entry.verb != "drop"):
        if entry.notes != told:
            lines += [f"  # {note}" for note in sorted(entry.notes)]
        told = entry.notes
        lines += _rule(entry)
    drops = [entry for entry in entries if entry.verb == "drop"]
    for reason in dict.fromkeys(entry.reason for entry in drops):
        lines += _dropped([entry.source for entry in drops if entry.reason == reason], reason)
    return lines


def _dropped(names: list[str], reason: str) -> list[str]:
    one_line = f"  - drop: [{', '.join(map(_flow, names))}]"
    if len(names) == 1:
        lines = [f"  - drop: {_plain(names[0])}"]
    elif len(one_line) <= _WIDTH:
        lines = [one_line]
    else:
        lines = ["  - drop:", *(f"      - {_plain(name)}" for name in names)]
    return [*lines, f"    because: {_plain(reason)}", "    optional: true"]


def _rule(entry: Entry) -> list[str]:
    fields = _keys(entry)
    one_line = f"  - {{{', '.join(f'{key}: {_flow(value)}' for key, value in fields)}}}"
    simple = entry.verb == "rename" and not entry.ops and len(fields) > 1
    if simple and len(one_line) <= _WIDTH:
        return [one_line]
    first, *rest = (f"{key}: {_plain(value)}" for key, value in fields)
    if entry.parts is not None:
        rest.insert(0, f"parts: {{{entry.parts[0]}: [{', '.join(map(_flow, entry.parts[1]))}]}}")
    return [f"  - {first}", *(f"    {line}" for line in rest), *_operations(entry)]


def _keys(entry: Entry) -> list[tuple[str, str]]:
    """The keys of a rule whose values are names or flags."""
    optional = [("optional", entry.optional)] if entry.optional else []
    if entry.verb != "rename":
        return [(entry.verb, entry.source), ("into", entry.target), *optional]
    if entry.source == entry.target:
        return [("keep", entry.source), *optional]
    return [("rename", entry.source), ("to", entry.target), *optional]


def _operations(entry: Entry) -> list[str]:
    """The keys of a rule that say what is done to its tensors."""
    lines, then = [], []
    for op in entry.ops:
        if not isinstance(op, Fuse | Split):
            then.append(_operation(op))
        elif op.dim:
            lines.append(f"    dim: {op.dim}")
    return [*lines, f"    then: [{', '.join(then)}]"] if then else lines


def _operation(op: Op) -> str:
    match op:
        case Squeeze(dims) | Unsqueeze(dims):
            verb = "squeeze" if isinstance(op, Squeeze) else "unsqueeze"
            return f"{verb}: {dims[0] if len(dims) == 1 else list(dims)}"
        case Permuted(dims):
            return f"permute: {list(dims)}"
        case Reshaped(before, after):
            return f"reshape: {{from: {list(before)}, to: {list(after)}}}"
        case Deinterleave(heads, parts):
            return f"deinterleave: {{heads: {heads}, parts: {parts}}}"
    raise AssertionError(f"{op} is never derived")


def _text(text: str) -> str:
    """What YAML can hold of a text with a file's name in it, whose bytes may be no UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def _plain(text: str) -> str:
    """A scalar on a line of its own, quoted where YAML would read something else."""
    plain = text.isprintable() and re.match("[A-Za-z0-9_./]", text) and not text.endswith((" ", ":"))
    return text if plain and ": " not in text and " #" not in text else json.dumps(text)


def _flow(text: str) -> str:
    """A scalar within brackets."""
    return text if re.fullmatch("[A-Za-z_][A-Za-z0-9_.]*", text) else json.dumps(text)

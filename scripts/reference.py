#!/usr/bin/env python3
"""Writes docs/rules.md, the reference of mapping files, from the parser's tables and the sentences beside the schema.

What a rule or an operation makes of a tensor, and its inverse, are not told but computed here.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from textwrap import wrap
from typing import Any, cast

import yaml

from converter.layouts import claims, parse, registry, schema, template, yaml_tree
from converter.layouts.spec import LayoutMapping, Rule
from converter.layouts.template import Kind, Template
from converter.plan.apply import apply
from converter.storage.byte_range import Storage
from converter.storage.local_file import SourceFile
from converter.tensors import ops
from converter.tensors.dtypes import FLOAT32
from converter.tensors.lazy_tensor import LazyTensor, byte_ranges, lazy_read
from converter.tensors.tensor_info import TensorInfo, contiguous_strides

PAGE = Path(__file__).resolve().parent.parent / "docs" / "rules.md"

# What the verbs' examples are tried on: a layer's matrix, or for a name without a layer a vector.
MATRIX, VECTOR = (1024, 1024), (1024,)
DECLARED = "{layer: int, proj: [q, k, v], half: [k, v], param: [weight, bias]}"

# Variables and templates that show what the kinds are for, and names that they are tried on.
KINDS: dict[str, Kind] = {"layer": "int", "module": "name", "rest": "path", "proj": ("q", "k", "v")}
TRIED = (
    ("layers.{layer}.norm.weight", "layers.11.norm.weight"),
    ("layers.{layer}.norm.weight", "layers.011.norm.weight"),
    ("layers.{layer+1}.norm.weight", "layers.12.norm.weight"),
    ("attn.{module}.weight", "attn.out_proj.weight"),
    ("attn.{module}.weight", "attn.out.proj.weight"),
    ("text_model.{rest}", "text_model.encoder.layers.0.mlp.fc1.bias"),
    ("self_attn.{proj}_proj.weight", "self_attn.k_proj.weight"),
    ("self_attn.{proj}_proj.weight", "self_attn.out_proj.weight"),
)
# Keys of every verb, which have a section of their own.
ELSEWHERE = {
    "then": "[operations](#operations), one after another, on what the verb makes.",
    "optional": "whether the rule [may match nothing](#tensors-that-may-be-absent).",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=PAGE, help="default %(default)s")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the file is another")
    args = parser.parse_args()
    text = document()
    if args.check:
        same = args.out.is_file() and args.out.read_text(encoding="utf-8") == text
        print(f"{args.out}: {'current' if same else 'out of date: run scripts/reference.py'}")
        return 0 if same else 1
    args.out.write_text(text, encoding="utf-8")
    print(args.out)
    return 0


def document() -> str:
    """The whole page."""
    parts = [
        _beginning(),
        _keys_of_a_file(),
        _names(),
        _prefixes(),
        _shapes(),
        _verbs(),
        _operations(),
        _optional(),
        _refusals(),
        _hubs(),
        _bounds(),
    ]
    return "\n".join(itertools.chain.from_iterable([*part, ""] for part in parts)).rstrip() + "\n"


def _beginning() -> Iterator[str]:
    yield "# The rules of a mapping"
    yield ""
    yield from _prose(
        "A mapping is a YAML file that says how one layout becomes the canonical layout of its family, which is the"
        " DeepEncoder's own. This page describes every key of it. It is written by `scripts/reference.py` from the"
        " tables that the parser reads by; shapes, matches and inverses on it were computed by the program. [The"
        " tutorial](tutorial.md) writes a mapping from beginning to end; `dsocr-convert mapping show clip-hf` prints"
        " one that ships."
    )
    yield ""
    yield "This is all of `sam-meta`:"
    yield ""
    yield from _fence("yaml", registry.text("sam-meta"))
    yield ""
    yield from _prose(
        "Rules are no program. They are applied all at once, each to the checkpoint's own names, and their order does"
        " not matter. Every tensor of the checkpoint is claimed by exactly one rule, and every canonical tensor"
        " is made exactly once. The same file is read in both directions: forwards when the layout is converted, and"
        " backwards when it is written with `--to`."
    )
    yield ""
    yield "## In an editor"
    yield ""
    yield from _prose(
        "[mapping.schema.json](mapping.schema.json) is a JSON Schema (2020-12) of these files, with what is said here"
        " of every key. `dsocr-convert mapping schema > mapping.schema.json` writes the one of the version you have. An"
        " editor with the YAML language server completes and checks a file that begins with one line:"
    )
    yield ""
    yield from _fence("yaml", f"{schema.COMMENT}mapping.schema.json")
    yield ""
    yield from _prose(
        "The schema sees each place by itself. `dsocr-convert mapping check FILE.yaml` sees all of the file, and"
        " `mapping check FILE.yaml SOURCE` what it makes of a checkpoint."
    )


def _keys_of_a_file() -> Iterator[str]:
    yield "## Keys of a file"
    yield ""
    needed = (*parse.NEEDED, "rules")
    yield from _table(
        ("key", "", "meaning"),
        ((f"`{key}`", "needed" if key in needed else "", schema.FILE[key].text) for key in parse.MAPPING),
    )
    yield ""
    yield from _prose(
        "Any other key is an error that names the line. A value is read as it is written: `1` in a list of words is the"
        " word 1. An empty text is written in quotes. Tags, anchors and aliases of YAML are refused."
    )


def _names() -> Iterator[str]:
    yield "## Names and variables"
    yield ""
    yield from _prose(
        "A name in a rule is a template. It matches a whole name or does not match it; there are no regular"
        " expressions, so that what was matched can be filled into another template, and back, exactly. `variables`"
        " says what each `{variable}` stands for:"
    )
    yield ""
    yield "- `int`: a number such as a layer's, without leading zeros. `{layer+1}` is 1 where the layer is 0."
    yield "- `name`: text without dots, one segment of a name."
    yield "- `path`: any text, dots included. A template has one of them at most."
    yield "- a list of words, such as `[q, k, v]`: one of these."
    yield ""
    yield f"With `variables: {_flow({name: list(k) if isinstance(k, tuple) else k for name, k in KINDS.items()})}`:"
    yield ""
    yield from _table(("template", "name", "what the variable is"), (_tried(*pair) for pair in TRIED))
    yield ""
    yield from _prose(
        "What could be read in two ways cannot be written. Two variables have a letter or a dot between them. A segment"
        " that holds a `name` or a `path` holds no other variable. No variable stands twice in a template, and both"
        " sides of a rule use the same ones."
    )


def _tried(text: str, name: str) -> tuple[str, str, str]:
    found = Template.parse(text, KINDS).match(name)
    outcome = "no match" if found is None else ", ".join(f"`{key}` is `{value}`" for key, value in found.items())
    return f"`{text}`", f"`{name}`", outcome


def _prefixes() -> Iterator[str]:
    yield "## Prefixes, and what lies beside"
    yield ""
    for key in ("prefix", "other_rules", "drop_rest"):
        yield from _said(key, schema.FILE[key])
    yield from _prose(
        "What torch.compile, DistributedDataParallel and FSDP put into names is taken off before. Then the names are"
        " tried as they are, and without the segments that all of them begin with. So a mapping names no wrapping that"
        " every tensor has."
    )


def _shapes() -> Iterator[str]:
    yield "## How a layout is recognised"
    yield ""
    yield from _said("detect", schema.FILE["detect"])
    yield from _prose(
        "A shape is a list of dimensions. A dimension is a number, a name such as `width`, a multiple of one such as"
        " `3*width`, or `_` for any size. A name stands for one size throughout the layout; it is what the tensors"
        " give, and it is how depth, width and patch need not be told. Choose names that no other layout has, from both"
        " ends of the model: a checkpoint that fits two layouts is refused until `--mapping` says which is meant."
    )


def _verbs() -> Iterator[str]:
    yield "## Verbs"
    yield ""
    yield f"A rule has one verb: {_listed(parse.VERBS, 'or')}. Its other keys depend on the verb."
    for verb in parse.VERBS:
        yield ""
        yield from _verb(verb)


def _verb(verb: str) -> Iterator[str]:
    said, (required, spare) = schema.VERBS[verb], parse.VERBS[verb]
    yield f"### {verb}"
    yield ""
    yield from _prose(said.text)
    yield ""
    yield from _fence("yaml", "- " + said.example.replace("\n", "\n  "))
    yield ""
    rules = _parsed(said.example)
    yield from _fence("text", "\n".join(row for rule in rules for row in _shown(rule)))
    yield ""
    yield from _prose(_backwards(rules[0]))
    yield ""
    for key in (*required, *spare, "optional"):
        needed = " (needed)" if key in required else ""
        yield from _prose(f"`{key}`{needed}: {ELSEWHERE.get(key, schema.KEYS[key].text)}", "- ", "  ")


def _parsed(example: str) -> tuple[Rule, ...]:
    item = example.replace("\n", "\n    ")
    head = "layout: x\nfamily: clip\ndescription: x\ndetect: {x: [_]}\n"
    mapping = parse.parse_mapping(f"{head}variables: {DECLARED}\nrules:\n  - {item}\n", "example")
    assert isinstance(mapping, LayoutMapping)
    return mapping.rules


def _shown(rule: Rule) -> list[str]:
    """The names that a rule claims, with shapes, and what they become."""
    names = [source.fill(_filling(source)) for source in rule.sources]
    shape = MATRIX if len(names) > 1 or len(rule.targets) > 1 else VECTOR
    if len(rule.targets) > 1:
        shape = (shape[0] * len(rule.targets), *shape[1:])
    tensors = {name: _tensor(name, shape) for name in names}
    made = apply((rule,), tensors, "example").values
    if not rule.targets:
        return [f"{name:12}  {list(value.shape)}  -> dropped" for name, value in tensors.items()]
    width = max(map(len, [*tensors, *(f"-> {name}" for name in made)]))
    rows = [f"{name:{width}}  {list(value.shape)}" for name, value in tensors.items()]
    rows += [f"{f'-> {name}':{width}}  {list(value.shape)}" for name, value in made.items()]
    return rows


def _filling(source: Template) -> dict[str, str]:
    """For every variable its first word, for a number 0."""
    return {field.name: field.kind[0] if isinstance(field.kind, tuple) else "0" for field in source.fields}


def _backwards(rule: Rule) -> str:
    if not rule.targets:
        return "Backwards there is nothing to do: what was dropped does not come back. `--fill-from` can bring it."
    back = rule.inverse()
    if back == rule:
        return "Backwards it is the same rule."
    kind = next((type(op).__name__.lower() for op in back.ops), "")
    if kind:
        article = "a split" if kind == "split" else "a fuse"
        return (
            f"Backwards it is {article}, which undoes it. Along the rows, parts are bytes to copy; along another"
            " `dim`, torch puts them together."
        )
    return f"Backwards, names change places: `{back.text}`."


def _operations() -> Iterator[str]:
    yield "## Operations"
    yield ""
    yield from _prose(
        f"`then` lists what is done to each tensor that the verb makes: {_listed(parse.OPS)}. Backwards, the inverses"
        " are done in the reverse order. By an operation that has no inverse a layout"
        " can be read and not written: `mapping check` points it out, and no mapping that ships has one."
    )
    for name in parse.OPS:
        yield ""
        yield from _operation(name)


def _operation(name: str) -> Iterator[str]:
    shown = schema.OPS[name]
    text = f"{name}: {_flow(shown.argument)}"
    op = parse.OPS[name](yaml_tree.parse(_flow(shown.argument), "example"))
    yield f"### {name}"
    yield ""
    yield from _prose(shown.text)
    yield ""
    rows = []
    for shape in shown.shapes:
        (value,) = ops.apply_op(op, (_tensor("x", shape),))
        cost = "computed with torch" if byte_ranges(value) is None else "bytes are copied"
        before, after = _described(_tensor("x", shape)), _described(value)
        rows.append((f"`then: [{text}]`", before, after, cost, _inverse(op)))
    yield from _table(("example", "a tensor", "becomes", "cost", "inverse"), rows)


def _described(value: LazyTensor) -> str:
    return f"{value.dtype.name} `{list(value.shape)}`"


def _inverse(op: ops.Op) -> str:
    why = ops.lossy_reason(op)
    return f"none: {why}" if why else f"`{_written(op.inverse())}`"


def _written(op: ops.Op) -> str:
    """An operation as a mapping file has it."""
    names = {type(_op(name)): name for name in parse.OPS}
    fields: dict[str, Any] = op._asdict()
    match op:
        case ops.Reshaped(before, after):
            argument: Any = {"from": list(before), "to": list(after)}
        case ops.Deinterleave():
            argument = fields
        case _:
            (argument,) = fields.values()
            argument = list(argument) if isinstance(argument, tuple) else argument
            argument = argument[0] if isinstance(argument, list) and len(argument) == 1 else argument
    return f"{names[type(op)]}: {_flow(argument)}"


def _op(name: str) -> ops.Op:
    return parse.OPS[name](yaml_tree.parse(_flow(schema.OPS[name].argument), "example"))


def _optional() -> Iterator[str]:
    yield "## Tensors that may be absent"
    yield ""
    yield from _prose(
        "A rule that matches nothing is an error: a checkpoint that lacks part of its layout is damaged, or of another"
        " one. `optional: true` allows it. `optional: on_read` allows it when the layout is read; when it is written,"
        " the tensor has to be there, from the source or from `--fill-from`, because what reads such files wants it. A"
        " fuse of which a part is missing is an error in any case."
    )


def _refusals() -> Iterator[str]:
    yield "## What is checked"
    yield ""
    yield "Before a byte is written, with file, line and name:"
    yield ""
    yield "- a tensor that no rule claims, or that two claim;"
    yield "- a rule that matches nothing and is not optional;"
    yield "- a part missing beside the others of a fuse, or parts of different shapes or types;"
    yield "- an operation that does not fit the tensor's shape;"
    yield "- a name that the canonical layout does not have, that is made twice, or that nothing makes;"
    yield "- a shape or an element type that is not the canonical layout's."
    yield ""
    yield from _prose(
        "What no shape shows is not checked here: two square matrices exchanged fit as well as the right ones."
        " [Verification](verification.md) is for that."
    )


def _hubs() -> Iterator[str]:
    yield "## Canonical layouts"
    yield ""
    yield from _prose(
        "`deepencoder-sam` and `deepencoder-clip` are files of another kind: they list the tensors that mappings lead"
        " to. You will read them, with `mapping show`, to know the names a rule may give. A `--mapping` of this kind is"
        " refused. Their keys beside those that every file begins with:"
    )
    yield ""
    own = [key for key in parse.CANONICAL if key not in parse.MAPPING]
    yield from _table(("key", "meaning"), ((f"`{key}`", schema.FILE[key].text) for key in own))
    yield ""
    yield "Of one tensor, where its shape is not all there is to say:"
    yield ""
    yield from _table(("key", "meaning"), ((f"`{key}`", schema.TENSOR[key].text) for key in parse.TENSOR))


def _bounds() -> Iterator[str]:
    yield "## Bounds"
    yield ""
    yield from _prose("A mapping may come from a stranger, so there is an end to everything:")
    yield ""
    rows = (
        ("characters of a file", yaml_tree.LARGEST),
        ("levels of it", yaml_tree._DEEPEST),
        ("rules, each name of a drop being one", parse._MOST_RULES),
        ("characters of a template, and of a name that one matches", template.LONGEST_NAME),
        ("characters of one word of a variable", template.LONGEST_WORD),
        ("combinations of words in one segment", template._MOST_READINGS),
        ("numbers in a shape or a permutation", yaml_tree._MOST_DIMENSIONS),
        ("positions along a side after `resample`", ops.LARGEST_GRID),
        ("templates times names", claims._MOST_COMPARED),
    )
    yield from _table(("at most", "of what"), ((f"{bound:,}", what) for what, bound in rows))
    yield ""
    yield "[Security](security.md) has the bounds of everything else."


# Markdown -------------------------------------------------------------------------------------------------------------


def _prose(text: str, first: str = "", further: str = "") -> list[str]:
    return wrap(
        text, 120, initial_indent=first, subsequent_indent=further, break_long_words=False, break_on_hyphens=False
    )


def _said(key: str, said: schema.Said) -> Iterator[str]:
    yield from _prose(f"`{key}`: {said.text}")
    yield ""
    if said.example:
        yield from _fence("yaml", said.example)
        yield ""


def _fence(language: str, text: str) -> list[str]:
    return [f"```{language}", *text.rstrip().split("\n"), "```"]


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def _listed(names: Iterable[str], word: str = "and") -> str:
    *most, last = (f"`{name}`" for name in names)
    return f"{', '.join(most)} {word} {last}"


def _flow(value: object) -> str:
    """A value as YAML writes it on one line."""
    written: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf)
    return written.removesuffix("...\n").strip()


def _tensor(name: str, shape: tuple[int, ...]) -> LazyTensor:
    """A tensor of float32 that lies in a file as it is; nothing reads it."""
    size = math.prod(shape) * FLOAT32.itemsize
    storage = Storage(cast(SourceFile, None), (0, size), size, size, name)
    return lazy_read(TensorInfo(name, FLOAT32, shape, storage, 0, contiguous_strides(shape)))


if __name__ == "__main__":
    raise SystemExit(main())

"""Mapping files described to editors: a JSON Schema made from the tables that the parser reads by.

What keys there are is the parser's; what they mean, the form of their values and an example stand beside them here, and
a key that has no sentence is an error. The schema says what one place can say of itself. It refuses nothing that the
parser takes, except values written oddly (numbers and flags in quotes, `null` for a word); what takes two places to see
(a variable that is not declared, a part left out) the parser alone refuses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from converter.layouts import parse, shapes, template, yaml_tree
from converter.tensors.dtypes import BY_NAME

Schema = dict[str, Any]


class Said(NamedTuple):
    """What a reader is told of a key: its meaning, the form of its value, and an example in YAML if it needs one."""

    text: str
    form: Schema
    example: str = ""


class Shown(NamedTuple):
    """What a reader is told of an operation: what it does, its argument's form, and one that is tried on a shape."""

    text: str
    form: Schema
    argument: object
    shapes: tuple[tuple[int, ...], ...]


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _list(item: Schema, **more: object) -> Schema:
    return {"type": "array", "items": item, **more}


def _record(properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _either(*forms: Schema) -> Schema:
    return {"anyOf": list(forms)}


# YAML makes a number of a word such as 1; the parser reads it as it is written.
_SCALAR = {"type": ["string", "number", "boolean"]}
_NUMBER = {"type": "integer", "minimum": 0, "maximum": 999_999_999}
_POSITIVE = {**_NUMBER, "minimum": 1}
_NUMBERS = _either(_NUMBER, _list(_NUMBER, maxItems=yaml_tree._MOST_DIMENSIONS))
_DIMS = _either(_NUMBER, _list(_NUMBER, minItems=1, maxItems=yaml_tree._MOST_DIMENSIONS, uniqueItems=True))
_ORDER = _list(_NUMBER, minItems=2, maxItems=yaml_tree._MOST_DIMENSIONS, uniqueItems=True)
_REASON = {**_SCALAR, "pattern": r"\S"}

_FORMS: dict[str, Schema] = {
    "line": {**_SCALAR, "description": "Words for people; line breaks among them do not matter."},
    "reason": {**_REASON, "description": "A reason in words, which the command line prints."},
    "word": {**_SCALAR, "pattern": r"^[^.]+$", "maxLength": template.LONGEST_WORD},
    "template": {
        "type": ["string", "integer"],
        "pattern": rf"^(?:[^{{}}]|{template._FIELD.pattern})*$",
        "maxLength": template.LONGEST_NAME,
        "description": "A tensor's whole name, with {variables} for what varies.",
    },
    "kind": {
        **_either({"enum": list(parse.KINDS)}, _list(_ref("word"), minItems=1, uniqueItems=True)),
        "description": "int: a number such as a layer's. name: text without dots. path: any text. Or a list of words.",
    },
    "dim": _either(
        {"type": "integer", "minimum": 1, "maximum": 999_999_999_999},
        {"type": "string", "pattern": rf"^(?:_|[1-9][0-9]{{0,11}}|{shapes._DIM.pattern})$"},
    ),
    "shape": {**_list(_ref("dim")), "description": "Sizes: 768, width, 3*width, or _ for any."},
}

# What a file begins with, whatever it describes, and then what a mapping and a canonical layout have of their own.
FILE: dict[str, Said] = {
    "layout": Said("The layout's name, by which `--to` and the messages call it.", _ref("line")),
    "family": Said(
        "Which encoder it is: the mapping leads to that family's canonical layout.", {"enum": [*parse.FAMILIES]}
    ),
    "description": Said("One line on what the layout is, as `mapping list` prints it.", _ref("line")),
    "variables": Said(
        "What the variables in names stand for.",
        {"type": "object", "additionalProperties": _ref("kind")},
        "variables: {layer: int, proj: [q, k, v], rest: path}",
    ),
    "detect": Said(
        "Some names, without prefix, and their shapes, by which the layout is known. A checkpoint that has them all, in"
        " sizes that agree, is of this layout; its files' names play no part.",
        {"type": "object", "additionalProperties": _ref("shape"), "minProperties": 1},
        "detect: {class_embedding: [width], conv1.weight: [width, 3, patch, patch]}",
    ),
    "prefix": Said(
        'The prefix of the encoder\'s names, or several of which the first that fits is taken; `""` is none.'
        " `detect` and `rules` speak of names without it.",
        _either(_SCALAR, _list(_SCALAR, minItems=1)),
        'prefix: [vision_model., ""]',
    ),
    "rules": Said("What becomes of the tensors under the prefix, one rule or more for each.", _list(_ref("rule"))),
    "other_rules": Said(
        "Rules for the names that lack the prefix. Without `other_rules` and `drop_rest` there may be no such names.",
        _list(_ref("rule")),
    ),
    "drop_rest": Said(
        "Why every name that lacks the prefix is dropped: what else the checkpoint holds.",
        _ref("reason"),
        "drop_rest: not part of CLIP (language model, projector)",
    ),
    "sizes": Said(
        "The sizes that DeepSeek-OCR has, by the names that shapes use. Others convert too, with a line that says so.",
        {"type": "object", "additionalProperties": _NUMBER},
        "sizes: {depth: 24, width: 1024}",
    ),
    "tensors": Said(
        "Every tensor of the layout: its name, and its shape or its shape and more.",
        {
            "type": "object",
            "propertyNames": _ref("template"),
            "additionalProperties": _either(_ref("shape"), _ref("tensor")),
        },
        "tensors: {'pre_layrnorm.{param}': [width]}",
    ),
    "extra_tensors": Said(
        "Names that other layouts of the family have, the DeepEncoder not, and why it has not.",
        {"type": "object", "propertyNames": _ref("template"), "additionalProperties": _ref("line")},
    ),
}

TENSOR: dict[str, Said] = {
    "shape": Said("The tensor's shape.", _ref("shape")),
    "dtype": Said("Its element type, where that is not the checkpoint's choice.", {"enum": [*BY_NAME]}),
    "optional": Said("Why it may be missing.", _ref("line")),
    "generate": Said("How it is made where the source has none: counted from 0, as int64.", {"const": "arange"}),
    "positions": Said("Whether it is the table of positions that `--image-size` resamples.", {"type": "boolean"}),
}

VERBS: dict[str, Said] = {
    "keep": Said(
        "Takes tensors under the names that they have.", _ref("template"), "keep: embeddings.position_embedding.weight"
    ),
    "rename": Said(
        "Gives tensors the names that `to` says. Both names use the same variables.",
        _ref("template"),
        "rename: ln_pre.{param}\nto: pre_layrnorm.{param}",
    ),
    "fuse": Said(
        "Makes one tensor of several of the same shape, one after another in the order of `parts`.",
        _ref("template"),
        "fuse: encoder.layers.{layer}.self_attn.{proj}_proj.{param}\nparts: {proj: [q, k, v]}\n"
        "into: transformer.layers.{layer}.self_attn.qkv_proj.{param}",
    ),
    "split": Said(
        "Cuts one tensor into equal parts, which are named in the order of `parts`.",
        _ref("template"),
        "split: layers.{layer}.kv.{param}\nparts: {half: [k, v]}\ninto: layers.{layer}.{half}_proj.{param}",
    ),
    "drop": Said(
        "Leaves tensors out. `because` says why, and the reason is told whenever it is done.",
        _either(_ref("template"), _list(_ref("template"))),
        "drop: [logit_scale, logit_bias]\nbecause: numbers of the loss, which no encoder needs",
    ),
}

# The keys of a rule beside its verb.
KEYS: dict[str, Said] = {
    "to": Said("The name in the canonical layout.", _ref("template")),
    "into": Said(
        "The name in the canonical layout; of a split it has the variable that `parts` orders.", _ref("template")
    ),
    "parts": Said(
        "The variable that tells the parts apart, and all its words in the order in which they lie.",
        {
            "type": "object",
            "additionalProperties": _list(_ref("word"), minItems=2, uniqueItems=True),
            "minProperties": 1,
            "maxProperties": 1,
        },
    ),
    "dim": Said("The dimension along which parts lie one after another; 0, the rows, unless it is given.", _NUMBER),
    "then": Said("Operations, one after another, on what the verb makes.", _list(_ref("operation"))),
    "because": Said("Why the tensors are dropped.", _ref("reason")),
    "optional": Said(
        "Whether the rule may match nothing. `on_read`: when the layout is read; when it is written, the tensor must be"
        " there, because what reads such files wants it.",
        {"enum": [True, False, "on_read"]},
    ),
}

OPS: dict[str, Shown] = {
    "squeeze": Shown("Removes dimensions of one element, numbered as they were.", _DIMS, [0, 1], ((1, 1, 1024),)),
    "unsqueeze": Shown("Inserts dimensions of one element, numbered as they will be.", _DIMS, 0, ((577, 1024),)),
    "reshape": Shown(
        "Reads the same elements, in the same order, under another shape. Both are given in numbers, so it is for"
        " checkpoints of one size.",
        _record({"from": _NUMBERS, "to": _NUMBERS}),
        {"from": [768, 768], "to": [768, 3, 16, 16]},
        ((768, 768),),
    ),
    "permute": Shown(
        "Puts dimensions in another order: dimension i of the result is dimension number i of the list. `[1, 0]`"
        " transposes a matrix.",
        _NUMBERS,
        [1, 0],
        ((1024, 4096),),
    ),
    "deinterleave": Shown(
        "Brings rows that lie head by head (q0 k0 v0 q1 k1 v1 ...) into the order part by part (q0 q1 ... k0 k1 ..."
        " v0 v1 ...). The first dimension holds heads x parts x head width rows.",
        _record({"heads": _POSITIVE, "parts": _POSITIVE}),
        {"heads": 16, "parts": 3},
        ((3072, 1024),),
    ),
    "reorder": Shown(
        "Cuts the rows into as many equal parts as the list has numbers and puts them in another order: part i of the"
        " result is part number i of the list.",
        _ORDER,
        [2, 0, 1],
        ((3072, 1024),),
    ),
    "cast": Shown(
        "Rounds a floating-point tensor to another element type.",
        {"enum": [name for name, dtype in BY_NAME.items() if dtype.is_float]},
        "bfloat16",
        ((1024, 1024),),
    ),
    "resample": Shown(
        "Resamples a table of a class token and a square grid of positions to another side of the grid, bicubic and"
        " antialiased; the class token is kept.",
        _POSITIVE,
        24,
        ((257, 1024),),
    ),
}

COMMENT = "# yaml-language-server: $schema="


def schema() -> Schema:
    """The JSON Schema (2020-12) of mapping files and canonical layouts."""
    mapping = _object(FILE, parse.MAPPING, (*parse.NEEDED, "rules"))
    mapping["dependentRequired"] = {"other_rules": ["prefix"], "drop_rest": ["prefix"]}
    mapping["not"] = {"required": ["other_rules", "drop_rest"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A mapping file of dsocr-convert",
        "description": "How one layout of SAM or CLIP becomes the canonical layout of its family.",
        "type": "object",
        # As the parser tells them apart.
        "if": {"required": ["tensors"]},
        "then": _ref("canonical"),
        "else": _ref("mapping"),
        "$defs": {
            **_FORMS,
            "mapping": mapping,
            "canonical": _object(FILE, parse.CANONICAL, (*parse.NEEDED, "sizes")),
            "tensor": _object(TENSOR, parse.TENSOR, ("shape",)),
            "rule": {"anyOf": [_ref(verb) for verb in parse.VERBS]},
            **{verb: _rule(verb) for verb in parse.VERBS},
            "operation": {
                **_properties({name: Said(op.text, op.form) for name, op in OPS.items()}, parse.OPS),
                "minProperties": 1,
                "maxProperties": 1,
            },
        },
    }


def _rule(verb: str) -> Schema:
    needed, spare = parse.VERBS[verb]
    keys = (verb, *needed, *spare, "optional")
    return {"description": VERBS[verb].text, **_object({**KEYS, verb: VERBS[verb]}, keys, (verb, *needed))}


def _object(said: Mapping[str, Said], keys: Iterable[str], needed: Iterable[str]) -> Schema:
    return {**_properties(said, keys), "required": list(needed)}


def _properties(said: Mapping[str, Said], keys: Iterable[str]) -> Schema:
    properties = {key: {**said[key].form, "description": said[key].text} for key in keys}
    return {"type": "object", "properties": properties, "additionalProperties": False}

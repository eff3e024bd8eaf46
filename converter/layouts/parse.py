"""Parses mapping files into layout specifications: which keys the YAML may have and what their values must be."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from converter.layouts.shapes import Shape, parse_dim
from converter.layouts.spec import CanonicalLayout, LayoutMapping, LayoutSpec, Rule, TensorSpec
from converter.layouts.template import MAX_WORD_CHARS, Kind, Template
from converter.layouts.yaml_tree import MAX_FILE_CHARS, YamlNode, parse
from converter.tensors.dtypes import BY_NAME
from converter.tensors.lazy_tensor import POSITIONS
from converter.tensors.ops import Deinterleave, Fuse, Op, Permute, Reorder, Reshape, Split, Squeeze, Unsqueeze

REQUIRED_KEYS = ("layout", "family", "description", "detect")
TENSOR_KEYS = ("shape", "dtype", "optional", "generate", "positions")
VARIABLE_KINDS = ("int", "name", "path")
# Required and optional keys of a rule, by its action. All rules may have `optional`.
ACTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "keep": ((), ("then",)),
    "rename": (("to",), ("then",)),
    "fuse": (("parts", "into"), ("dim", "then")),
    "split": (("parts", "into"), ("dim", "then")),
    "drop": (("because",), ()),
}
# Each rule is compared with every name of a checkpoint.
_MAX_RULES = 4096

# The variables of a mapping file by name.
Variables = dict[str, Kind]


def parse_mapping(text: str, file: str) -> LayoutSpec:
    """Parse the YAML of a mapping or a canonical layout; MappingError with file and line for any mistake."""
    return parse_layout(parse(text, file), text)


def parse_layout(node: YamlNode, text: str) -> LayoutSpec:
    """Return the layout that a mapping file describes: a canonical one if it has `tensors`, else a mapping."""
    is_canonical = "tensors" in node.as_dict("a mapping file")
    parsers = CANONICAL_PARSERS if is_canonical else MAPPING_PARSERS
    required = ("sizes", "encoder_prefix", "encoder_order", "tensors") if is_canonical else ("rules",)
    fields = node.as_dict("a mapping file", parsers, (*REQUIRED_KEYS, *required))
    variables = _variables(fields["variables"]) if "variables" in fields else {}
    values = {key: parsers[key](value, variables) for key, value in fields.items() if key != "variables"}
    values |= {
        "name": values.pop("layout"),
        "location": node.location,
        # Conversion records contain it.
        "digest": hashlib.sha256(text.encode()).hexdigest(),
    }
    if is_canonical:
        return CanonicalLayout(**values)
    prefixes = values.pop("prefix", ("",))
    for name in ("other_rules", "drop_rest"):
        if name in fields and not any(prefixes):
            raise fields[name].error(f"`{name}` applies to names without the prefix, but there is no `prefix`")
    if "other_rules" in fields and "drop_rest" in fields:
        raise fields["drop_rest"].error("expected `other_rules` (rules for the other names) or `drop_rest`, not both")
    return LayoutMapping(prefixes=prefixes, **values)


def _variables(node: YamlNode) -> Variables:
    return {name: _variable(name, kind) for name, kind in node.as_dict("variables and their kinds").items()}


def _variable(name: str, node: YamlNode) -> Kind:
    expected = "int, name, path, or a list of words"
    if node.is_scalar:
        kind = node.as_str(expected)
        if kind not in VARIABLE_KINDS:
            raise node.error(f"variable {name!r}: expected {expected}, found {kind!r}")
        return kind
    words = tuple(item.as_str("a word") for item in node.as_list(expected))
    if not words or len(set(words)) < len(words) or any("." in word or not word for word in words):
        raise node.error(f"variable {name!r}: expected different words without dots")
    if any(len(word) > MAX_WORD_CHARS for word in words):
        raise node.error(f"variable {name!r}: expected words of at most {MAX_WORD_CHARS} characters")
    return words


def _prefixes(node: YamlNode) -> tuple[str, ...]:
    prefixes = tuple(node.as_str_list("a prefix, or a list of prefixes"))
    if not prefixes:
        raise node.error("expected a prefix, or a list of prefixes")
    return prefixes


def _detect(node: YamlNode) -> dict[str, Shape]:
    shapes = {key: _shape(shape) for key, shape in node.as_dict("names and shapes").items()}
    if not shapes:
        raise node.error("expected at least one name and its shape")
    return shapes


def _shape(node: YamlNode) -> Shape:
    items = node.as_list("a shape such as [3*width, width]")
    return tuple(item.checked(parse_dim, item.as_str("a dimension")) for item in items)


def _reason(node: YamlNode) -> str:
    reason = node.as_line("a reason in words")
    if not reason:
        raise node.error("expected a reason in words")
    return reason


def _sizes(node: YamlNode) -> dict[str, int]:
    return {name: size.as_int("a size") for name, size in node.as_dict("names and sizes").items()}


def _assumptions(node: YamlNode) -> dict[str, str | int | float]:
    values = node.as_dict("names and values")
    return {name: value.as_str_or_number("a word or a number") for name, value in values.items()}


def _template(text: str, node: YamlNode, variables: Variables) -> Template:
    return node.checked(Template.parse, text, variables)


def _tensors(node: YamlNode, variables: Variables) -> tuple[TensorSpec, ...]:
    return tuple(_tensor(name, spec, variables) for name, spec in node.as_dict("names and shapes").items())


def _tensor(name: str, node: YamlNode, variables: Variables) -> TensorSpec:
    template = _template(name, node, variables)
    if any(field.kind in ("name", "path") or field.offset for field in template.fields):
        raise node.error(f"{name!r}: names of a canonical layout may only have int variables and lists of words")
    if isinstance(node.value, list):
        return TensorSpec(template, _shape(node))
    fields = node.as_dict("a shape, or a mapping with `shape`", TENSOR_KEYS, ("shape",))
    texts = {key: value.as_line(f"the tensor's {key}") for key, value in fields.items() if key != "shape"}
    dtype, generate, positions = (texts.get(key, "") for key in ("dtype", "generate", "positions"))
    if dtype and dtype not in BY_NAME:
        raise fields["dtype"].error(f"unknown element type {dtype!r}; expected one of {', '.join(BY_NAME)}")
    if generate and (generate != "arange" or dtype != "int64"):
        raise fields["generate"].error("expected arange, with dtype int64")
    if positions and positions not in POSITIONS:
        raise fields["positions"].error(f"unknown kind {positions!r}; expected one of {', '.join(POSITIONS)}")
    return TensorSpec(template, _shape(fields["shape"]), **texts)


def _extra_tensors(node: YamlNode, variables: Variables) -> tuple[tuple[Template, str], ...]:
    reasons = node.as_dict("names and reasons")
    return tuple(
        (_template(name, reason, variables), reason.as_str("why the DeepEncoder has no such tensor"))
        for name, reason in reasons.items()
    )


def _rules(node: YamlNode, variables: Variables) -> tuple[Rule, ...]:
    items = node.as_list("a list of rules")
    parsed = itertools.chain.from_iterable(_item_rules(item, variables) for item in items)
    rules = tuple(itertools.islice(parsed, _MAX_RULES + 1))
    if len(rules) > _MAX_RULES:
        raise node.error(f"more than {_MAX_RULES} rules")
    # Templates are compiled to regular expressions that contain every word.
    sizes = (template.size for rule in rules for template in rule.sources)
    if any(total > MAX_FILE_CHARS for total in itertools.accumulate(sizes)):
        raise node.error(f"the rules have more than {MAX_FILE_CHARS} characters with all words of their variables")
    return rules


def _item_rules(node: YamlNode, variables: Variables) -> Iterator[Rule]:
    """Yield the rules of one list item: one for each name of a `drop`, a single one for other actions."""
    keys = node.as_dict("a rule")
    action = next((action for action in ACTIONS if action in keys), None)
    if action is None:
        found = ", ".join(map(repr, keys)) or "nothing"
        raise node.error(f"expected a rule ({', '.join(ACTIONS)}), found {found}")
    required, allowed = ACTIONS[action]
    fields = node.as_dict("a rule", (action, *required, *allowed, "optional"), required)
    optional, required_on_write = _optional(fields["optional"]) if "optional" in fields else (False, False)
    rules = (
        _drop_rules(node, fields, variables) if action == "drop" else [_rename_rule(node, action, fields, variables)]
    )
    for rule in rules:
        yield rule._replace(optional=optional, required_on_write=required_on_write)


def _optional(node: YamlNode) -> tuple[bool, bool]:
    """Return whether a rule may match nothing, and whether its tensors are required when the layout is written."""
    if node.value == "on_read":
        return True, True
    if node.value == "reading":
        raise node.error("`optional: reading` is now called `optional: on_read`")
    return node.as_bool(), False


def _drop_rules(node: YamlNode, fields: dict[str, YamlNode], variables: Variables) -> Iterator[Rule]:
    reason = _reason(fields["because"])
    for name in fields["drop"].as_str_list("a name, or a list of names"):
        source = _template(name, fields["drop"], variables)
        yield Rule((source,), targets=(), ops=(), location=node.location, reason=reason)


def _rename_rule(node: YamlNode, action: str, fields: dict[str, YamlNode], variables: Variables) -> Rule:
    """Return the rule of a `keep`, `rename`, `fuse` or `split`."""
    target_key = {"keep": "keep", "rename": "to"}.get(action, "into")
    sources = _templates(fields[action], fields["parts"] if action == "fuse" else None, variables)
    targets = _templates(fields[target_key], fields["parts"] if action == "split" else None, variables)
    source_variables, target_variables = ({field.name for field in names[0].fields} for names in (sources, targets))
    if source_variables != target_variables:
        different = ", ".join(sorted(source_variables ^ target_variables))
        texts = f"{sources[0].text!r} and {targets[0].text!r}"
        raise fields[target_key].error(f"{texts} use different variables: {different}")
    return Rule(sources, targets, _ops(fields, len(sources), len(targets)), node.location)


def _templates(node: YamlNode, parts: YamlNode | None, variables: Variables) -> tuple[Template, ...]:
    """Return the template of a name, or with `parts` one template for each part in the given order."""
    template = _template(node.as_str("a name"), node, variables)
    if parts is None:
        return (template,)
    expected = "one variable and its words in order, such as {proj: [q, k, v]}"
    words_by_variable = parts.as_dict(expected)
    if len(words_by_variable) != 1:
        raise parts.error(f"expected {expected}")
    ((name, words_node),) = words_by_variable.items()
    words = words_node.as_str_list("a word")
    if name not in [field.name for field in template.fields]:
        raise parts.error(f"{template.text!r} does not use the variable {name!r}")
    kind = variables[name]
    if not isinstance(kind, tuple) or sorted(words) != sorted(kind) or len(words) < 2:
        raise parts.error(f"expected all words of the variable {name!r}, in order, each once")
    return tuple(template.bind(name, word) for word in words)


def _ops(fields: dict[str, YamlNode], num_sources: int, num_targets: int) -> tuple[Op, ...]:
    """Return a Fuse or Split if there are several sources or targets, followed by the operations of `then`."""
    dim = fields["dim"].as_int("a dimension") if "dim" in fields else 0
    ops: list[Op] = []
    if num_sources > 1:
        ops.append(Fuse(num_sources, dim))
    elif num_targets > 1:
        ops.append(Split(num_targets, dim))
    if "then" in fields:
        ops += map(_op, fields["then"].as_list("a list of operations"))
    return tuple(ops)


def _op(node: YamlNode) -> Op:
    fields = node.as_dict("an operation", OP_PARSERS)
    if len(fields) != 1:
        raise node.error("expected one operation per item")
    ((name, argument),) = fields.items()
    return OP_PARSERS[name](argument)


def _dims(node: YamlNode) -> tuple[int, ...]:
    dims = node.as_int_tuple("a dimension, or a list of them")
    if not dims or len(set(dims)) < len(dims):
        raise node.error("expected different dimensions")
    return dims


def _permutation(node: YamlNode, what: str) -> tuple[int, ...]:
    order = node.as_int_tuple(what)
    if sorted(order) != list(range(len(order))):
        raise node.error(f"expected each of 0 to {len(order) - 1} once, found {list(order)}")
    return order


def _permute(node: YamlNode) -> Op:
    return Permute(_permutation(node, "the dimensions in their new order"))


def _reorder(node: YamlNode) -> Op:
    order = _permutation(node, "the parts in their new order")
    if len(order) < 2:
        raise node.error("expected the numbers of two parts or more")
    return Reorder(order)


def _reshape(node: YamlNode) -> Op:
    fields = node.as_dict("{from: [...], to: [...]}", ("from", "to"), ("from", "to"))
    before, after = (fields[key].as_int_tuple("a shape in numbers") for key in ("from", "to"))
    if math.prod(before) != math.prod(after):
        raise node.error(f"{list(before)} and {list(after)} have different numbers of elements")
    return Reshape(before, after)


def _deinterleave(node: YamlNode) -> Op:
    fields = node.as_dict("{heads: N, parts: N}", ("heads", "parts"), ("heads", "parts"))
    numbers = {name: fields[name].as_int(f"a number of {name}") for name in ("heads", "parts")}
    for name, number in numbers.items():
        if not number:
            raise fields[name].error(f"expected a number of {name}, found 0")
    return Deinterleave(numbers["heads"], numbers["parts"])


OP_PARSERS: dict[str, Callable[[YamlNode], Op]] = {
    "squeeze": lambda node: Squeeze(_dims(node)),
    "unsqueeze": lambda node: Unsqueeze(_dims(node)),
    "reshape": _reshape,
    "permute": _permute,
    "deinterleave": _deinterleave,
    "reorder": _reorder,
}
# Parsers of the values of the top-level keys. Only names with templates use the variables. A test compares these
# tables, ACTIONS and OP_PARSERS with mapping.schema.json.
Parsers = dict[str, Callable[[YamlNode, Variables], Any]]
_COMMON_PARSERS: Parsers = {
    "layout": lambda node, _: node.as_line("the layout's name"),
    "family": lambda node, _: node.as_line("a family"),
    "description": lambda node, _: node.as_line("a one-line description"),
    "variables": lambda node, _: _variables(node),
    "detect": lambda node, _: _detect(node),
}
MAPPING_PARSERS: Parsers = {
    **_COMMON_PARSERS,
    "prefix": lambda node, _: _prefixes(node),
    "rules": _rules,
    "other_rules": _rules,
    "drop_rest": lambda node, _: _reason(node),
    "aliases": lambda node, _: tuple(node.as_str_list("a name, or a list of names")),
    "language_model": lambda node, _: node.as_bool(),
}
CANONICAL_PARSERS: Parsers = {
    **_COMMON_PARSERS,
    "sizes": lambda node, _: _sizes(node),
    "global_layers": lambda node, _: node.as_int("a number of layers"),
    "assumptions": lambda node, _: _assumptions(node),
    "encoder_prefix": lambda node, _: node.as_str("a prefix"),
    "encoder_order": lambda node, _: node.as_int("the encoder's position in the model"),
    "model": lambda node, _: node.as_str("a published model"),
    "tensors": _tensors,
    "extra_tensors": _extra_tensors,
}

"""Mapping files parsed into layout specifications: which keys the YAML may have and what their values must be."""

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

Variables = dict[str, Kind]
Parsers = dict[str, Callable[[YamlNode, Variables], Any]]

# Parsers of values by key; the names of the fields are those of the layouts. A test compares these tables, ACTIONS and
# OPS with mapping.schema.json.
_COMMON: Parsers = {
    "layout": lambda node, _: node.as_line("the layout's name"),
    "family": lambda node, _: node.as_line("a family"),
    "description": lambda node, _: node.as_line("a one-line description"),
    "variables": lambda node, _: _variables(node),
    "detect": lambda node, _: _detect(node),
}
MAPPING: Parsers = {
    **_COMMON,
    "prefix": lambda node, _: _prefixes(node),
    "rules": lambda node, variables: _rules(node, variables),
    "other_rules": lambda node, variables: _rules(node, variables),
    "drop_rest": lambda node, _: _reason(node),
    "aliases": lambda node, _: tuple(node.as_str_list("a name, or a list of names")),
    "language_model": lambda node, _: node.as_bool(),
}
CANONICAL: Parsers = {
    **_COMMON,
    "sizes": lambda node, _: {key: size.as_int("a size") for key, size in node.as_dict("names and sizes").items()},
    "global_layers": lambda node, _: node.as_int("a number of layers"),
    "assumptions": lambda node, _: {
        key: value.as_str_or_number("a word or a number") for key, value in node.as_dict("names and values").items()
    },
    "encoder_prefix": lambda node, _: node.as_str("a prefix"),
    "encoder_order": lambda node, _: node.as_int("the encoder's position in the model"),
    "model": lambda node, _: node.as_str("a published model"),
    "tensors": lambda node, variables: tuple(
        _tensor(name, spec, variables) for name, spec in node.as_dict("names and shapes").items()
    ),
    "extra_tensors": lambda node, variables: tuple(
        (_template(name, reason, variables), reason.as_str("why the DeepEncoder has no such tensor"))
        for name, reason in node.as_dict("names and reasons").items()
    ),
}
REQUIRED = ("layout", "family", "description", "detect")
TENSOR = ("shape", "dtype", "optional", "generate", "positions")
KINDS = ("int", "name", "path")
# Each rule is compared with every name of a checkpoint.
_MAX_RULES = 4096
# Required and optional keys of a rule, by its action. All rules may have `optional`.
ACTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "keep": ((), ("then",)),
    "rename": (("to",), ("then",)),
    "fuse": (("parts", "into"), ("dim", "then")),
    "split": (("parts", "into"), ("dim", "then")),
    "drop": (("because",), ()),
}
OPS: dict[str, Callable[[YamlNode], Op]] = {
    "squeeze": lambda node: Squeeze(_dims(node)),
    "unsqueeze": lambda node: Unsqueeze(_dims(node)),
    "reshape": lambda node: _reshape(node),
    "permute": lambda node: Permute(_order(node, "the dimensions in their new order")),
    "deinterleave": lambda node: _deinterleave(node),
    "reorder": lambda node: _reorder(node),
}


def parse_mapping(text: str, file: str) -> LayoutSpec:
    """Parse the YAML of a mapping or a canonical layout; MappingError with file and line for any mistake."""
    return parse_layout(parse(text, file), text)


def parse_layout(node: YamlNode, text: str) -> LayoutSpec:
    """Return the layout that a mapping file describes: a canonical one if it has `tensors`, else a mapping."""
    is_canonical = "tensors" in node.as_dict("a mapping file")
    parsers = CANONICAL if is_canonical else MAPPING
    required = ("sizes", "encoder_prefix", "encoder_order", "tensors") if is_canonical else ("rules",)
    fields = node.as_dict("a mapping file", parsers, (*REQUIRED, *required))
    variables = _variables(fields.pop("variables")) if "variables" in fields else {}
    values = {key: parsers[key](value, variables) for key, value in fields.items()}
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
        if kind not in KINDS:
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


def _template(text: str, node: YamlNode, variables: Variables) -> Template:
    return node.checked(Template.parse, text, variables)


def _tensor(name: str, node: YamlNode, variables: Variables) -> TensorSpec:
    template = _template(name, node, variables)
    if any(field.kind in ("name", "path") or field.offset for field in template.fields):
        raise node.error(f"{name!r}: names of a canonical layout may only have int variables and lists of words")
    if isinstance(node.value, list):
        return TensorSpec(template, _shape(node))
    fields = node.as_dict("a shape, or a mapping with `shape`", TENSOR, ("shape",))
    texts = {key: value.as_line(f"the tensor's {key}") for key, value in fields.items() if key != "shape"}
    dtype, generate, positions = (texts.get(key, "") for key in ("dtype", "generate", "positions"))
    if dtype and dtype not in BY_NAME:
        raise fields["dtype"].error(f"unknown element type {dtype!r}; expected one of {', '.join(BY_NAME)}")
    if generate and (generate != "arange" or dtype != "int64"):
        raise fields["generate"].error("expected arange, with dtype int64")
    if positions and positions not in POSITIONS:
        raise fields["positions"].error(f"unknown kind {positions!r}; expected one of {', '.join(POSITIONS)}")
    return TensorSpec(template, _shape(fields["shape"]), **texts)


def _rules(node: YamlNode, variables: Variables) -> tuple[Rule, ...]:
    parsed = itertools.chain.from_iterable(_rule(item, variables) for item in node.as_list("a list of rules"))
    rules = tuple(itertools.islice(parsed, _MAX_RULES + 1))
    if len(rules) > _MAX_RULES:
        raise node.error(f"more than {_MAX_RULES} rules")
    # Templates are compiled to regular expressions that contain every word.
    sizes = (name.size for rule in rules for name in rule.sources)
    if any(total > MAX_FILE_CHARS for total in itertools.accumulate(sizes)):
        raise node.error(f"the rules have more than {MAX_FILE_CHARS} characters with all words of their variables")
    return rules


def _rule(node: YamlNode, variables: Variables) -> Iterator[Rule]:
    """Yield the rules of one list item: one rule, or one for each name of a `drop`."""
    present = node.as_dict("a rule")
    action = next((action for action in ACTIONS if action in present), None)
    if action is None:
        found = ", ".join(map(repr, present)) or "nothing"
        raise node.error(f"expected a rule ({', '.join(ACTIONS)}), found {found}")
    needed, allowed = ACTIONS[action]
    fields = node.as_dict("a rule", (action, *needed, *allowed, "optional"), needed)
    optional = _optional(fields["optional"]) if "optional" in fields else (False, False)
    if action == "drop":
        reason = _reason(fields["because"])
        for name in fields["drop"].as_str_list("a name, or a list of names"):
            dropped = _template(name, fields["drop"], variables)
            yield Rule((dropped,), (), (), node.location, *optional, reason)
        return
    goal = {"keep": "keep", "rename": "to"}.get(action, "into")
    sources = _names(fields[action], fields["parts"] if action == "fuse" else None, variables)
    targets = _names(fields[goal], fields["parts"] if action == "split" else None, variables)
    before, after = ({field.name for field in names[0].fields} for names in (sources, targets))
    if before != after:
        texts, different = f"{sources[0].text!r} and {targets[0].text!r}", ", ".join(sorted(before ^ after))
        raise fields[goal].error(f"{texts} use different variables: {different}")
    yield Rule(sources, targets, _ops(fields, len(sources), len(targets)), node.location, *optional)


def _optional(node: YamlNode) -> tuple[bool, bool]:
    """Return whether a rule may match nothing, and whether its tensors are required when the layout is written."""
    if node.value == "on_read":
        return True, True
    if node.value == "reading":
        raise node.error("`optional: reading` is now called `optional: on_read`")
    return node.as_bool(), False


def _ops(fields: dict[str, YamlNode], sources: int, targets: int) -> tuple[Op, ...]:
    """Return a Fuse or Split if there are several sources or targets, followed by the operations of `then`."""
    dim = fields["dim"].as_int("a dimension") if "dim" in fields else 0
    first = [Fuse(sources, dim)] if sources > 1 else [Split(targets, dim)] if targets > 1 else []
    return (*first, *map(_op, fields["then"].as_list("a list of operations") if "then" in fields else ()))


def _reason(node: YamlNode) -> str:
    reason = node.as_line("a reason in words")
    if not reason:
        raise node.error("expected a reason in words")
    return reason


def _names(node: YamlNode, order: YamlNode | None, variables: Variables) -> tuple[Template, ...]:
    """Return the template, or with `parts` one for each part in the given order."""
    template = _template(node.as_str("a name"), node, variables)
    if order is None:
        return (template,)
    expected = "one variable and its words in order, such as {proj: [q, k, v]}"
    chosen = order.as_dict(expected)
    if len(chosen) != 1:
        raise order.error(f"expected {expected}")
    ((name, words_node),) = chosen.items()
    words = words_node.as_str_list("a word")
    if name not in [field.name for field in template.fields]:
        raise order.error(f"{template.text!r} does not use the variable {name!r}")
    kind = variables[name]
    if not isinstance(kind, tuple) or sorted(words) != sorted(kind) or len(words) < 2:
        raise order.error(f"expected all words of the variable {name!r}, in order, each once")
    return tuple(template.bind(name, word) for word in words)


def _op(node: YamlNode) -> Op:
    fields = node.as_dict("an operation", OPS)
    if len(fields) != 1:
        raise node.error("expected one operation per item")
    ((name, argument),) = fields.items()
    return OPS[name](argument)


def _order(node: YamlNode, what: str) -> tuple[int, ...]:
    order = node.as_int_tuple(what)
    if sorted(order) != list(range(len(order))):
        raise node.error(f"expected each of 0 to {len(order) - 1} once, found {list(order)}")
    return order


def _reorder(node: YamlNode) -> Op:
    order = _order(node, "the parts in their new order")
    if len(order) < 2:
        raise node.error("expected the numbers of two parts or more")
    return Reorder(order)


def _reshape(node: YamlNode) -> Op:
    fields = node.as_dict("{from: [...], to: [...]}", ("from", "to"), ("from", "to"))
    before, after = (fields[name].as_int_tuple("a shape in numbers") for name in ("from", "to"))
    if math.prod(before) != math.prod(after):
        raise node.error(f"{list(before)} and {list(after)} have different numbers of elements")
    return Reshape(before, after)


def _dims(node: YamlNode) -> tuple[int, ...]:
    dims = node.as_int_tuple("a dimension, or a list of them")
    if not dims or len(set(dims)) < len(dims):
        raise node.error("expected different dimensions")
    return dims


def _deinterleave(node: YamlNode) -> Op:
    fields = node.as_dict("{heads: N, parts: N}", ("heads", "parts"), ("heads", "parts"))
    numbers = {name: fields[name].as_int(f"a number of {name}") for name in ("heads", "parts")}
    for name, number in numbers.items():
        if not number:
            raise fields[name].error(f"expected a number of {name}, found 0")
    return Deinterleave(numbers["heads"], numbers["parts"])

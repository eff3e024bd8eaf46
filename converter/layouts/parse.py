"""Mapping files parsed into layout specifications: which keys the YAML may have and what their values must be."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator

from converter.layouts.parse_ops import parse_op, require
from converter.layouts.shapes import Dim, Shape, parse_dim
from converter.layouts.spec import CanonicalLayout, LayoutMapping, LayoutSpec, Rule, Signature, TensorSpec
from converter.layouts.template import MAX_WORD_CHARS, Kind, Template
from converter.layouts.yaml_tree import MAX_FILE_CHARS, YamlNode, parse
from converter.tensors.dtypes import BY_NAME
from converter.tensors.lazy_tensor import POSITIONS
from converter.tensors.ops import Fuse, Op, Split

# The allowed keys. A test compares these tables, ACTIONS and OPS with mapping.schema.json.
REQUIRED = ("layout", "family", "description", "detect")
MAPPING = (*REQUIRED, "variables", "prefix", "rules", "other_rules", "drop_rest", "aliases", "language_model")
CANONICAL = (
    *REQUIRED,
    "variables",
    "sizes",
    "global_layers",
    "assumptions",
    "encoder_prefix",
    "encoder_order",
    "model",
    "tensors",
    "extra_tensors",
)
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


def parse_mapping(text: str, file: str) -> LayoutSpec:
    """Parse the YAML of a mapping or a canonical layout; MappingError with file and line for any mistake."""
    return parse_layout(parse(text, file), text_digest(text))


def text_digest(text: str) -> str:
    """Return the SHA-256 of a mapping file, which conversion records contain."""
    return hashlib.sha256(text.encode()).hexdigest()


def parse_layout(node: YamlNode, digest: str) -> LayoutSpec:
    """Return the layout that a mapping file describes: a canonical one if it has `tensors`, else a mapping."""
    is_canonical = node.is_map and "tensors" in node.as_dict("a mapping file")
    return parse_canonical(node, digest) if is_canonical else _mapping(node, digest)


def parse_canonical(node: YamlNode, digest: str) -> CanonicalLayout:
    """Return the canonical layout that a file describes."""
    fields = node.as_dict("a canonical layout", CANONICAL)
    require(node, fields, *REQUIRED, "sizes", "encoder_prefix", "encoder_order", "tensors")
    variables = _variables(fields)
    extra_tensors = fields["extra_tensors"].as_dict("names and reasons") if "extra_tensors" in fields else {}
    assumptions = fields["assumptions"].as_dict("names and values") if "assumptions" in fields else {}
    return CanonicalLayout(
        name=_line(fields["layout"], "the layout's name"),
        family=_line(fields["family"], "a family"),
        description=_line(fields["description"], "a one-line description"),
        signature=_signature(fields),
        location=node.location,
        digest=digest,
        sizes={name: size.as_int("a size") for name, size in fields["sizes"].as_dict("names and sizes").items()},
        assumptions={name: value.as_str_or_number("a word or a number") for name, value in assumptions.items()},
        tensors=tuple(
            _tensor(name, spec, variables) for name, spec in fields["tensors"].as_dict("names and shapes").items()
        ),
        extra_tensors=tuple(
            (_template(name, reason, variables), reason.as_str("why the DeepEncoder has no such tensor"))
            for name, reason in extra_tensors.items()
        ),
        encoder_prefix=fields["encoder_prefix"].as_str("a prefix"),
        encoder_order=fields["encoder_order"].as_int("the encoder's position in the model"),
        model=fields["model"].as_str("a published model") if "model" in fields else "",
        global_layers=fields["global_layers"].as_int("a number of layers") if "global_layers" in fields else 0,
    )


def _mapping(node: YamlNode, digest: str) -> LayoutMapping:
    fields = node.as_dict("a mapping file", MAPPING)
    require(node, fields, *REQUIRED, "rules")
    variables, signature = _variables(fields), _signature(fields)
    for name in ("other_rules", "drop_rest"):
        if name in fields and not any(signature.prefixes):
            raise fields[name].error(f"`{name}` applies to names without the prefix, but there is no `prefix`")
    if "other_rules" in fields and "drop_rest" in fields:
        raise fields["drop_rest"].error("expected `other_rules` (rules for the other names) or `drop_rest`, not both")
    return LayoutMapping(
        name=_line(fields["layout"], "the layout's name"),
        family=_line(fields["family"], "a family"),
        description=_line(fields["description"], "a one-line description"),
        signature=signature,
        location=node.location,
        digest=digest,
        rules=_rules(fields["rules"], variables),
        other_rules=_rules(fields["other_rules"], variables) if "other_rules" in fields else (),
        drop_rest=_reason(fields["drop_rest"]) if "drop_rest" in fields else "",
        aliases=tuple(fields["aliases"].as_str_list("a name, or a list of names")) if "aliases" in fields else (),
        language_model="language_model" in fields and fields["language_model"].as_bool(),
    )


def _line(node: YamlNode, what: str) -> str:
    """Return the text with all whitespace as single spaces, for messages."""
    return " ".join(node.as_str(what).split())


def _variables(fields: dict[str, YamlNode]) -> dict[str, Kind]:
    if "variables" not in fields:
        return {}
    declared = fields["variables"].as_dict("variables and their kinds")
    return {name: _variable(name, node) for name, node in declared.items()}


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


def _signature(fields: dict[str, YamlNode]) -> Signature:
    prefixes = fields["prefix"].as_str_list("a prefix, or a list of prefixes") if "prefix" in fields else [""]
    if not prefixes:
        raise fields["prefix"].error("expected a prefix, or a list of prefixes")
    return Signature(tuple(prefixes), _detect(fields["detect"]))


def _detect(node: YamlNode) -> dict[str, Shape]:
    signature = {key: _shape(shape) for key, shape in node.as_dict("names and shapes").items()}
    if not signature:
        raise node.error("expected at least one name and its shape")
    return signature


def _shape(node: YamlNode) -> Shape:
    return tuple(_dim(item) for item in node.as_list("a shape such as [3*width, width]"))


def _dim(node: YamlNode) -> Dim:
    text = node.as_str("a dimension")
    return node.checked(lambda: parse_dim(text))


def _template(text: str, node: YamlNode, variables: dict[str, Kind]) -> Template:
    return node.checked(lambda: Template.parse(text, variables))


def _tensor(name: str, node: YamlNode, variables: dict[str, Kind]) -> TensorSpec:
    template = _template(name, node, variables)
    if any(field.kind in ("name", "path") or field.offset for field in template.fields):
        raise node.error(f"{name!r}: names of a canonical layout may only have int variables and lists of words")
    if not node.is_map:
        return TensorSpec(template, _shape(node))
    fields = node.as_dict("a shape, or a mapping with `shape`", TENSOR)
    require(node, fields, "shape")
    dtype = fields["dtype"].as_str("an element type") if "dtype" in fields else ""
    if dtype and dtype not in BY_NAME:
        raise fields["dtype"].error(f"unknown element type {dtype!r}; expected one of {', '.join(BY_NAME)}")
    generate = fields["generate"].as_str("arange") if "generate" in fields else ""
    if generate and (generate != "arange" or dtype != "int64"):
        raise fields["generate"].error("expected arange, with dtype int64")
    optional = fields["optional"].as_str("why it may be missing") if "optional" in fields else ""
    positions = fields["positions"].as_str("a kind of position embeddings") if "positions" in fields else ""
    if positions and positions not in POSITIONS:
        raise fields["positions"].error(f"unknown kind {positions!r}; expected one of {', '.join(POSITIONS)}")
    return TensorSpec(template, _shape(fields["shape"]), dtype, optional, generate, positions)


def _rules(node: YamlNode, variables: dict[str, Kind]) -> tuple[Rule, ...]:
    parsed = itertools.chain.from_iterable(_rule(item, variables) for item in node.as_list("a list of rules"))
    rules = tuple(itertools.islice(parsed, _MAX_RULES + 1))
    if len(rules) > _MAX_RULES:
        raise node.error(f"more than {_MAX_RULES} rules")
    # The regular expressions that match names contain them all.
    sizes = (name.size for rule in rules for name in rule.sources)
    if any(total > MAX_FILE_CHARS for total in itertools.accumulate(sizes)):
        raise node.error(f"the rules have more than {MAX_FILE_CHARS} characters with all words of their variables")
    return rules


def _rule(node: YamlNode, variables: dict[str, Kind]) -> Iterator[Rule]:
    """Yield the rules of one list item: one rule, or one for each name of a `drop`."""
    present = node.as_dict("a rule")
    action = next((action for action in ACTIONS if action in present), None)
    if action is None:
        found = ", ".join(map(repr, present)) or "nothing"
        raise node.error(f"expected a rule ({', '.join(ACTIONS)}), found {found}")
    needed, allowed = ACTIONS[action]
    fields = node.as_dict("a rule", (action, *needed, *allowed, "optional"))
    require(node, fields, *needed)
    optional, required_on_write = _optional(fields)
    if action == "drop":
        reason = _reason(fields["because"])
        for name in fields["drop"].as_str_list("a name, or a list of names"):
            yield Rule(
                (_template(name, fields["drop"], variables),),
                (),
                (),
                optional,
                reason,
                node.location,
                required_on_write,
            )
        return
    goal = {"keep": "keep", "rename": "to"}.get(action, "into")
    sources = _names(fields[action], fields["parts"] if action == "fuse" else None, variables)
    targets = _names(fields[goal], fields["parts"] if action == "split" else None, variables)
    _same_variables(fields[goal], sources[0], targets[0])
    yield Rule(
        sources, targets, _ops(fields, len(sources), len(targets)), optional, "", node.location, required_on_write
    )


def _optional(fields: dict[str, YamlNode]) -> tuple[bool, bool]:
    """Return whether a rule may match nothing, and whether its tensors are required when the layout is written."""
    if "optional" not in fields:
        return False, False
    value = fields["optional"]
    if value.scalar == "on_read":
        return True, True
    if value.scalar == "reading":
        raise value.error("`optional: reading` is now called `optional: on_read`")
    return value.as_bool(), False


def _ops(fields: dict[str, YamlNode], sources: int, targets: int) -> tuple[Op, ...]:
    """Return a Fuse or Split if there are several sources or targets, followed by the operations of `then`."""
    dim = fields["dim"].as_int("a dimension") if "dim" in fields else 0
    first = [Fuse(sources, dim)] if sources > 1 else [Split(targets, dim)] if targets > 1 else []
    return (*first, *map(parse_op, fields["then"].as_list("a list of operations") if "then" in fields else ()))


def _reason(node: YamlNode) -> str:
    reason = _line(node, "a reason in words")
    if not reason:
        raise node.error("expected a reason in words")
    return reason


def _names(node: YamlNode, order: YamlNode | None, variables: dict[str, Kind]) -> tuple[Template, ...]:
    """Return the template, or with `parts` one for each part in the given order."""
    template = _template(node.as_str("a name"), node, variables)
    if order is None:
        return (template,)
    chosen = order.as_dict("one variable and its words in order, such as {proj: [q, k, v]}")
    if len(chosen) != 1:
        raise order.error("expected one variable and its words in order, such as {proj: [q, k, v]}")
    ((name, words_node),) = chosen.items()
    words = words_node.as_str_list("a word")
    if name not in [field.name for field in template.fields]:
        raise order.error(f"{template.text!r} does not use the variable {name!r}")
    kind = variables[name]
    if not isinstance(kind, tuple) or sorted(words) != sorted(kind) or len(words) < 2:
        raise order.error(f"expected all words of the variable {name!r}, in order, each once")
    return tuple(template.bind(name, word) for word in words)


def _same_variables(node: YamlNode, source: Template, target: Template) -> None:
    before, after = ({field.name for field in template.fields} for template in (source, target))
    if before != after:
        names = ", ".join(sorted(before ^ after))
        raise node.error(f"{source.text!r} and {target.text!r} use different variables: {names}")

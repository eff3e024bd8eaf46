"""Mapping files parsed into layout specifications: which keys the YAML may have and what their values must be."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator

from converter.layouts.shapes import Dim, Shape, parse_dim
from converter.layouts.spec import CanonicalLayout, LayoutMapping, LayoutSpec, Rule, Signature, TensorSpec
from converter.layouts.template import LONGEST_WORD, Kind, Template
from converter.layouts.yaml_tree import LARGEST, Tree, parse
from converter.tensors.dtypes import BY_NAME
from converter.tensors.ops import Deinterleave, Fuse, Op, Permute, Reorder, Reshape, Split, Squeeze, Unsqueeze

# The allowed keys. A test compares these tables, VERBS and OPS with mapping.schema.json.
REQUIRED = ("layout", "family", "description", "detect")
MAPPING = (*REQUIRED, "variables", "prefix", "rules", "other_rules", "drop_rest")
CANONICAL = (*REQUIRED, "variables", "sizes", "encoder_prefix", "encoder_order", "tensors", "extra_tensors")
TENSOR = ("shape", "dtype", "optional", "generate", "positions")
KINDS = ("int", "name", "path")
# Each rule is compared with every name of a checkpoint.
_MOST_RULES = 4096
# Required and optional keys of a rule, by its verb. All rules may have `optional`.
VERBS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
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
    """The SHA-256 of a mapping file, which conversion records contain."""
    return hashlib.sha256(text.encode()).hexdigest()


def parse_signature(tree: Tree) -> Signature:
    """The signature of a mapping file: detection needs the signatures of a family, but the rules of one layout."""
    fields = tree.fields("a mapping file")
    _require(tree, fields, "detect")
    return _signature(fields)


def parse_layout(tree: Tree, digest: str) -> LayoutSpec:
    """The layout that a mapping file describes: a canonical one if it has `tensors`, else a mapping."""
    is_canonical = tree.is_map and "tensors" in tree.fields("a mapping file")
    return parse_canonical(tree, digest) if is_canonical else _mapping(tree, digest)


def parse_canonical(tree: Tree, digest: str) -> CanonicalLayout:
    """The canonical layout that a file describes."""
    fields = tree.fields("a canonical layout", CANONICAL)
    _require(tree, fields, *REQUIRED, "sizes", "encoder_prefix", "encoder_order", "tensors")
    variables = _variables(fields)
    extra_tensors = fields["extra_tensors"].fields("names and reasons") if "extra_tensors" in fields else {}
    return CanonicalLayout(
        name=_line(fields["layout"], "the layout's name"),
        family=_line(fields["family"], "a family"),
        description=_line(fields["description"], "a one-line description"),
        signature=_signature(fields),
        place=tree.place,
        digest=digest,
        sizes={name: size.number("a size") for name, size in fields["sizes"].fields("names and sizes").items()},
        tensors=tuple(
            _tensor(name, spec, variables) for name, spec in fields["tensors"].fields("names and shapes").items()
        ),
        extra_tensors=tuple(
            (_template(name, reason, variables), reason.text("why the DeepEncoder has no such tensor"))
            for name, reason in extra_tensors.items()
        ),
        encoder_prefix=fields["encoder_prefix"].text("a prefix"),
        encoder_order=fields["encoder_order"].number("the encoder's position in the model"),
    )


def _mapping(tree: Tree, digest: str) -> LayoutMapping:
    fields = tree.fields("a mapping file", MAPPING)
    _require(tree, fields, *REQUIRED, "rules")
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
        place=tree.place,
        digest=digest,
        rules=_rules(fields["rules"], variables),
        other_rules=_rules(fields["other_rules"], variables) if "other_rules" in fields else (),
        drop_rest=_reason(fields["drop_rest"]) if "drop_rest" in fields else "",
    )


def _require(tree: Tree, fields: dict[str, Tree], *names: str) -> None:
    for name in names:
        if name not in fields:
            raise tree.error(f"the key {name!r} is missing")


def _line(tree: Tree, what: str) -> str:
    """Text for people, joined to one line."""
    return " ".join(tree.text(what).split())


def _variables(fields: dict[str, Tree]) -> dict[str, Kind]:
    if "variables" not in fields:
        return {}
    declared = fields["variables"].fields("variables and their kinds")
    return {name: _variable(name, tree) for name, tree in declared.items()}


def _variable(name: str, tree: Tree) -> Kind:
    expected = "int, name, path, or a list of words"
    if tree.is_text:
        kind = tree.text(expected)
        if kind not in KINDS:
            raise tree.error(f"variable {name!r}: expected {expected}, found {kind!r}")
        return kind
    words = tuple(item.text("a word") for item in tree.items(expected))
    if not words or len(set(words)) < len(words) or any("." in word or not word for word in words):
        raise tree.error(f"variable {name!r}: expected different words without dots")
    if any(len(word) > LONGEST_WORD for word in words):
        raise tree.error(f"variable {name!r}: expected words of at most {LONGEST_WORD} characters")
    return words


def _signature(fields: dict[str, Tree]) -> Signature:
    prefixes = fields["prefix"].words("a prefix, or a list of prefixes") if "prefix" in fields else [""]
    if not prefixes:
        raise fields["prefix"].error("expected a prefix, or a list of prefixes")
    return Signature(tuple(prefixes), _detect(fields["detect"]))


def _detect(tree: Tree) -> dict[str, Shape]:
    signature = {key: _shape(shape) for key, shape in tree.fields("names and shapes").items()}
    if not signature:
        raise tree.error("expected at least one name and its shape")
    return signature


def _shape(tree: Tree) -> Shape:
    return tuple(_dim(item) for item in tree.items("a shape such as [3*width, width]"))


def _dim(tree: Tree) -> Dim:
    text = tree.text("a dimension")
    return tree.checked(lambda: parse_dim(text))


def _template(text: str, tree: Tree, variables: dict[str, Kind]) -> Template:
    return tree.checked(lambda: Template.parse(text, variables))


def _tensor(name: str, tree: Tree, variables: dict[str, Kind]) -> TensorSpec:
    template = _template(name, tree, variables)
    if any(field.kind in ("name", "path") or field.offset for field in template.fields):
        raise tree.error(f"{name!r}: names of a canonical layout may only have int variables and lists of words")
    if not tree.is_map:
        return TensorSpec(template, _shape(tree))
    fields = tree.fields("a shape, or a mapping with `shape`", TENSOR)
    _require(tree, fields, "shape")
    dtype = fields["dtype"].text("an element type") if "dtype" in fields else ""
    if dtype and dtype not in BY_NAME:
        raise fields["dtype"].error(f"unknown element type {dtype!r}; expected one of {', '.join(BY_NAME)}")
    generate = fields["generate"].text("arange") if "generate" in fields else ""
    if generate and (generate != "arange" or dtype != "int64"):
        raise fields["generate"].error("expected arange, with dtype int64")
    optional = fields["optional"].text("why it may be missing") if "optional" in fields else ""
    positions = "positions" in fields and fields["positions"].flag()
    return TensorSpec(template, _shape(fields["shape"]), dtype, optional, generate, positions)


def _rules(tree: Tree, variables: dict[str, Kind]) -> tuple[Rule, ...]:
    parsed = itertools.chain.from_iterable(_rule(item, variables) for item in tree.items("a list of rules"))
    rules = tuple(itertools.islice(parsed, _MOST_RULES + 1))
    if len(rules) > _MOST_RULES:
        raise tree.error(f"more than {_MOST_RULES} rules")
    # The regular expressions that match names contain them all.
    sizes = (name.size for rule in rules for name in rule.sources)
    if any(total > LARGEST for total in itertools.accumulate(sizes)):
        raise tree.error(f"the rules have more than {LARGEST} characters with all words of their variables")
    return rules


def _rule(tree: Tree, variables: dict[str, Kind]) -> Iterator[Rule]:
    """The rules of one list item: one, or one per name for a drop with several names."""
    present = tree.fields("a rule")
    verb = next((verb for verb in VERBS if verb in present), None)
    if verb is None:
        found = ", ".join(map(repr, present)) or "nothing"
        raise tree.error(f"expected a rule ({', '.join(VERBS)}), found {found}")
    needed, allowed = VERBS[verb]
    fields = tree.fields("a rule", (verb, *needed, *allowed, "optional"))
    _require(tree, fields, *needed)
    optional, required_on_write = _optional(fields)
    if verb == "drop":
        reason = _reason(fields["because"])
        for name in fields["drop"].words("a name, or a list of names"):
            yield Rule(
                (_template(name, fields["drop"], variables),), (), (), optional, reason, tree.place, required_on_write
            )
        return
    goal = {"keep": "keep", "rename": "to"}.get(verb, "into")
    sources = _names(fields[verb], fields["parts"] if verb == "fuse" else None, variables)
    targets = _names(fields[goal], fields["parts"] if verb == "split" else None, variables)
    _same_variables(fields[goal], sources[0], targets[0])
    yield Rule(sources, targets, _ops(fields, len(sources), len(targets)), optional, "", tree.place, required_on_write)


def _optional(fields: dict[str, Tree]) -> tuple[bool, bool]:
    """Whether a rule may match nothing, and whether its tensors are required when the layout is written."""
    if "optional" not in fields:
        return False, False
    value = fields["optional"]
    if value.scalar == "on_read":
        return True, True
    if value.scalar == "reading":
        raise value.error("`optional: reading` is now called `optional: on_read`")
    return value.flag(), False


def _ops(fields: dict[str, Tree], sources: int, targets: int) -> tuple[Op, ...]:
    """The operation that the numbers of sources and targets imply, and those of `then`."""
    dim = fields["dim"].number("a dimension") if "dim" in fields else 0
    first = [Fuse(sources, dim)] if sources > 1 else [Split(targets, dim)] if targets > 1 else []
    return (*first, *map(_op, fields["then"].items("a list of operations") if "then" in fields else ()))


def _reason(tree: Tree) -> str:
    reason = _line(tree, "a reason in words")
    if not reason:
        raise tree.error("expected a reason in words")
    return reason


def _names(tree: Tree, order: Tree | None, variables: dict[str, Kind]) -> tuple[Template, ...]:
    """The template, or with `parts` one for each part in the given order."""
    template = _template(tree.text("a name"), tree, variables)
    if order is None:
        return (template,)
    chosen = order.fields("one variable and its words in order, such as {proj: [q, k, v]}")
    if len(chosen) != 1:
        raise order.error("expected one variable and its words in order, such as {proj: [q, k, v]}")
    ((name, words_tree),) = chosen.items()
    words = words_tree.words("a word")
    if name not in [field.name for field in template.fields]:
        raise order.error(f"{template.text!r} does not use the variable {name!r}")
    kind = variables[name]
    if not isinstance(kind, tuple) or sorted(words) != sorted(kind) or len(words) < 2:
        raise order.error(f"expected all words of the variable {name!r}, in order, each once")
    return tuple(template.bind(name, word) for word in words)


def _same_variables(tree: Tree, source: Template, target: Template) -> None:
    before, after = ({field.name for field in template.fields} for template in (source, target))
    if before != after:
        names = ", ".join(sorted(before ^ after))
        raise tree.error(f"{source.text!r} and {target.text!r} use different variables: {names}")


def _op(tree: Tree) -> Op:
    fields = tree.fields("an operation", OPS)
    if len(fields) != 1:
        raise tree.error("expected one operation per item")
    ((name, argument),) = fields.items()
    return OPS[name](argument)


def _order(tree: Tree, what: str) -> tuple[int, ...]:
    order = tree.numbers(what)
    if sorted(order) != list(range(len(order))):
        raise tree.error(f"expected each of 0 to {len(order) - 1} once, found {list(order)}")
    return order


def _reorder(tree: Tree) -> Op:
    order = _order(tree, "the parts in their new order")
    if len(order) < 2:
        raise tree.error("expected the numbers of two parts or more")
    return Reorder(order)


def _reshaped(tree: Tree) -> Op:
    fields = tree.fields("{from: [...], to: [...]}", ("from", "to"))
    _require(tree, fields, "from", "to")
    before, after = (fields[name].numbers("a shape in numbers") for name in ("from", "to"))
    if math.prod(before) != math.prod(after):
        raise tree.error(f"{list(before)} and {list(after)} have different numbers of elements")
    return Reshape(before, after)


def _dims(tree: Tree) -> tuple[int, ...]:
    dims = tree.numbers("a dimension, or a list of them")
    if not dims or len(set(dims)) < len(dims):
        raise tree.error("expected different dimensions")
    return dims


def _deinterleave(tree: Tree) -> Op:
    fields = tree.fields("{heads: N, parts: N}", ("heads", "parts"))
    _require(tree, fields, "heads", "parts")
    return Deinterleave(
        _positive(fields["heads"], "a number of heads"), _positive(fields["parts"], "a number of parts")
    )


def _positive(tree: Tree, what: str) -> int:
    number = tree.number(what)
    if not number:
        raise tree.error(f"expected {what}, found 0")
    return number


OPS: dict[str, Callable[[Tree], Op]] = {
    "squeeze": lambda tree: Squeeze(_dims(tree)),
    "unsqueeze": lambda tree: Unsqueeze(_dims(tree)),
    "reshape": _reshaped,
    "permute": lambda tree: Permute(_order(tree, "the dimensions in their new order")),
    "deinterleave": _deinterleave,
    "reorder": _reorder,
}

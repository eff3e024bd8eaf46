"""Operations of mapping files parsed: squeeze, unsqueeze, reshape, permute, deinterleave and reorder."""

from __future__ import annotations

import math
from collections.abc import Callable

from converter.layouts.yaml_tree import YamlNode
from converter.tensors.ops import Deinterleave, Op, Permute, Reorder, Reshape, Squeeze, Unsqueeze


def require(node: YamlNode, fields: dict[str, YamlNode], *names: str) -> None:
    """Check that a dict has some keys.

    Args:
        node: The dict, for error messages.
        fields: Its values by key.
        names: The keys that it must have.

    Raises:
        MappingError: One is missing.
    """
    for name in names:
        if name not in fields:
            raise node.error(f"the key {name!r} is missing")


def parse_op(node: YamlNode) -> Op:
    """Parse one operation of `then`."""
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


def _reshaped(node: YamlNode) -> Op:
    fields = node.as_dict("{from: [...], to: [...]}", ("from", "to"))
    require(node, fields, "from", "to")
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
    fields = node.as_dict("{heads: N, parts: N}", ("heads", "parts"))
    require(node, fields, "heads", "parts")
    return Deinterleave(
        _positive(fields["heads"], "a number of heads"), _positive(fields["parts"], "a number of parts")
    )


def _positive(node: YamlNode, what: str) -> int:
    number = node.as_int(what)
    if not number:
        raise node.error(f"expected {what}, found 0")
    return number


OPS: dict[str, Callable[[YamlNode], Op]] = {
    "squeeze": lambda node: Squeeze(_dims(node)),
    "unsqueeze": lambda node: Unsqueeze(_dims(node)),
    "reshape": _reshaped,
    "permute": lambda node: Permute(_order(node, "the dimensions in their new order")),
    "deinterleave": _deinterleave,
    "reorder": _reorder,
}

"""What a search finds, whichever way it searches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from converter.mapping.expr import Expr
from converter.mapping.ops import Op, run
from converter.mapping.rules import Layout

# How a tensor was found.
VALUES = "values"
ALIKE = "values that several tensors have, and name"
NAME = "shape and name"

Named = Mapping[str, Expr]


class Job(NamedTuple):
    """What is to be derived from: two names for people, and what stands behind them.

    `tensors` are the source's. `layout` is the target's, and `wanted` its tensors under the hub's names: none where a
    layout's name alone was given.
    """

    source: str
    tensors: Named
    target: str
    layout: str
    hub: Layout
    wanted: Named


class Found(NamedTuple):
    """`targets` are what `ops` make of `sources`; `rivals` are other sources that would have done as well."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    ops: tuple[Op, ...]
    how: str = VALUES
    rivals: tuple[str, ...] = ()


def made_of(entry: Found, source: Named) -> list[tuple[str, Expr]]:
    """The targets of a finding as expressions over the source's tensors."""
    values: tuple[Expr, ...] = tuple(source[name] for name in entry.sources)
    for op in entry.ops:
        values = run(op, values)
    return list(zip(entry.targets, values, strict=True))

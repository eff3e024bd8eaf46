"""What a search finds, whichever way it searches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from converter.layouts.spec import CanonicalLayout
from converter.tensors.lazy_tensor import LazyTensor
from converter.tensors.ops import Op, apply_op

# How a tensor was found.
VALUES = "values"
ALIKE = "values that several tensors have, and name"
NAME = "shape and name"

Named = Mapping[str, LazyTensor]


class Job(NamedTuple):
    """What is to be derived from: two names for people, and what stands behind them.

    `tensors` are the source's. `layout` is the target's, and `wanted` its tensors under the canonical names: none where
    a layout's name alone was given.
    """

    source: str
    tensors: Named
    target: str
    layout: str
    canonical: CanonicalLayout
    wanted: Named


class Found(NamedTuple):
    """`targets` are what `ops` make of `sources`; `rivals` are other sources that would have done as well."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    ops: tuple[Op, ...]
    how: str = VALUES
    rivals: tuple[str, ...] = ()


def made_of(entry: Found, source: Named) -> list[tuple[str, LazyTensor]]:
    """The targets of a finding as expressions over the source's tensors."""
    values: tuple[LazyTensor, ...] = tuple(source[name] for name in entry.sources)
    for op in entry.ops:
        values = apply_op(op, values)
    return list(zip(entry.targets, values, strict=True))

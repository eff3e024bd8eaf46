"""The two sides of a derivation, and the matches of their tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from converter.layouts.spec import CanonicalLayout
from converter.tensors.lazy_tensor import LazyTensor
from converter.tensors.ops import Op, apply_op

Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True, slots=True)
class TensorMatch:
    """The source tensors `sources`, the canonical tensors `targets`, and the operations from one to the other."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    ops: tuple[Op, ...]

    def outputs(self, tensors: Tensors) -> dict[str, LazyTensor]:
        """Return the targets as lazy tensors; ValueError if the operations do not allow the shapes of the sources."""
        values: tuple[LazyTensor, ...] = tuple(tensors[name] for name in self.sources)
        for op in self.ops:
            values = apply_op(op, values)
        return dict(zip(self.targets, values, strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """The source of a derivation, in an unknown layout, and the target, with the same weights in a known layout."""

    layout: str  # The new name for the layout of the source
    source: str  # The name of the source, for messages
    tensors: Tensors
    selected: Tensors  # Those that may match: under the prefix that the user chose
    prefix: str | None  # This prefix; None if the user chose none
    target: str  # The name of the target, for messages
    canonical: CanonicalLayout
    expected: Tensors  # The tensors of the target by canonical names; empty if the target is only a layout's name

    @property
    def generated(self) -> Tensors:
        """The target tensors that are generated where a checkpoint lacks them."""
        specs = {name: self.canonical.spec(name) for name in self.expected}
        return {name: self.expected[name] for name, spec in specs.items() if spec and spec.generate}

    def missing(self, matches: Iterable[TensorMatch]) -> list[str]:
        """Return the target tensors without a match, except those that may be generated."""
        skipped = set(self.generated).union(*(match.targets for match in matches))
        return [name for name in self.expected if name not in skipped]

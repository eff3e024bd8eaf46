"""Matches of tensors, and the tensors on both sides without a match."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from converter.derivation.comparison import Comparison, Tensors
from converter.derivation.rules import common_start
from converter.layouts.spec import CanonicalLayout
from converter.tensors.lazy_tensor import LazyTensor
from converter.tensors.ops import Op, apply_op


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


def encoder_prefix(matches: Iterable[TensorMatch], canonical: CanonicalLayout) -> str:
    """Return the longest common prefix, in whole segments, of the source names that match the encoder's tensors."""
    segments = common_start([name.split(".")[:-1] for name in _encoder_sources(matches, canonical)])
    return "".join(f"{segment}." for segment in segments)


def _encoder_sources(matches: Iterable[TensorMatch], canonical: CanonicalLayout) -> list[str]:
    return [name for match in matches if any(map(canonical.spec, match.targets)) for name in match.sources]


def find_leftovers(comparison: Comparison, matches: list[TensorMatch], prefix: str) -> list[str]:
    """Return the source tensors without a match inside matched modules, such as LoRA factors and adapters.

    A module is given by the first segment after the prefix. Tensors like those that the encoder generates, such as the
    position indices of a second encoder, are not counted.

    Args:
        comparison: The source and the target.
        matches: The matches between their tensors.
        prefix: The prefix of the encoder's names in the source.
    """
    tails = [name.removeprefix(prefix) for name in _encoder_sources(matches, comparison.canonical)]
    modules = tuple({f"{prefix}{tail.partition('.')[0]}." for tail in tails if "." in tail})
    used = {name for match in matches for name in match.sources}
    values = [comparison.expected[name] for name in generated_names(comparison)]
    generated = {(value.dtype, value.shape) for value in values}
    unused = [item for item in comparison.tensors.items() if item[0].startswith(modules) and item[0] not in used]
    return [name for name, value in unused if (value.dtype, value.shape) not in generated]


def find_missing(comparison: Comparison, matches: Iterable[TensorMatch]) -> list[str]:
    """Return the target tensors without a match, except those that may be generated."""
    skipped = generated_names(comparison).union(*(match.targets for match in matches))
    return [name for name in comparison.expected if name not in skipped]


def generated_names(comparison: Comparison) -> set[str]:
    """Return the names of target tensors that are generated where a checkpoint lacks them."""
    specs = {name: comparison.canonical.spec(name) for name in comparison.expected}
    return {name for name, spec in specs.items() if spec and spec.generate}

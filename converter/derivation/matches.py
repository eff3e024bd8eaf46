"""Matches of tensors, and what they leave over or lack."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from converter.derivation.comparison import Comparison, Tensors
from converter.derivation.rules import common_start
from converter.errors import LayoutError
from converter.layouts.claims import summary
from converter.layouts.spec import CanonicalLayout
from converter.layouts.template import any_match
from converter.tensors.lazy_tensor import LazyTensor
from converter.tensors.ops import Op, apply_op


@dataclass(frozen=True, slots=True)
class TensorMatch:
    """`ops` turn the source's tensors `sources` into the canonical tensors `targets`."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    ops: tuple[Op, ...]

    def outputs(self, tensors: Tensors) -> dict[str, LazyTensor]:
        """Return the targets as expressions over the source's tensors; ValueError if the shapes do not allow it."""
        values: tuple[LazyTensor, ...] = tuple(tensors[name] for name in self.sources)
        for op in self.ops:
            values = apply_op(op, values)
        return dict(zip(self.targets, values, strict=True))


def encoder_prefix(matches: Iterable[TensorMatch], canonical: CanonicalLayout) -> str:
    """Return the longest prefix, in whole segments, of all source names that lead to the encoder's own tensors."""
    segments = common_start([name.split(".")[:-1] for name in _encoder_sources(matches, canonical)])
    return "".join(f"{segment}." for segment in segments)


def _encoder_sources(matches: Iterable[TensorMatch], canonical: CanonicalLayout) -> list[str]:
    return [name for match in matches if any(map(canonical.spec, match.targets)) for name in match.sources]


def check_leftovers(comparison: Comparison, matches: list[TensorMatch]) -> None:
    """Raise LayoutError if tensors are left over inside matched modules, such as LoRA factors and adapters.

    A module is the first segment that names of the encoder's tensors have after their common prefix.
    """
    prefix = encoder_prefix(matches, comparison.canonical)
    tails = [name.removeprefix(prefix) for name in _encoder_sources(matches, comparison.canonical)]
    modules = tuple({f"{prefix}{tail.partition('.')[0]}." for tail in tails if "." in tail})
    used = {name for match in matches for name in match.sources}
    left = [name for name in comparison.tensors if name.startswith(modules) and name not in used]
    if left:
        raise LayoutError(
            f"{comparison.source}: {len(left)} tensors inside the matched modules have no counterpart in "
            f"{comparison.target}:\n{summary([f'  {name!r}' for name in left])}",
            "merge adapters such as LoRA into the weights first; remove what the model does not need",
        )


def find_missing(comparison: Comparison, matches: Iterable[TensorMatch]) -> list[str]:
    """Return the names of the target's tensors that no match gives, except those that may be generated or missing."""
    given = {name for match in matches for name in match.targets}
    specs = comparison.canonical.tensors
    if comparison.expected:
        generated = [spec.name for spec in specs if spec.generate]
        return [name for name in comparison.expected if name not in given and not any_match(generated, name)]
    required = [spec.name for spec in specs if not (spec.generate or spec.optional)]
    bindings = [found for template in required for name in given if (found := template.match(name))]
    layers = 1 + max((int(found["layer"]) for found in bindings if "layer" in found), default=0)
    return [name for template in required for name in template.names(layers) if name not in given]

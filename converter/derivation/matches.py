"""Matches of tensors, and the tensors on both sides without a match."""

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


def check_leftovers(comparison: Comparison, matches: list[TensorMatch]) -> None:
    """Raise LayoutError if matched modules have tensors without a match, such as LoRA factors and adapters.

    A module is given by the first segment after the common prefix of the names.
    """
    prefix = encoder_prefix(matches, comparison.canonical)
    tails = [name.removeprefix(prefix) for name in _encoder_sources(matches, comparison.canonical)]
    modules = tuple({f"{prefix}{tail.partition('.')[0]}." for tail in tails if "." in tail})
    used = {name for match in matches for name in match.sources}
    leftover = [name for name in comparison.tensors if name.startswith(modules) and name not in used]
    if leftover:
        raise LayoutError(
            f"{comparison.source}: {len(leftover)} tensors inside the matched modules have no counterpart in "
            f"{comparison.target}:\n{summary([f'  {name!r}' for name in leftover])}",
            "merge adapters such as LoRA into the weights first; remove what the model does not need",
        )


def find_missing(comparison: Comparison, matches: Iterable[TensorMatch]) -> list[str]:
    """Return the target tensors without a match, except those that may be generated or missing."""
    matched = {name for match in matches for name in match.targets}
    specs = comparison.canonical.tensors
    if comparison.expected:
        generated = [spec.name for spec in specs if spec.generate]
        return [name for name in comparison.expected if name not in matched and not any_match(generated, name)]
    required = [spec.name for spec in specs if not (spec.generate or spec.optional)]
    bindings = [values for template in required for name in matched if (values := template.match(name))]
    num_layers = 1 + max((int(values["layer"]) for values in bindings if "layer" in values), default=0)
    return [name for template in required for name in template.names(num_layers) if name not in matched]

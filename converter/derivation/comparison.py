"""The two sides of a derivation, the matches of their tensors, and the tensors without a match.

The source has an unknown layout; the target has the same weights in a known layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from converter.checkpoint.open import Checkpoint
from converter.derivation.rules import common_start
from converter.errors import LayoutError, UsageError
from converter.layouts import registry
from converter.layouts.detect import detect_layouts, select_state_dicts
from converter.layouts.spec import CanonicalLayout
from converter.options import ConvertOptions
from converter.plan.plan import Plan
from converter.plan.planner import plan_to_canonical
from converter.tensors.lazy_tensor import LazyTensor
from converter.tensors.ops import Op, apply_op

Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """The source and the target of a derivation."""

    layout: str  # The new name for the layout of the source
    source: str  # The name of the source, for messages
    tensors: Tensors
    selected: Tensors  # Those that may match: under the prefix that the user chose
    prefix: str | None  # This prefix; None if the user chose none
    target: str  # The name of the target, for messages
    canonical: CanonicalLayout
    expected: Tensors  # The tensors of the target by canonical names; empty if the target is only a layout's name


def plan_target(opened: Checkpoint, family: str) -> Plan:
    """Return the plan that converts a target to canonical names.

    Raises:
        LayoutError: The target has no known layout.
        UsageError: The target contains several families and `family` is empty, or several encoders of one.
    """
    state_dicts, families = select_state_dicts(opened, None), [family] if family else registry.families()
    detected = {name: detect_layouts(opened, registry.layouts(name), state_dicts) for name in families}
    found = [name for name, layouts in detected.items() if layouts]
    if not found:
        known = "list the known layouts with: dsocr-convert mapping list"
        raise LayoutError(f"{opened.name}: TARGET has no known layout", known)
    if len(found) > 1:
        raise UsageError(f"{opened.name}: contains {' and '.join(found)}", "choose one with --family")
    layout, *others = detected[found[0]]
    if others:
        hint = f"convert one of them to a file: dsocr-convert {found[0]} with --prefix or --state-dict"
        raise UsageError(f"{opened.name}: TARGET holds {1 + len(others)} {found[0].upper()} encoders", hint)
    return plan_to_canonical(opened, layout, ConvertOptions(found[0]))


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


def find_leftovers(comparison: Comparison, matches: list[TensorMatch]) -> list[str]:
    """Return the source tensors without a match inside matched modules, such as LoRA factors and adapters.

    A module is given by the first segment after the encoder's prefix. Tensors like those that the encoder generates,
    such as the position indices of a second encoder, are not counted.
    """
    prefix = encoder_prefix(matches, comparison.canonical)
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

"""The input of a derivation: a checkpoint in an unknown layout, and the same weights in a known layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from converter.checkpoint.open import Checkpoint
from converter.errors import LayoutError, UsageError
from converter.layouts import registry
from converter.layouts.detect import detect_layouts, select_state_dicts
from converter.layouts.spec import CanonicalLayout
from converter.options import ConvertOptions
from converter.plan.plan import Plan
from converter.plan.planner import plan_to_canonical
from converter.tensors.lazy_tensor import LazyTensor

Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """The source and the target of a derivation.

    Attributes:
        layout: The new name for the layout of the source.
        source: The name of the source, for messages.
        tensors: The tensors of the source.
        target: The name of the target, for messages.
        canonical: The canonical layout of the target's family.
        expected: The tensors of the target by canonical names; empty if the target is only a layout's name.
    """

    layout: str
    source: str
    tensors: Tensors
    target: str
    canonical: CanonicalLayout
    expected: Tensors


def plan_target(opened: Checkpoint, family: str) -> Plan:
    """Return the plan that converts a target to canonical names.

    Raises:
        LayoutError: The target has no known layout.
        UsageError: The target contains several families, and `family` is empty.
    """
    state_dicts = select_state_dicts(opened, None)
    detected = {name: detect_layouts(opened, registry.layouts(name), state_dicts) for name in registry.families()}
    layouts = {name: matches[0] for name, matches in detected.items() if matches and family in ("", name)}
    if not layouts:
        raise LayoutError(
            f"{opened.name}: TARGET has no known layout", "list the known layouts with: dsocr-convert mapping list"
        )
    if len(layouts) > 1:
        raise UsageError(f"{opened.name}: contains {' and '.join(layouts)}", "choose one with --family")
    ((chosen, layout),) = layouts.items()
    return plan_to_canonical(opened, layout, ConvertOptions(chosen))

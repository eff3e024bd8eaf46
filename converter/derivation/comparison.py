"""What a derivation compares: a checkpoint in an unknown layout, and a known one of the same weights."""

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
    """Both sides of a derivation; `source` and `target` are their names for messages.

    `layout` is the name for the layout of the source. `tensors` are the source's, `expected` the target's by their
    canonical names: none if the target is a layout's name alone.
    """

    layout: str
    source: str
    tensors: Tensors
    target: str
    canonical: CanonicalLayout
    expected: Tensors


def plan_target(opened: Checkpoint, family: str) -> Plan:
    """Return the plan that brings a target to canonical names.

    LayoutError if it has no known layout, UsageError if it holds several families and `family` is empty.
    """
    entries = select_state_dicts(opened, None)
    detected = {name: detect_layouts(opened, registry.entries(name), entries) for name in registry.families()}
    layouts = {name: found[0] for name, found in detected.items() if found and family in ("", name)}
    if not layouts:
        raise LayoutError(f"{opened.name}: TARGET has no known layout", "known ones: dsocr-convert mapping list")
    if len(layouts) > 1:
        raise UsageError(f"{opened.name}: holds {' and '.join(layouts)}", "choose one with --family")
    ((chosen, layout),) = layouts.items()
    return plan_to_canonical(opened, layout, ConvertOptions(chosen))

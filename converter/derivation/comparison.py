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
    """The source and the target of a derivation."""

    layout: str  # The new name for the layout of the source
    source: str  # The name of the source, for messages
    tensors: Tensors
    selected: Tensors  # Those that may match: under the prefix that the user chose
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

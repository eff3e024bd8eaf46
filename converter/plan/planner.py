"""Plans the conversion of an opened checkpoint: detect its layout, map it to the canonical one, then to the target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from converter.checkpoint.open import Checkpoint
from converter.errors import LayoutError, MappingError, UsageError
from converter.layouts import registry
from converter.layouts.detect import DetectedLayout, detect_layout
from converter.layouts.registry import LayoutEntry
from converter.layouts.spec import LayoutMapping
from converter.options import ConvertOptions, check_choices
from converter.plan.plan import Plan, make_plan
from converter.plan.route import complete_from, retarget
from converter.tensors.lazy_tensor import LazyTensor, lazy_read


class ResolvedPlan(NamedTuple):
    """A checkpoint recognised, and what it becomes."""

    known: DetectedLayout
    plan: Plan


def resolve_to_canonical(opened: Checkpoint, options: ConvertOptions, dtype: str = "keep") -> ResolvedPlan:
    """Plan the conversion of a checkpoint to the canonical layout; LayoutError or MappingError if impossible."""
    known = detect_layout(opened, options.family, _layouts(options), options.state_dict)
    return ResolvedPlan(known, plan_to_canonical(opened, known, options, dtype))


def plan_to_canonical(opened: Checkpoint, known: DetectedLayout, options: ConvertOptions, dtype: str = "keep") -> Plan:
    """Plan the conversion of a detected checkpoint to the canonical layout; MappingError if the tensors do not fit."""
    layout = known.match.layout
    canonical = registry.canonical(options.family)
    mapping = layout.mapping
    tensors: dict[str, LazyTensor] = {name: lazy_read(tensor) for name, tensor in known.tensors.items()}
    prefix, pixels = known.match.prefix, options.image_size
    try:
        return make_plan(mapping, prefix, canonical, tensors, opened.name, dtype=dtype, image_size=pixels)
    except MappingError as error:
        raise MappingError(f"{error}", f"{_next_step(mapping, options)}") from error


def _next_step(mapping: LayoutMapping, options: ConvertOptions) -> str:
    """What to do where a checkpoint was recognised and does not fit all the same."""
    if options.mapping is not None:
        return f"correct {options.mapping}, or leave --mapping out if the checkpoint is of a known layout"
    return (
        f"the checkpoint is incomplete, or differs from {mapping.name}: get a whole one, or say what is to be done\n"
        f"in a mapping of your own: dsocr-convert mapping show {mapping.name} > mine.yaml; then --mapping mine.yaml"
    )


def resolve(opened: Checkpoint, options: ConvertOptions, donor: Checkpoint | None) -> ResolvedPlan:
    """The plan for a checkpoint; what it lacks is taken from `lender`, another one of the same model's sizes.

    LayoutError where it is of no known layout, or converted already; MappingError where it does not fit; UsageError for
    a `lender` of other sizes.
    """
    known, plan = resolve_to_canonical(
        opened, options, dtype="keep" if options.layout != options.canonical or donor else options.dtype
    )
    if options.layout == options.canonical and donor is None:
        check_not_converted(opened, known)
    lent = _lent(donor, plan, options) if donor is not None else None
    if options.layout == options.canonical:
        return ResolvedPlan(known, complete_from(plan, lent, options.dtype) if lent else plan)
    target = registry.load(options.layout).mapping
    return ResolvedPlan(known, retarget(plan, target, lent, options.full_model, options.dtype, opened.name))


def check_not_converted(opened: Checkpoint, known: DetectedLayout) -> None:
    """LayoutError for a checkpoint that is in the canonical layout already."""
    layout = known.match.layout
    if layout.is_canonical:
        raise LayoutError(
            f"{opened.name}: is in the layout {layout.name} already: there is nothing to convert", "load it as it is"
        )


def _lent(donor: Checkpoint, plan: Plan, options: ConvertOptions) -> Plan:
    lent = resolve_to_canonical(donor, ConvertOptions(options.family, image_size=options.image_size)).plan
    differing = [name for name, size in plan.sizes.items() if lent.sizes.get(name, size) != size]
    if differing:
        sizes = ", ".join(f"{name} {lent.sizes[name]} (not {plan.sizes[name]})" for name in differing)
        raise UsageError(f"--fill-from {donor.name}: is of another size: {sizes}")
    return lent


def _layouts(options: ConvertOptions) -> Sequence[LayoutEntry]:
    if options.mapping is None:
        return registry.entries(options.family)
    own = registry.load_file(Path(options.mapping))
    if own.family != options.family:
        raise UsageError(
            f"--mapping {options.mapping}: is for the family {own.family!r}, not {options.family!r}",
            f"run: dsocr-convert {own.family} ... --mapping {options.mapping}",
        )
    return registry.entry_of(own)


def check_options(options: ConvertOptions) -> None:
    """UsageError for a family or a layout that does not exist."""
    check_choices(family=(options.family, registry.families()))
    layouts = registry.names_of_family(options.family)
    if options.layout not in layouts:
        raise UsageError(f"--to {options.to}: no layout of {options.family.upper()}", f"layouts: {', '.join(layouts)}")

"""From an opened checkpoint to the plan of what was asked for: recognised, led to the hub, and on to another layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from converter import catalogue
from converter.catalogue import Candidate
from converter.errors import LayoutError, MappingError, UsageError
from converter.mapping.expr import Expr, read
from converter.mapping.parse import FAMILIES
from converter.mapping.plan import Plan, make_plan
from converter.mapping.route import completed, identity, retarget
from converter.mapping.rules import Layout, Mapping
from converter.recognition import Identified, identify
from converter.source import Source

DTYPES = ("keep", "float32", "float16", "bfloat16")
# Positions of CLIP-L for such images take 1.4 GB, which are computed in memory.
_LARGEST_IMAGE = 8192


class Wish(NamedTuple):
    """What a conversion is to give: tensors of `family` in the layout `to` (the hub's, if empty).

    `whole` takes along what lies beside the encoder: SAM's decoder, CLIP's text tower. For the rest see `convert`.
    """

    family: str
    to: str = ""
    mapping: str | Path | None = None
    dtype: str = "keep"
    image_size: int | None = None
    state_dict: str | None = None
    whole: bool = False

    def checked(self) -> Wish:
        """UsageError for a family, a type or a layout that does not exist, or options that contradict each other."""
        check_choices(family=(self.family, FAMILIES), dtype=(self.dtype, DTYPES))
        layouts = catalogue.names_of(self.family)
        if self.to and self.to not in layouts:
            raise UsageError(f"--to {self.to}: no layout of {self.family.upper()}\nlayouts: {', '.join(layouts)}")
        if self.image_size is not None and self.image_size > _LARGEST_IMAGE:
            raise UsageError(f"--image-size {self.image_size}: larger than {_LARGEST_IMAGE} pixels")
        if self.whole and self.to in ("", self.hub):
            raise UsageError(f"--whole: {self.hub} holds the encoder alone\nname another layout with --to")
        return self._replace(to=self.to or self.hub)

    @property
    def hub(self) -> str:
        return f"deepencoder-{self.family}"


class Planned(NamedTuple):
    """A checkpoint recognised, and what it becomes."""

    known: Identified
    plan: Plan


def to_hub(opened: Source, wish: Wish, dtype: str = "keep") -> Planned:
    """The plan that leads a checkpoint to its family's hub; LayoutError or MappingError where there is none."""
    known = identify(opened, wish.family, _layouts(wish), wish.state_dict)
    return Planned(known, hub_plan(opened, known, wish, dtype))


def hub_plan(opened: Source, known: Identified, wish: Wish, dtype: str = "keep") -> Plan:
    """The plan to the hub for a checkpoint that was recognised; MappingError where it does not fit all the same."""
    layout = known.match.candidate.load()
    hub = catalogue.hub(wish.family)
    mapping = identity(hub) if isinstance(layout, Layout) else layout
    tensors: dict[str, Expr] = {name: read(tensor) for name, tensor in known.tensors.items()}
    prefix, pixels = known.match.prefix, wish.image_size
    try:
        return make_plan(mapping, prefix, hub, tensors, opened.name, dtype=dtype, image_size=pixels)
    except MappingError as error:
        raise MappingError(f"{error}\n{_next_step(mapping, wish)}") from error


def _next_step(mapping: Mapping, wish: Wish) -> str:
    """What to do where a checkpoint was recognised and does not fit all the same."""
    if wish.mapping is not None:
        return f"correct {wish.mapping}, or leave --mapping out if the checkpoint is of a known layout"
    return (
        f"the checkpoint is incomplete, or differs from {mapping.name}: get a whole one, or say what is to be done\n"
        f"in a mapping of your own: dsocr-convert mapping show {mapping.name} > mine.yaml; then --mapping mine.yaml"
    )


def planned(opened: Source, wish: Wish, lender: Source | None) -> Planned:
    """The plan for a checkpoint; what it lacks is taken from `lender`, another one of the same model's sizes.

    LayoutError where it is of no known layout, or converted already; MappingError where it does not fit; UsageError for
    a `lender` of other sizes.
    """
    known, plan = to_hub(opened, wish, dtype="keep" if wish.to != wish.hub or lender else wish.dtype)
    if wish.to == wish.hub and lender is None:
        check_not_converted(opened, known)
    lent = _lent(lender, plan, wish) if lender is not None else None
    if wish.to == wish.hub:
        return Planned(known, completed(plan, lent, wish.dtype) if lent else plan)
    target = catalogue.load(wish.to)
    assert isinstance(target, Mapping)
    return Planned(known, retarget(plan, target, lent, wish.whole, wish.dtype, opened.name))


def check_not_converted(opened: Source, known: Identified) -> None:
    """LayoutError for a checkpoint that has the hub's layout already."""
    layout = known.match.candidate.load()
    if isinstance(layout, Layout):
        raise LayoutError(
            f"{opened.name}: is in the layout {layout.name} already: there is nothing to convert\nload it as it is"
        )


def _lent(lender: Source, plan: Plan, wish: Wish) -> Plan:
    lent = to_hub(lender, Wish(wish.family, image_size=wish.image_size)).plan
    differing = [name for name, size in plan.sizes.items() if lent.sizes.get(name, size) != size]
    if differing:
        sizes = ", ".join(f"{name} {lent.sizes[name]} (not {plan.sizes[name]})" for name in differing)
        raise UsageError(f"--fill-from {lender.name}: is of another size: {sizes}")
    return lent


def _layouts(wish: Wish) -> Sequence[Candidate]:
    if wish.mapping is None:
        return catalogue.candidates(wish.family)
    own = catalogue.load_file(Path(wish.mapping))
    if own.family != wish.family:
        raise UsageError(
            f"--mapping {wish.mapping}: is for the family {own.family!r}, not {wish.family!r}\n"
            f"run: dsocr-convert {own.family} ... --mapping {wish.mapping}"
        )
    return catalogue.only(own)


def check_choices(**choices: tuple[str, Sequence[str]]) -> None:
    """UsageError for an option's value that is none of those allowed."""
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise UsageError(f"{name} {value!r}: expected one of {', '.join(allowed)}")

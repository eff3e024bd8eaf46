"""The two sides of a verification: the converted file, and the source with the plan that should have made it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from converter import catalogue
from converter.checkpoint import Tensor
from converter.errors import LayoutError, UsageError
from converter.mapping.expr import sources
from converter.mapping.parse import FAMILIES
from converter.mapping.plan import Plan
from converter.mapping.rules import Layout
from converter.planning import Wish, hub_plan, to_hub
from converter.recognition import chosen_state_dicts, identified
from converter.source import Progress, Source
from converter.unwrap import StateDict
from converter.verify.independent import Reader, open_independently


class Converted(NamedTuple):
    """The file to be verified: where its tensors are, and the family they are of."""

    source: Source
    state_dict: StateDict
    family: str


class Origin(NamedTuple):
    """The source it was converted from, the plan by which it should have been, and a reader that is not ours.

    `own` are the tensors under the layout's prefix: what the source's own library is loaded with. `resampled` tells
    that positions were: that library then cannot run what was made of it.
    """

    source: Source
    own: dict[str, Tensor]
    plan: Plan
    read: Reader
    resampled: bool


def largest(source: Source) -> StateDict:
    """The state dict of a file that dsocr-convert wrote, which has one."""
    return max(chosen_state_dicts(source, None), key=lambda entry: len(entry.tensors))


def as_converted(source: Source) -> Converted:
    """The family is the one whose names most of the tensors have: a few wrong ones are for the checks to find."""
    entry = largest(source)
    counts = {family: catalogue.count_known(family, entry.tensors) for family in FAMILIES}
    family = max(counts, key=lambda family: counts[family])
    # A damaged conversion fits no layout; one that fits another is no conversion into the DeepEncoder's.
    fitting = [hit for each in FAMILIES for hit in identified(source, catalogue.candidates(each), [entry])]
    names = [hit.match.candidate.name for hit in fitting]
    other = next((name for name in names if name != f"deepencoder-{family}"), "")
    if other or counts[family] <= len(entry.tensors) / 2:
        what = f"is in the layout {other}" if other else "is not in the DeepEncoder's layout"
        families = [other.split("-")[0]] if other else FAMILIES
        commands = " or ".join(f"dsocr-convert {each} {source.name}" for each in families)
        raise LayoutError(
            f"{source.name}: {what}; the DeepEncoder's is what is verified\n"
            f"convert it first: {commands}; other layouts are checked against their card, with --card"
        )
    return Converted(source, entry, family)


def as_origin(
    source: Source, target: Converted, mapping: str | Path | None, state_dict: str | None, progress: Progress
) -> Origin:
    """The source, and the plan that `convert` would have made with the options that the converted file shows."""
    wish = Wish(target.family, mapping=mapping, state_dict=state_dict)
    known, plan = to_hub(source, wish)
    layout = known.match.candidate.load()
    if isinstance(layout, Layout):
        raise UsageError(
            f"--source {source.name}: is itself in the layout {layout.name}\ngive what it was converted from"
        )
    dtype, pixels = _options(plan, target)
    if dtype != "keep" or pixels is not None:
        plan = hub_plan(source, known, wish._replace(image_size=pixels), dtype)
    own = {name: tensor for name, tensor in known.tensors.items() if name.startswith(known.match.prefix)}
    wanted = [*(tensor for value in plan.outputs.values() for tensor in sources(value)), *own.values()]
    reader = open_independently(source, known.state_dict, wanted, progress)
    return Origin(source, own, plan, reader, pixels is not None)


def _options(plan: Plan, target: Converted) -> tuple[str, int | None]:
    """`--dtype` and `--image-size` as they must have been, told from the converted tensors."""
    found = {tensor.dtype.name for tensor in target.state_dict.tensors.values() if tensor.dtype.is_float}
    kept = {value.dtype.name for value in plan.outputs.values() if value.dtype.is_float}
    dtype = found.pop() if len(found) == 1 and found != kept else "keep"
    for spec in plan.target.tensors:
        tensor = target.state_dict.tensors.get(spec.name.text) if spec.positions else None
        if tensor is None or tensor.shape == plan.outputs[spec.name.text].shape:
            continue
        grid = math.isqrt(max(tensor.shape[0] - 1, 0))
        # A table that is no class token and square grid was not resampled: it is wrong, and the bytes will tell.
        if grid and grid**2 + 1 == tensor.shape[0]:
            return dtype, grid * plan.sizes.get("patch", plan.target.sizes["patch"])
    return dtype, None

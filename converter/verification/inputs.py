"""The two sides of a verification: the converted file, and the source with the plan that should have made it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from converter.checkpoint.open import Checkpoint
from converter.checkpoint.state_dict import StateDict
from converter.errors import LayoutError, UsageError
from converter.layouts import registry
from converter.layouts.detect import detect_layouts, select_state_dicts
from converter.options import ConvertOptions
from converter.plan.plan import Plan
from converter.plan.planner import plan_to_canonical, resolve_to_canonical
from converter.storage.progress import OnProgress
from converter.tensors.lazy_tensor import source_tensors
from converter.tensors.tensor_info import TensorInfo
from converter.verification.reference_readers import Reader, open_independently


class Converted(NamedTuple):
    """The file to be verified: where its tensors are, and the family they are of."""

    source: Checkpoint
    state_dict: StateDict
    family: str


class Origin(NamedTuple):
    """The source it was converted from, the plan by which it should have been, and a reader that is not ours.

    `own` are the tensors under the layout's prefix: what the source's own library is loaded with. `resampled` tells
    that positions were: that library then cannot run what was made of it.
    """

    source: Checkpoint
    own: dict[str, TensorInfo]
    plan: Plan
    read: Reader
    resampled: bool


def largest(source: Checkpoint) -> StateDict:
    """The state dict of a file that dsocr-convert wrote, which has one."""
    return max(select_state_dicts(source, None), key=lambda entry: len(entry.tensors))


def as_converted(source: Checkpoint) -> Converted:
    """The family is the one whose names most of the tensors have: a few wrong ones are for the checks to find."""
    entry = largest(source)
    counts = {family: registry.count_known(family, entry.tensors) for family in registry.families()}
    family = max(counts, key=lambda family: counts[family])
    # A damaged conversion fits no layout; one that fits another is no conversion into the DeepEncoder's.
    fitting = [hit for each in registry.families() for hit in detect_layouts(source, registry.entries(each), [entry])]
    names = [hit.match.name for hit in fitting]
    other = next((name for name in names if name != f"deepencoder-{family}"), "")
    if other or counts[family] <= len(entry.tensors) / 2:
        what = f"is in the layout {other}" if other else "is not in the DeepEncoder's layout"
        families = [other.split("-")[0]] if other else registry.families()
        commands = " or ".join(f"dsocr-convert {each} {source.name}" for each in families)
        raise LayoutError(
            f"{source.name}: {what}; the DeepEncoder's is what is verified",
            f"convert it first: {commands}; other layouts are checked against their card, with --record",
        )
    return Converted(source, entry, family)


def as_origin(
    source: Checkpoint, target: Converted, mapping: str | Path | None, state_dict: str | None, on_progress: OnProgress
) -> Origin:
    """The source, and the plan that `convert` would have made with the options that the converted file shows."""
    options = ConvertOptions(target.family, mapping=mapping, state_dict=state_dict)
    known, plan = resolve_to_canonical(source, options)
    layout = known.match.layout
    if layout.is_canonical:
        raise UsageError(
            f"--source {source.name}: is itself in the layout {layout.name}", "give what it was converted from"
        )
    dtype, pixels = _options(plan, target)
    if dtype != "keep" or pixels is not None:
        plan = plan_to_canonical(source, known, replace(options, image_size=pixels), dtype)
    own = {name: tensor for name, tensor in known.tensors.items() if name.startswith(known.match.prefix)}
    wanted = [*(tensor for value in plan.outputs.values() for tensor in source_tensors(value)), *own.values()]
    reader = open_independently(source, known.state_dict, wanted, on_progress)
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

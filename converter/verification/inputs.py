"""The inputs of a verification: the converted file, and the source with the plan that should have produced it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

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


@dataclass(frozen=True)
class Converted:
    """The converted file; `read` reads tensors with the format's own library."""

    source: Checkpoint
    family: str
    tensors: Mapping[str, TensorInfo]
    read: Reader


@dataclass(frozen=True)
class Origin:
    """The source of the converted file, and the conversion with the options that the converted file shows.

    `own` are the tensors that the source's own library loads: those under the layout's prefix, but none if positions
    were resampled.
    """

    source: Checkpoint
    own: Mapping[str, TensorInfo]
    plan: Plan
    read: Reader


def open_any_layout(source: Checkpoint, family: str, on_progress: OnProgress) -> Converted:
    """A converted file of any layout.

    Args:
        source: The opened file.
        family: The family of its encoder.
        on_progress: Called as tensors are fetched from a hub.
    """
    state_dict = _largest_state_dict(source)
    read = open_independently(source, state_dict, state_dict.tensors.values(), on_progress)
    return Converted(source, family, state_dict.tensors, read)


def _largest_state_dict(source: Checkpoint) -> StateDict:
    """The state dict with the most tensors; a file that dsocr-convert wrote has only one."""
    return max(select_state_dicts(source, None), key=lambda entry: len(entry.tensors))


def open_converted(source: Checkpoint, on_progress: OnProgress) -> Converted:
    """The converted file, of the family that most of its tensors belong to.

    Raises:
        LayoutError: The file does not have a canonical layout.
    """
    state_dict = _largest_state_dict(source)
    counts = {family: registry.count_known(family, state_dict.tensors) for family in registry.families()}
    family = max(counts, key=lambda name: counts[name])
    # A damaged conversion fits no layout at all, so that only fitting another one is an error.
    others = [
        (name, hit.match.name)
        for name in registry.families()
        for hit in detect_layouts(source, registry.entries(name), [state_dict])
        if hit.match.name != f"deepencoder-{family}"
    ]
    if not others and counts[family] > len(state_dict.tensors) / 2:
        return open_any_layout(source, family, on_progress)
    problem = f"has the layout {others[0][1]}" if others else "does not have the DeepEncoder's layout"
    commands = " or ".join(
        f"dsocr-convert {name} {source.name}" for name in ([others[0][0]] if others else registry.families())
    )
    raise LayoutError(
        f"{source.name}: {problem}, which cannot be verified",
        f"convert it first: {commands}; other layouts are compared with their conversion record (--record)",
    )


def open_origin(
    source: Checkpoint, target: Converted, mapping: str | Path | None, state_dict: str | None, on_progress: OnProgress
) -> Origin:
    """Plan the conversion of the source again, with the options that the converted file shows.

    Args:
        source: The opened source.
        target: The converted file.
        mapping: A mapping file, as for `convert`.
        state_dict: Which state dict of the source, as for `convert`.
        on_progress: Called as tensors are fetched from a hub.

    Raises:
        UsageError: The source has the canonical layout itself.
    """
    options = ConvertOptions(target.family, mapping=mapping, state_dict=state_dict)
    detected, plan = resolve_to_canonical(source, options)
    layout = detected.match.layout
    if layout.is_canonical:
        message = f"--source {source.name}: has the layout {layout.name} itself"
        raise UsageError(message, "specify the checkpoint that it was converted from")
    dtype, image_size = _infer_options(plan, target)
    if dtype != "keep" or image_size is not None:
        plan = plan_to_canonical(source, detected, replace(options, image_size=image_size), dtype)
    prefix, kept = detected.match.prefix, image_size is None
    own = {name: tensor for name, tensor in detected.tensors.items() if kept and name.startswith(prefix)}
    needed = [*(tensor for value in plan.outputs.values() for tensor in source_tensors(value)), *own.values()]
    read = open_independently(source, detected.state_dict, needed, on_progress)
    return Origin(source, own, plan, read)


def _infer_options(plan: Plan, target: Converted) -> tuple[str, int | None]:
    """`--dtype` and `--image-size` of the conversion, inferred from the converted tensors."""
    actual = {tensor.dtype.name for tensor in target.tensors.values() if tensor.dtype.is_float}
    kept = {value.dtype.name for value in plan.outputs.values() if value.dtype.is_float}
    dtype = next(iter(actual)) if len(actual) == 1 and actual != kept else "keep"
    for spec in plan.target.tensors:
        tensor = target.tensors.get(spec.name.text) if spec.is_position_embedding else None
        if tensor is None or tensor.shape == plan.outputs[spec.name.text].shape:
            continue
        grid = math.isqrt(max(tensor.shape[0] - 1, 0))
        # Only a class token and a square grid can be resampled positions; anything else fails the comparison of bytes.
        if grid and grid**2 + 1 == tensor.shape[0]:
            return dtype, grid * plan.sizes.get("patch", plan.target.sizes["patch"])
    return dtype, None

"""Inspects a checkpoint: contents, layouts, and what a conversion would write."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from converter.checkpoint.open import Checkpoint, check_hub_options, open_checkpoint
from converter.checkpoint.state_dict import StateDict
from converter.errors import DsocrError
from converter.layouts import registry
from converter.layouts.detect import detect_layouts, nearest_layout, select_state_dicts
from converter.layouts.parse import FAMILIES
from converter.options import ConvertOptions, HubOptions
from converter.output.record import FittingLayout, Inspection, group_layers
from converter.output.record_document import count_dtypes, make_record
from converter.plan.planner import ResolvedPlan, check_not_converted, plan_to_canonical
from converter.tensors.lazy_tensor import lazy_read


def inspect(source: str | Path, *, state_dict: str | None = None, **hub_options: Any) -> Inspection:
    """Report what a checkpoint holds, which layouts it fits and what a conversion would do; reads no weights.

    Args:
        source: A checkpoint, as in `convert`.
        state_dict: Which state dict of a file with several (model, ema; `.` for the top).
        **hub_options: The fields of `converter.options.HubOptions`: revision, hub, download.

    Raises:
        DsocrError: The source cannot be read or holds no tensors. An unknown layout is no error.
    """
    options = HubOptions(**hub_options)
    with closing(open_checkpoint(source, options)) as opened:
        check_hub_options(options, [opened])
        return _inspect(opened, state_dict)


def _inspect(opened: Checkpoint, state_dict: str | None) -> Inspection:
    entries = select_state_dicts(opened, state_dict)
    largest = max(entries, key=lambda entry: len(entry.tensors))
    recognised = [found for family in FAMILIES if (found := _recognised(opened, family, entries))]
    mappings = [mapping for family in FAMILIES for mapping in registry.mappings(family)]
    return Inspection(
        source=opened.name,
        files={file.name: file.size for file in opened.files},
        containers=sorted(set(opened.containers)),
        state_dicts={entry.path or ".": len(entry.tensors) for entry in entries},
        tensors=len(largest.tensors),
        nbytes=sum(tensor.nbytes for tensor in largest.tensors.values()),
        dtypes=count_dtypes([lazy_read(tensor) for tensor in largest.tensors.values()]),
        groups=group_layers(largest.tensors),
        recognised=recognised,
        nearest=[] if recognised else nearest_layout(opened, largest, mappings),
    )


def _recognised(opened: Checkpoint, family: str, entries: list[StateDict]) -> FittingLayout | None:
    """What `convert` would make of a source, or None where it is not of this family."""
    found = detect_layouts(opened, registry.entries(family), entries)
    if not found:
        return None
    layout = found[0].match.candidate.load()
    try:
        check_not_converted(opened, found[0])
        plan = plan_to_canonical(opened, found[0], ConvertOptions(family))
        card, problem = (
            make_record(opened, ResolvedPlan(found[0], plan), ConvertOptions(family), None, "safetensors"),
            "",
        )
    except DsocrError as error:
        card, problem = None, str(error)
    return FittingLayout(
        family=family,
        layout=layout.name,
        description=layout.description,
        prefix=found[0].wrapper + found[0].match.prefix,
        state_dicts=[hit.state_dict.path or "." for hit in found],
        evidence=found[0].match.evidence,
        card=card,
        problem=problem,
    )

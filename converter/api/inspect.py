"""What a checkpoint holds, which layouts it fits, and what a conversion would make of it: no weights are read."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from converter.checkpoint.open import Checkpoint, open_checkpoint
from converter.checkpoint.state_dict import StateDict
from converter.errors import DsocrError
from converter.hub.address import HubOptions
from converter.layouts import registry
from converter.layouts.detect import detect_layouts, nearest_layout, select_state_dicts
from converter.layouts.parse import FAMILIES
from converter.output.record import FittingLayout, Inspection, group_layers
from converter.output.record_document import count_dtypes, make_record
from converter.plan.planner import ConvertOptions, ResolvedPlan, check_not_converted, plan_to_canonical
from converter.tensors.lazy_tensor import lazy_read


def inspect(
    source: str | Path,
    *,
    state_dict: str | None = None,
    revision: str | None = None,
    hub: str | None = None,
    download: bool = False,
) -> Inspection:
    """What a checkpoint holds, which layouts it fits and what a conversion would do; no weights are read.

    `source`, `state_dict`, `revision`, `hub` and `download` are as in `convert`. Raises a DsocrError where the source
    cannot be read or holds no tensors; one of no known layout is no error.
    """
    with closing(open_checkpoint(source, HubOptions(revision, hub, download))) as opened:
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

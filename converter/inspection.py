"""What a checkpoint holds, which layouts it fits, and what a conversion would make of it: no weights are read."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from converter import catalogue
from converter.cards.card import count_dtypes, make_card
from converter.errors import DsocrError
from converter.hubs.address import Access
from converter.mapping.expr import read
from converter.mapping.parse import FAMILIES
from converter.planning import Planned, Wish, check_not_converted, hub_plan
from converter.recognition import chosen_state_dicts, identified, nearest_layout
from converter.report import Inspection, Recognised, fold
from converter.source import Source, open_source
from converter.unwrap import StateDict


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
    with closing(open_source(source, Access(revision, hub, download))) as opened:
        return _inspect(opened, state_dict)


def _inspect(opened: Source, state_dict: str | None) -> Inspection:
    entries = chosen_state_dicts(opened, state_dict)
    largest = max(entries, key=lambda entry: len(entry.tensors))
    recognised = [found for family in FAMILIES if (found := _recognised(opened, family, entries))]
    mappings = [mapping for family in FAMILIES for mapping in catalogue.mappings(family)]
    return Inspection(
        source=opened.name,
        files={file.name: file.size for file in opened.files},
        containers=sorted(set(opened.containers)),
        state_dicts={entry.path or ".": len(entry.tensors) for entry in entries},
        tensors=len(largest.tensors),
        nbytes=sum(tensor.nbytes for tensor in largest.tensors.values()),
        dtypes=count_dtypes([read(tensor) for tensor in largest.tensors.values()]),
        groups=fold(largest.tensors),
        recognised=recognised,
        nearest=[] if recognised else nearest_layout(opened, largest, mappings),
    )


def _recognised(opened: Source, family: str, entries: list[StateDict]) -> Recognised | None:
    """What `convert` would make of a source, or None where it is not of this family."""
    found = identified(opened, catalogue.candidates(family), entries)
    if not found:
        return None
    layout = found[0].match.candidate.load()
    try:
        check_not_converted(opened, found[0])
        plan = hub_plan(opened, found[0], Wish(family))
        card, problem = make_card(opened, Planned(found[0], plan), Wish(family), None, "safetensors"), ""
    except DsocrError as error:
        card, problem = None, str(error)
    return Recognised(
        family=family,
        layout=layout.name,
        description=layout.description,
        prefix=found[0].wrapper + found[0].match.prefix,
        state_dicts=[hit.state_dict.path or "." for hit in found],
        evidence=found[0].match.evidence,
        card=card,
        problem=problem,
    )

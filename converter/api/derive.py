"""A mapping file written from two checkpoints of the same weights, or from a checkpoint and a layout's names."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

from converter.checkpoint.open import Checkpoint, check_unchanged, open_checkpoint
from converter.checkpoint.state_dict import largest_state_dict, unwrapped_names
from converter.derivation.compose import Composed, compose, prove
from converter.derivation.found import ALIKE, NAME, VALUES, Found, Job
from converter.derivation.names import by_names
from converter.errors import LayoutError, MappingError, UsageError
from converter.layouts import registry
from converter.layouts.detect import detect_layouts, match_layouts, select_state_dicts
from converter.options import ConvertOptions
from converter.output.target import check_not_source, check_target
from converter.plan.planner import plan_to_canonical
from converter.storage.atomic_output import atomic_file, remove_stale, write_all
from converter.storage.progress import OnProgress, progress_counter
from converter.tensors.lazy_tensor import LazyTensor, lazy_read, nbytes, source_tensors


class Derived(NamedTuple):
    """A mapping that was derived, and how sure of it one may be.

    `found` counts the target's tensors by how they were found; `guessed` gives each that its values alone did not
    decide, with the sources that would have done as well. `unmatched` are the target's tensors that nothing makes,
    `dropped` the source's that make nothing. `known` are shipped layouts that fit the source already.
    """

    output: str
    layout: str
    family: str
    source: str
    target: str
    tensors: int
    found: dict[str, int]
    guessed: dict[str, list[str]]
    unmatched: list[str]
    dropped: list[str]
    rules: int
    known: list[str]
    notes: list[str]
    text: str
    written: bool = False

    @property
    def complete(self) -> bool:
        """Whether all of the target was found."""
        return not self.unmatched

    def to_json(self) -> dict[str, Any]:
        """The result as one JSON document."""
        return {"schema": 1, "kind": "derived", **self._asdict()}


def derive(
    source: str | Path,
    target: str | Path,
    *,
    out: str | Path = "my.yaml",
    name: str = "",
    family: str = "",
    state_dict: str | None = None,
    force: bool = False,
    partial: bool = False,
    on_progress: OnProgress = lambda what, done, total: None,
) -> Derived:
    """Write the mapping file that turns `source`, in a layout of its own, into what `target` holds.

    `target` is a checkpoint of the same weights in a known layout, or the name of one, in which case names and shapes
    alone decide. Tensors are found by their values: equal, reshaped, permuted, as parts of one that fuses them, as
    parts of one that is split, or interleaved. What was found is proved before the file is written: the text is parsed,
    applied to `source`, and gives each of the target's tensors byte for byte.

    `out` is written if all of the target was found, or with `partial`; `Derived.written` says so. `name` is the
    layout's (default: the file's), `family` decides where a target holds several, `state_dict` as in `convert`.

    Raises a DsocrError: LayoutError where TARGET is of no known layout, or SOURCE of several state dicts, MappingError
    where a name cannot be written or the names misled, OutputError before anything is read if `out` cannot be written.
    """
    path = Path(out)
    layout = name or path.stem
    remove_stale(path)
    check_target(path, force, 0)
    with ExitStack() as stack:
        opened = stack.enter_context(closing(open_checkpoint(source)))
        entry = largest_state_dict(select_state_dicts(opened, state_dict), opened.name)
        tensors = {key: lazy_read(tensor) for key, tensor in unwrapped_names(entry.tensors, opened.name).items()}
        job, other = _job(stack, opened.name, tensors, str(target), family, on_progress)
        check_not_source(path, [opened, other] if other else [opened])
        opened.fetch(entry.tensors.values() if other else (), on_progress)
        found, copies = _found(job, on_progress)
        composed = compose(job, found, layout)
        derived = _result(path, layout, job, composed)
        derived.notes.extend(_prove(job, composed, layout, partial) if derived.complete else _told_of_copies(copies))
        check_unchanged([opened, other] if other else [opened])
    if composed.found and (partial or derived.complete):
        with atomic_file(path, force) as fd:
            write_all(fd, memoryview(composed.text.encode()))
        return derived._replace(written=True)
    return derived


def _job(
    stack: ExitStack, source: str, tensors: Mapping[str, LazyTensor], target: str, family: str, on_progress: OnProgress
) -> tuple[Job, Checkpoint | None]:
    """What TARGET is: a layout's name, or a checkpoint brought to its canonical names."""
    if target in registry.layout_names() and not Path(target).exists():
        canonical = registry.canonical(registry.load(target).family)
        return Job(source, tensors, target, target, canonical, {}), None
    opened = stack.enter_context(closing(open_checkpoint(target)))
    entries = select_state_dicts(opened, None)
    known = {f: hits[0] for f in registry.families() if (hits := detect_layouts(opened, registry.entries(f), entries))}
    chosen = [f for f in known if family in ("", f)]
    if not chosen:
        what = f"no {family.upper()} layout" if family else "no layout that is known"
        names = ", ".join(registry.layout_names())
        raise LayoutError(f"{target}: fits {what}", f"TARGET is to be a checkpoint in one of: {names}")
    if len(chosen) > 1:
        raise UsageError(f"{target}: holds {' and '.join(chosen)}", "choose one with --family")
    plan = plan_to_canonical(opened, known[chosen[0]], ConvertOptions(chosen[0]))
    made = {**plan.outputs, **plan.extra_tensors}
    opened.fetch((tensor for value in made.values() for tensor in source_tensors(value)), on_progress)
    layout = known[chosen[0]].match.name
    return Job(source, tensors, opened.name, layout, plan.target, made), opened


def _found(job: Job, on_progress: OnProgress) -> tuple[list[Found], list[tuple[str, ...]]]:
    """What makes the target's tensors, and the source's that are copies of each other."""
    if not job.wanted:
        return by_names(job.tensors, job.canonical, job.layout), []
    # torch is imported where values are read: names alone need none.
    from converter.derivation.match import by_values

    total = sum(map(nbytes, (*job.tensors.values(), *job.wanted.values())))
    return by_values(job.tensors, job.wanted, progress_counter(on_progress, "reading", total))


def _told_of_copies(copies: list[tuple[str, ...]]) -> list[str]:
    if not copies:
        return []
    names = f"{sum(map(len, copies))} tensors of SOURCE have another's values, such as {' and '.join(copies[0][:2])}"
    return [f"{names}: what is fused of them cannot be told; save one of each alone, then derive again"]


def _prove(job: Job, composed: Composed, layout: str, partial: bool) -> list[str]:
    """What is wrong with rules that names suggested, where a part of them is wanted too; else MappingError."""
    try:
        prove(job, composed, layout)
    except MappingError as error:
        # Names may have misled: what they suggest is worth a file to whoever asks for one.
        if not partial or job.wanted:
            raise
        return [str(error)]
    return []


def _result(path: Path, layout: str, job: Job, composed: Composed) -> Derived:
    counts = {how: sum(len(e.targets) for e in composed.found if e.how == how) for how in (VALUES, ALIKE, NAME)}
    known = match_layouts(
        {name: tensor for name, value in job.tensors.items() for tensor in source_tensors(value)},
        registry.entries(job.canonical.family),
    )
    notes = list(composed.notes)
    ours, theirs = _floats(job.tensors), _floats(job.wanted)
    if composed.unmatched and theirs and not ours & theirs:
        notes.append(f"SOURCE is {', '.join(sorted(ours))}, TARGET {', '.join(sorted(theirs))}: no values can be equal")
    return Derived(
        output=str(path),
        layout=layout,
        family=job.canonical.family,
        source=job.source,
        target=job.target,
        tensors=sum(counts.values()) + len(composed.unmatched),
        found={how: count for how, count in counts.items() if count},
        guessed={t: list(e.rivals) for e in composed.found if e.how != VALUES for t in e.targets},
        unmatched=composed.unmatched,
        dropped=composed.dropped,
        rules=composed.rules,
        known=[match.name for match in known],
        notes=notes,
        text=composed.text,
    )


def _floats(tensors: Mapping[str, LazyTensor]) -> set[str]:
    return {value.dtype.name for value in tensors.values() if value.dtype.is_float}

"""The straight line of a conversion: locate, open, plan, write, card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from converter import catalogue
from converter.catalogue import Candidate
from converter.dtypes import BY_NAME
from converter.errors import DsocrError, LayoutError, OutputError, UsageError
from converter.hubs.address import Access
from converter.mapping.expr import Expr, read, sources
from converter.mapping.parse import FAMILIES
from converter.mapping.plan import Plan, make_plan
from converter.mapping.rules import Layout
from converter.report import Card, Inspection, Recognised, fold
from converter.source import (
    Identified,
    Progress,
    Source,
    chosen_state_dicts,
    identified,
    identify,
    nearest_layout,
    open_source,
)
from converter.stage import check_target, staged
from converter.unwrap import StateDict
from converter.version import __version__
from converter.write import write_safetensors

FORMATS = ("safetensors", "pth")
DTYPES = ("keep", "float32", "float16", "bfloat16")


def convert(
    source: str | Path,
    family: str,
    *,
    out: str | Path | None = None,
    mapping: str | Path | None = None,
    dtype: str = "keep",
    image_size: int | None = None,
    format: str = "safetensors",
    state_dict: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    hub: str | None = None,
    download: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Card:
    """Convert a checkpoint into the DeepEncoder's layout and return the card of the conversion.

    `source` is a file, a folder or an index, here or on a hub (`hf://org/name`, `ms://org/name`, `org/name`).
    `revision` pins what is on a hub, `hub` says which is meant (hf or modelscope); with `download` whole files are
    fetched into the hub's cache, and not the needed bytes alone. `family` is "sam" or "clip". `out` defaults to
    `deepencoder-<family>.<format>` in the current folder. `mapping` is a mapping file to use instead of recognising the
    layout. `dtype` casts floating-point tensors; `image_size`, in pixels, resamples CLIP's positions. `state_dict`
    chooses among several in one file (`model`, `ema`; `.` for the top). `progress` is called as bytes are written or,
    from a hub, as they come; then also from other threads, one at a time.

    With `dry_run` the plan is made and nothing is written. Raises a DsocrError; whatever stood at `out` stands there
    still then.
    """
    _check_choices(family=(family, FAMILIES), dtype=(dtype, DTYPES), format=(format, FORMATS))
    layouts = _layouts(family, mapping)
    target = Path(out) if out is not None else Path(f"deepencoder-{family}.{format}")
    with closing(open_source(source, Access(revision, hub, download))) as opened:
        known = identify(opened, family, layouts, state_dict)
        plan = _plan(opened, known, family, dtype, image_size)
        card = _card(opened, known, plan, family, target, dtype, format)
        if dry_run:
            return card
        _check_not_source(target, opened)
        check_target(target, force, plan.nbytes)
        _write(opened, plan, card, target, force, progress)
        return card._replace(written=True, fetched=_fetched(opened))


def _write(opened: Source, plan: Plan, card: Card, target: Path, force: bool, progress: Progress) -> None:
    """The tensors of the plan into the file `target`, which appears whole or not at all."""
    count = (lambda nbytes: None) if opened.remote else _counter(progress, plan.nbytes)
    with staged(target, force) as fd:
        opened.prefetch((tensor for value in plan.outputs.values() for tensor in sources(value)), progress)
        if card.format == "pth":
            # Imported here: the zip module is for those alone who ask for it.
            from converter.pth import write_pth

            write_pth(fd, plan.outputs, count)
        else:
            write_safetensors(fd, plan.outputs, card.metadata(), count)
        # Before the output takes its place: a source that changed midway may have given halves of two files.
        for file in opened.files:
            file.check_unchanged()


def _fetched(opened: Source) -> dict[str, int]:
    """Bytes that came over the network, by remote file."""
    return {file.name: file.fetched for file in opened.remote}


def _counter(progress: Progress, total: int) -> Callable[[int], None]:
    """A sum of the bytes it is told, passed on to `progress`."""
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress("converting", done, total)

    return count


def inspect(
    source: str | Path,
    *,
    state_dict: str | None = None,
    revision: str | None = None,
    hub: str | None = None,
    download: bool = False,
) -> Inspection:
    """What a checkpoint holds, which layouts it fits and what a conversion would do; no weights are read."""
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
        dtypes=_dtypes([read(tensor) for tensor in largest.tensors.values()]),
        groups=fold(largest.tensors),
        recognised=recognised,
        nearest=[] if recognised else nearest_layout(opened, largest, mappings),
    )


def _check_choices(**choices: tuple[str, Sequence[str]]) -> None:
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise UsageError(f"{name} {value!r}: expected one of {', '.join(allowed)}")


def _layouts(family: str, mapping: str | Path | None) -> Sequence[Candidate]:
    if mapping is None:
        return catalogue.candidates(family)
    own = catalogue.load_file(Path(mapping))
    if own.family != family:
        raise UsageError(f"--mapping {mapping}: is for the family {own.family!r}, not {family!r}")
    return catalogue.only(own)


def _plan(opened: Source, known: Identified, family: str, dtype: str, image_size: int | None) -> Plan:
    layout = known.match.candidate.load()
    if isinstance(layout, Layout):
        raise LayoutError(
            f"{opened.name}: is in the layout {layout.name} already: there is nothing to convert\nload it as it is"
        )
    tensors: dict[str, Expr] = {name: read(tensor) for name, tensor in known.tensors.items()}
    hub = catalogue.hub(family)
    return make_plan(layout, known.match.prefix, hub, tensors, opened.name, dtype=dtype, image_size=image_size)


def _check_not_source(target: Path, opened: Source) -> None:
    try:
        stat = target.stat()
    except OSError:
        # There is no such file yet, or it cannot be looked at: either way it is not one that was opened.
        return
    if (stat.st_dev, stat.st_ino) in [file.identity for file in opened.files]:
        raise OutputError(f"{target}: is the source itself\nchoose another path with --output")


def _card(
    opened: Source, known: Identified, plan: Plan, family: str, target: Path | None, dtype: str, format: str
) -> Card:
    return Card(
        tool=f"dsocr-convert {__version__}",
        source=opened.name,
        files={file.name: file.size for file in opened.files},
        containers=sorted(set(opened.containers)),
        state_dict=known.state_dict.path,
        wrapper=known.wrapper,
        family=family,
        mapping=plan.mapping.name,
        mapping_sha256=plan.mapping.digest,
        target=plan.target.name,
        output=str(target) if target else "",
        format=format,
        dtype=dtype,
        tensors=len(plan.outputs),
        nbytes=plan.nbytes,
        dtypes=_dtypes(list(plan.outputs.values())),
        converted={name: [tensor.key for tensor in sources(value)] for name, value in plan.outputs.items()},
        filled=plan.filled,
        missing=plan.missing,
        dropped=plan.dropped,
        sizes=plan.sizes,
        unusual={name: list(pair) for name, pair in plan.unusual.items()},
        commit=opened.commit,
        notes=list(opened.notes),
    )


def _recognised(opened: Source, family: str, entries: list[StateDict]) -> Recognised | None:
    """What `convert` would make of a source, or None where it is not of this family."""
    found = identified(opened, catalogue.candidates(family), entries)
    if not found:
        return None
    layout = found[0].match.candidate.load()
    try:
        card = _card(opened, found[0], _plan(opened, found[0], family, "keep", None), family, None, "keep", FORMATS[0])
        problem = ""
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


def _dtypes(values: list[Expr]) -> dict[str, int]:
    """How many tensors have each element type, in the order of the table of types."""
    names = [value.dtype.name for value in values]
    return {name: names.count(name) for name in BY_NAME if name in names}

"""A checkpoint opened: its files, what they hold, and which layout of a family that is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePath
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple, cast

from converter import catalogue
from converter.catalogue import Candidate, Match
from converter.checkpoint import Contents, Tensor
from converter.errors import ContainerError, LayoutError, UsageError, printable
from converter.files import Range, SourceFile
from converter.hubs.address import Access
from converter.loaders import open_file
from converter.locate import Located, locate
from converter.mapping.apply import SHOWN
from converter.mapping.parse import FAMILIES
from converter.mapping.rules import Mapping
from converter.unwrap import StateDict, plain_names, state_dicts, without_common_prefixes

if TYPE_CHECKING:
    from converter.hubs.remote import RemoteFile


# Told what is being done, how much of it is done, and of how much.
Progress = Callable[[str, int, int], None]


def counter(progress: Progress, what: str, total: int) -> Callable[[int], None]:
    """What sums up the bytes it is told of, and tells `progress`."""
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(what, done, total)

    return count


# What to do where shards and their index disagree.
_SHARDS_STEP = "download the checkpoint again, shards and index"


class Source(NamedTuple):
    """A checkpoint as found: `containers` names the kind of each file, `contents` holds what all of them hold."""

    name: str
    files: tuple[SourceFile, ...]
    containers: tuple[str, ...]
    contents: Contents
    commit: str = ""
    notes: tuple[str, ...] = ()

    @property
    def remote(self) -> list[RemoteFile]:
        """Those of the files that are fetched as they are read."""
        return [cast("RemoteFile", file) for file in self.files if file.identity is None]

    def prefetch(self, tensors: Iterable[Tensor], progress: Progress) -> None:
        """Have remote files fetch ahead what will be read once, in the order of `tensors`; `progress` is told of it."""
        self._fetch(tensors, progress, keep=False)

    def fetch(self, tensors: Iterable[Tensor], progress: Progress) -> None:
        """Have remote files fetch `tensors`, for others to read."""
        self._fetch(tensors, progress, keep=True)

    def _fetch(self, tensors: Iterable[Tensor], progress: Progress, keep: bool) -> None:
        remote = self.remote
        if not remote:
            return
        spans: dict[SourceFile, list[Range]] = {file: [] for file in remote}
        for tensor in tensors:
            if tensor.storage.file in spans:
                spans[tensor.storage.file].append(tensor.storage.span)
        lock, whole = Lock(), sum(file.size for file in self.files)

        def tell() -> None:
            with lock:
                fetched, needed = sum(file.fetched for file in remote), sum(file.needed for file in remote)
                progress(f"fetching ({1 - needed / whole:.1%} of {whole / 1e9:.2f} GB spared)", fetched, needed)

        for file in remote:
            (file.fetch_all if keep else file.prefetch)(spans[file], tell)

    def close(self) -> None:
        """Let go of the files."""
        for file in self.files:
            file.close()


class Identified(NamedTuple):
    """The state dict of a source that a layout fits.

    `wrapper` is the prefix that was removed from all names to get `tensors`, whose keys are those the layout knows.
    """

    state_dict: StateDict
    wrapper: str
    tensors: dict[str, Tensor]
    match: Match


def open_source(name: str | Path, access: Access = Access()) -> Source:  # noqa: B008 (a tuple)
    """Open all files of SOURCE and read what they say of their tensors, not the tensors."""
    located = locate(str(name), access)
    with ExitStack() as stack:
        for file in located.files:
            stack.callback(file.close)
        opened = [open_file(file) for file in located.files]
        containers = tuple(container for container, _ in opened)
        held = [contents for _, contents in opened]
        contents = held[0] if located.weight_map is None else _joined(located, held)
        stack.pop_all()
    return Source(located.name, located.files, containers, contents, located.commit, located.notes)


def _joined(located: Located, shards: list[Contents]) -> Contents:
    """The tensors of all shards, which must be those that the index lists, where it lists them."""
    joined: Contents = {}
    for file, contents in zip(located.files, shards, strict=True):
        shard = PurePath(file.name).name
        for key, value in contents.items():
            if key in joined:
                raise ContainerError(f"{file.name}: {key!r} stands in another shard too\n{_SHARDS_STEP}")
            listed = (located.weight_map or {}).get(key)
            if isinstance(value, Tensor) and listed != shard:
                where = f"puts it into {listed!r}" if listed else "does not list it"
                raise ContainerError(f"{file.name}: holds {key!r}, but {located.name} {where}\n{_SHARDS_STEP}")
            joined[key] = value
    absent = [key for key in located.weight_map or {} if not isinstance(joined.get(key), Tensor)]
    if absent:
        what = f"lists {len(absent)} tensors that its shards do not hold, such as {absent[0]!r}"
        raise ContainerError(f"{located.name}: {what}\n{_SHARDS_STEP}")
    return joined


def chosen_state_dicts(source: Source, path: str | None) -> list[StateDict]:
    """The state dicts of a source; with `path` (the option --state-dict, `.` for the top) that one alone."""
    found = state_dicts(source.contents)
    if not found:
        raise LayoutError(
            f"{source.name}: holds no tensors under names\n"
            "save the model's state dict, not a list of tensors or a training record without one, and convert that"
        )
    if path is None:
        return found
    chosen = [entry for entry in found if entry.path == path.strip(".")]
    if not chosen:
        raise UsageError(f"--state-dict {path}: {source.name} has no such state dict\nit has: {_paths(found)}")
    return chosen


def identify(source: Source, family: str, layouts: Sequence[Candidate], path: str | None) -> Identified:
    """The one state dict of a source that one of `layouts` fits; LayoutError where none or several do."""
    candidates = chosen_state_dicts(source, path)
    found = identified(source, layouts, candidates)
    if not found:
        raise _unknown(source, family, layouts, candidates)
    if len(found) > 1:
        raise LayoutError(
            f"{source.name}: holds {len(found)} state dicts that fit: {_paths([hit.state_dict for hit in found])}\n"
            f"choose one, such as --state-dict {printable(found[0].state_dict.path) or '.'}"
        )
    return found[0]


def identified(source: Source, layouts: Sequence[Candidate], candidates: list[StateDict]) -> list[Identified]:
    """Those of the candidates that one of `layouts` fits."""
    return [hit for hit in (_known(source, candidate, layouts) for candidate in candidates) if hit]


def _known(source: Source, state_dict: StateDict, layouts: Sequence[Candidate]) -> Identified | None:
    """The layout of a state dict, tried under its own names first, then with common prefixes removed."""
    plain = plain_names(state_dict.tensors, source.name)
    for wrapper, tensors in without_common_prefixes(plain, source.name):
        matches = catalogue.recognise(tensors, layouts)
        if len(matches) > 1:
            names = ", ".join(match.candidate.name for match in matches)
            raise LayoutError(f"{source.name}: fits several layouts: {names}\nchoose one with --mapping")
        if matches:
            return Identified(state_dict, wrapper, tensors, matches[0])
    return None


def _paths(entries: Sequence[StateDict]) -> str:
    return ", ".join(f"{printable(entry.path) or '.'} ({len(entry.tensors)} tensors)" for entry in entries)


def _unknown(source: Source, family: str, layouts: Sequence[Candidate], candidates: list[StateDict]) -> LayoutError:
    """What to say of a source that no layout fits: the other family's, or the nearest layout and the differences."""
    largest = max(candidates, key=lambda entry: len(entry.tensors))
    for other in FAMILIES:
        if other != family and _known(source, largest, catalogue.candidates(other)):
            return LayoutError(
                f"{source.name}: is a {other.upper()} checkpoint, not {family.upper()}\nrun: dsocr-convert {other} ..."
            )
    lines = [f"{source.name}: no {family.upper()} layout fits its {len(largest.tensors)} tensors"]
    mappings = [loaded for candidate in layouts if isinstance(loaded := candidate.load(), Mapping)]
    lines += nearest_layout(source, largest, mappings)
    lines.append("write a mapping for it and give it with --mapping (`dsocr-convert mapping show` prints examples)")
    return LayoutError("\n".join(lines))


def nearest_layout(source: Source, state_dict: StateDict, mappings: list[Mapping]) -> list[str]:
    """Lines on the mapping that comes closest to a state dict, and where the two first differ."""
    tensors = plain_names(state_dict.tensors, source.name)
    near = catalogue.nearest(tensors, mappings)
    if near is None:
        return [f"its first names: {', '.join(map(repr, sorted(tensors)[:SHOWN]))}"]
    differences = [f"  {near.mapping.name} has nothing for {name!r}" for name in near.unclaimed[:SHOWN]]
    differences += [f"  the checkpoint has nothing for {text}" for text in near.unmatched[:SHOWN]]
    for key, shape in near.mapping.signature.tensors.items():
        tensor = tensors.get(near.prefix + key)
        if tensor and len(tensor.shape) != len(shape):
            differences.append(f"  {near.prefix + key!r} has {len(tensor.shape)} dimensions, not {len(shape)}")
    prefix = f" (prefix {near.prefix})" if near.prefix else ""
    # With the lines around them a dozen.
    return [f"nearest is {near.mapping.name}{prefix}:", *differences[:9]]

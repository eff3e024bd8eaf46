"""Finding a checkpoint's files: local or on a hub, a single file, a folder or a sharded checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple, cast

from converter.checkpoint.folder import (
    ADAPTER_NAMES,
    MAX_SHOWN,
    STANDARD_NAMES,
    choose_checkpoint,
    count_shards,
    has_weight_suffix,
    holds_checkpoint,
    is_dcp,
    is_described,
    is_index,
    is_searched,
)
from converter.checkpoint.source_files import Files, HubFiles, LocalFiles
from converter.errors import ContainerError, DsocrError, HubError, UsageError, first_names, natural_sort_key, printable
from converter.formats import strict_json
from converter.formats.dcp_files import METADATA, SUFFIX
from converter.hub.address import is_address, looks_like_repository, open_repository, parse_address
from converter.options import NO_HUB_OPTIONS, HubOptions
from converter.storage.local_file import SourceFile, exists

if TYPE_CHECKING:
    from converter.hub.repository import Repository

_MAX_LEVELS = 3  # that are searched below a folder without a checkpoint: runs/version_0/checkpoints
_MAX_FOLDERS = 1000  # of one level
_INDEX_STEP = "download it again from where its checkpoint was published"


class Located(NamedTuple):
    """The open files of one checkpoint."""

    name: str  # The path or the hub address of the file, or of the index
    files: tuple[SourceFile, ...]  # The file, or all shards
    weight_map: dict[str, str] | None = None  # Shard names by tensor name, from the index; None without an index
    commit: str = ""  # The commit of the hub repository; empty for local files
    notes: tuple[str, ...] = ()  # Messages for the user about where the files were found
    is_dcp: bool = False  # Whether the files are `.metadata` and the *.distcp files of a DCP folder
    whole_step: str = ""  # How to read the whole checkpoint, if the file is one of several shards and read alone
    in_other_shards: tuple[str, ...] = ()  # Names of the tensors in other shards, as far as an index lists them
    # Opens a config of the given name that describes the files; None if there is none
    open_config: Callable[[str], SourceFile | None] = lambda name: None


def locate(source: str, hub_options: HubOptions = NO_HUB_OPTIONS) -> Located:
    """Open the files of SOURCE.

    Raises:
        ContainerError: No such file, or several checkpoints in one folder.
        HubError: A hub fails or refuses.
        UsageError: SOURCE and `hub_options` contradict each other.
    """
    if not source:
        # For example from an unset shell variable. Path("") would be the current folder.
        raise UsageError("SOURCE is empty: give a checkpoint file, its folder or its index, or hf://org/name")
    path, shown = Path(source), printable(source)
    if is_address(source) or (hub_options.hub is not None and looks_like_repository(source) and not path.is_file()):
        return _locate_on_hub(source, hub_options)
    if exists(path):
        return _locate_local(path)
    if looks_like_repository(source) and not _looks_like_local_file(path):
        return _locate_on_hub(source, hub_options)
    raise ContainerError(
        f"{shown}: no such file or folder", "give a checkpoint file, its folder or its index, or hf://org/name"
    )


def _looks_like_local_file(path: Path) -> bool:
    """Return whether a missing path was probably meant as a local file, by the suffix and the first folder."""
    is_file_name = has_weight_suffix(path.name) or path.suffix == ".json"
    return is_file_name and (len(path.parts) == 2 or exists(path.parts[0]))


def _locate_local(path: Path) -> Located:
    if path.suffix == SUFFIX or path.name == METADATA:
        path = path.parent
    return _open_folder(LocalFiles(), path) if path.is_dir() else _open_path(LocalFiles(), path)


def _open_folder(files: Files, folder: PurePath) -> Located:
    """Open the checkpoint in a folder, or in the one folder below it that has one."""
    names, folders = files.entries(folder)
    if is_dcp(names):
        return _open_dcp(files, folder, names)
    below = [] if holds_checkpoint(names) else _latest(files, folder, names, folders) or _below(files, folder, folders)
    if len(below) > 1:
        raise _several(files, folder, below)
    if below:
        try:
            located = _open_folder(files, below[0])
        except DsocrError as error:
            error.choices = str(folder), error.choices[1]
            raise
        note = f"read from its folder {printable(str(below[0].relative_to(folder)))}"
        return located._replace(
            notes=(note, *located.notes),
            open_config=lambda name: located.open_config(name) or _open_config(files, folder / "latest", (), name),
        )
    listed = _shards_of_indexes(files, folder, names)
    chosen = choose_checkpoint([name for name in names if name not in listed], folders, files.name(folder), files.error)
    if len(chosen) == 1:
        located = _open_path(files, folder / chosen[0])
        return located._replace(notes=(*located.notes, *_adapter_note(files, folder, names, chosen)))
    note = f"no index: read the {len(chosen)} shards by their headers"
    config = partial(_open_config, files, folder / chosen[0], chosen)
    return Located(files.name(folder), _open_all(files, folder, chosen), notes=(note,), open_config=config)


def _adapter_note(files: Files, folder: PurePath, names: Collection[str], chosen: Collection[str]) -> list[str]:
    """Return a note on a LoRA adapter next to the checkpoint that was chosen in a folder."""
    adapters = [name for name in ADAPTER_NAMES if name in names and name not in chosen]
    return [f"{name} next to it, a LoRA adapter, is merged by --lora {files.name(folder)} alone" for name in adapters]


def _latest(files: Files, folder: PurePath, names: Collection[str], folders: Collection[str]) -> list[PurePath]:
    """Return the folder that DeepSpeed's file `latest` names."""
    if "latest" not in names:
        return []
    with closing(files.open(folder / "latest")) as file:
        step = file.read(0, min(file.size, 256)).decode("utf-8-sig", errors="replace").strip()
    return [folder / step] if step in folders else []


def _below(files: Files, folder: PurePath, folders: Collection[str]) -> list[PurePath]:
    """Return the folders below a folder that have a checkpoint, except those in one that has one."""

    def is_step(names: Collection[str]) -> bool:
        return "latest" in names or holds_checkpoint(names)

    found, level = [], [folder / name for name in folders if is_searched(name)]
    for _ in range(_MAX_LEVELS):
        entries = [(each, *files.entries(each)) for each in level[:_MAX_FOLDERS]]
        found += [each for each, names, _ in entries if is_step(names)]
        level = [
            each / name for each, names, inner in entries if not is_step(names) for name in inner if is_searched(name)
        ]
    return sorted(found, key=lambda path: natural_sort_key(str(path)))


def _several(files: Files, folder: PurePath, below: Sequence[PurePath]) -> DsocrError:
    """Return the error for several checkpoints below a folder, such as the steps of a training."""
    shown = [printable(str(path.relative_to(folder))) for path in below]
    message = f"{files.name(folder)}: has no checkpoint itself; {len(below)} of its folders have one: "
    error = files.error(message + first_names(shown, MAX_SHOWN), "give the path of one of them")
    error.choices = str(folder), list(map(str, below))
    return error


def _open_dcp(files: Files, folder: PurePath, names: Collection[str]) -> Located:
    shown = files.name(folder)
    if METADATA not in names:
        if any(name.endswith(METADATA) for name in names):
            what = "each rank wrote its own metadata, without the others (use_collectives=False)"
            raise files.error(
                f"{shown}: {what}", "load it on as many ranks, and save it again with use_collectives=True"
            )
        raise files.error(
            f"{shown}: lacks {METADATA}, which torch.distributed.checkpoint writes last",
            f"the save or the copy was not finished: `cp FOLDER/*` leaves {METADATA} out, `cp -r FOLDER` does not",
        )
    used = [METADATA, *sorted(name for name in names if name.endswith(SUFFIX))]
    config = partial(_open_config, files, folder / METADATA, used)
    return Located(shown, _open_all(files, folder, used), is_dcp=True, open_config=config)


def _shards_of_indexes(files: Files, folder: PurePath, names: Collection[str]) -> set[str]:
    """Return the names of the shards in a folder that an index of an unusual name lists: they may have any names."""
    if any(name in names for name in STANDARD_NAMES):
        return set()
    return {shard for name in names if is_index(name) for shard in _listed(files, folder / name).values()}


def _listed(files: Files, index: PurePath) -> dict[str, str]:
    """Return the `weight_map` of an index; empty if it cannot be read."""
    with closing(files.open(index)) as file, suppress(ContainerError):
        return _weight_map(file, index.name)
    return {}


def _open_path(files: Files, path: PurePath) -> Located:
    """Open the file at `path` or, if it is an index, the shards in its folder."""
    name = files.name(path)
    if not (is_index(path.name) or _looks_like_index(files, path)):
        config = partial(_open_config, files, path, [path.name])
        located = Located(name, _open_all(files, path.parent, [path.name]), open_config=config)
        return located if count_shards(path.name) == 1 else _one_shard(files, path, located)
    with closing(files.open(path)) as index:
        weight_map, shards = _read_index(index, name, lambda shard: files.exists(path.with_name(shard)))
    config = partial(_open_config, files, path, [path.name, *shards])
    return Located(name, _open_all(files, path.parent, shards), weight_map, open_config=config)


def _looks_like_index(files: Files, path: PurePath) -> bool:
    """Return whether a JSON file of another name is an index."""
    if path.suffix.lower() != ".json":
        return False
    with closing(files.open(path)) as file:
        return b'"weight_map"' in file.read(0, min(file.size, 4096))


def _one_shard(files: Files, path: PurePath, located: Located) -> Located:
    """Add to a shard that is read alone how to read the whole checkpoint."""
    names, _ = files.entries(path.parent)
    indexes = [name for name in names if is_index(name)]
    step = f"give {printable(indexes[0])} next to it" if len(indexes) == 1 else "give its folder"
    weight_map = _listed(files, path.with_name(indexes[0])) if len(indexes) == 1 else {}
    others = tuple(name for name, shard in weight_map.items() if shard != path.name)
    note = f"{printable(path.name)}: one of {count_shards(path.name)} shards, read alone; for the whole, {step}"
    whole_step = f"the file is one of several shards: {step}"
    return located._replace(whole_step=whole_step, in_other_shards=others, notes=(note,))


def _open_config(files: Files, weights: PurePath, used: Collection[str], name: str) -> SourceFile | None:
    """Open the config `name` next to a checkpoint, if it describes it.

    Args:
        files: The files of the checkpoint's folder.
        weights: The checkpoint.
        used: The names of all its files.
        name: The name of the config.
    """
    names, _ = files.entries(weights.parent)
    is_there = name in names and is_described(weights.name, used, names)
    return files.open(weights.with_name(name)) if is_there else None


def _open_all(files: Files, folder: PurePath, names: Iterable[str]) -> tuple[SourceFile, ...]:
    with ExitStack() as stack:
        opened = []
        for name in names:
            # aria2 gives a file its full size at once.
            if files.exists(folder / f"{name}.aria2"):
                raise files.error(f"{files.name(folder / name)}: an unfinished download of aria2", "finish it")
            opened.append(stack.enter_context(closing(files.open(folder / name))))
        stack.pop_all()
    return tuple(opened)


def _locate_on_hub(source: str, hub_options: HubOptions) -> Located:
    address = parse_address(source, hub_options)
    repository = open_repository(address, lambda folder: _is_complete(folder / address.path))
    folder, notes = repository.cached_snapshot, repository.notes
    if folder is not None:
        located = _locate_local(folder / address.path)
        # The output records this name, and must not depend on where the cache is.
        name = f"{repository.name}/{PurePath(located.name).relative_to(printable(str(folder))).as_posix()}"
        return located._replace(name=name.removesuffix("/."), commit=repository.commit, notes=(*notes, *located.notes))
    located = _locate_in(repository, address.path, hub_options.download)
    return located._replace(
        commit=repository.commit, notes=(*notes, *located.notes, *_cache_note(located.files, hub_options))
    )


def _cache_note(files: Iterable[SourceFile], hub_options: HubOptions) -> list[str]:
    """Return a note if all files came from the local cache."""
    if any(file.identity is None for file in files):
        return []
    return [
        "downloaded into the hub's cache, SHA-256 checked" if hub_options.download else "taken from the hub's cache"
    ]


def _is_complete(path: Path) -> bool:
    """Return whether a cache has a checkpoint at `path`, with all its shards.

    The folders below do not count: the cache may lack the checkpoint of the folder itself.
    """
    try:
        if path.is_dir() and not holds_checkpoint(LocalFiles().entries(path)[0]):
            return False
        located = _locate_local(path)
    except ContainerError:
        return False
    for file in located.files:
        file.close()
    return True


def _locate_in(repository: Repository, path: str, download: bool) -> Located:
    """Open the file `path` of a repository, or the checkpoint in the folder `path`; HubError if there is none."""
    files, posix = HubFiles(repository, download), PurePosixPath(path)
    if files.exists(posix):
        return _open_path(files, posix)
    if path and not any(name.startswith(f"{path}/") for name in repository.files):
        candidates = sorted(name for name in repository.files if has_weight_suffix(name) or is_index(name))
        shown = first_names(candidates, MAX_SHOWN) or "none"
        raise HubError(f"{repository.name}: there is no file {path!r}", f"its checkpoints: {shown}")
    return _open_folder(files, posix)


def _read_index(file: SourceFile, name: str, is_file: Callable[[str], bool]) -> tuple[dict[str, str], list[str]]:
    """Return the `weight_map` of an index, and its shards in order; ContainerError for a shard outside its folder."""
    weight_map = _weight_map(file, name)
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        # Path separators of all systems, and characters that Windows ignores at the end of a name.
        if not shard or shard[-1] in ". " or set(shard) & set("/\\:") or not shard.isprintable():
            raise ContainerError(f"{name}: the shard {shard!r} is not a file in the index's folder", _INDEX_STEP)
        if not is_file(shard):
            raise ContainerError(f"{name}: the shard {shard!r} is missing", "download the rest of the checkpoint")
    return weight_map, shards


def _weight_map(file: SourceFile, name: str) -> dict[str, str]:
    """Parse an index and return the shard names by tensor name."""
    if file.size > strict_json.MAX_BYTES:
        raise ContainerError(f"{name}: larger than any index of a sharded checkpoint", _INDEX_STEP)
    try:
        # Programs on Windows add a byte order mark, or write UTF-16.
        text = file.read(0, file.size)
        weight_map = strict_json.parse(text.decode(json.detect_encoding(text)).encode())["weight_map"]
        if not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ValueError("a file name is not a string")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = error if isinstance(error, ValueError) else "expected a `weight_map` of names"
        raise ContainerError(f"{name}: not an index of a sharded checkpoint: {why}", _INDEX_STEP) from error
    if not weight_map:
        raise ContainerError(f"{name}: its `weight_map` lists no files", _INDEX_STEP)
    return cast("dict[str, str]", weight_map)

"""Finds and opens the files of a checkpoint: a single file, a folder or a sharded checkpoint, local or on a hub."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from converter.checkpoint.folder import (
    ADAPTER_NAMES,
    MAX_SHOWN,
    STANDARD_NAMES,
    choose_checkpoint,
    config_applies,
    count_shards,
    has_weight_suffix,
    holds_checkpoint,
    is_dcp,
    is_index,
    may_hold_checkpoint,
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

_MAX_LEVELS = 3  # of subfolders that are searched for a checkpoint, such as runs/version_0/checkpoints
_MAX_FOLDERS = 1000  # that are searched in one level
_INDEX_STEP = "download it again from where its checkpoint was published"


@dataclass(eq=False, kw_only=True)
class Located:
    """The open files of one checkpoint."""

    name: str  # The path or the hub address of the file, or of the index of a sharded checkpoint
    files: tuple[SourceFile, ...]  # A single file, or the shards in the order of their names
    weight_map: dict[str, str] | None = None  # Shard names by tensor name, from the index; None without an index
    commit: str = ""  # The commit of the hub repository; empty for local files
    notes: tuple[str, ...] = ()  # Messages for the user about the files
    is_dcp: bool = False  # Whether the files are `.metadata` and the *.distcp files of a DCP folder
    all_shards_step: str = ""  # The next step to read all shards, if the file is one of them; else empty
    in_other_shards: tuple[str, ...] = ()  # The names of the tensors that an index lists in the other shards
    # For the name of a config, returns a function that opens it; None if no such config describes the files
    find_config: Callable[[str], Callable[[], SourceFile] | None] = lambda name: None


def locate(source: str, hub_options: HubOptions = NO_HUB_OPTIONS) -> Located:
    """Open the files of SOURCE.

    Raises:
        ContainerError: No such file, or several checkpoints in one folder.
        HubError: A hub fails or refuses.
        UsageError: SOURCE and `hub_options` contradict each other.
    """
    step = "give a checkpoint file, its folder or its index, or hf://org/name"
    if not source:
        # For example from an unset shell variable. Path("") would be the current folder.
        raise UsageError(f"SOURCE is empty: {step}")
    path = Path(source)
    if is_address(source) or (hub_options.hub is not None and looks_like_repository(source) and not path.is_file()):
        return _locate_on_hub(source, hub_options)
    if exists(path):
        return _locate_local(path)
    if looks_like_repository(source) and not _looks_like_local_file(path):
        return _locate_on_hub(source, hub_options)
    raise ContainerError(f"{printable(source)}: no such file or folder", step)


def _looks_like_local_file(path: Path) -> bool:
    """Return whether a missing path was probably meant as a local file, by the suffix and the first folder."""
    is_file_name = has_weight_suffix(path.name) or path.suffix == ".json"
    return is_file_name and (len(path.parts) == 2 or exists(path.parts[0]))


def _locate_local(path: Path) -> Located:
    if path.suffix == SUFFIX or path.name == METADATA:
        path = path.parent
    return _open_folder(LocalFiles(), path) if path.is_dir() else _open_path(LocalFiles(), path)


def _locate_on_hub(source: str, hub_options: HubOptions) -> Located:
    address = parse_address(source, hub_options)
    repository = open_repository(address, lambda folder: _is_complete(folder / address.path))
    folder = repository.cached_snapshot
    if folder is None:
        located = _locate_in(repository, address.path, hub_options.download)
        if all(file.identity is not None for file in located.files):
            is_new = hub_options.download
            note = "downloaded into the hub's cache, SHA-256 checked" if is_new else "taken from the hub's cache"
            located.notes = (*located.notes, note)
    else:
        located = _locate_local(folder / address.path)
        # The output records this name, and must not depend on where the cache is.
        name = f"{repository.name}/{PurePath(located.name).relative_to(printable(str(folder))).as_posix()}"
        located.name = name.removesuffix("/.")
    located.commit, located.notes = repository.commit, (*repository.notes, *located.notes)
    return located


def _is_complete(path: Path) -> bool:
    """Return whether a cache has a checkpoint at `path`, with all its shards.

    Subfolders do not count: the cache may lack the checkpoint that is in the folder itself.
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


def _open_folder(files: Files, folder: PurePath) -> Located:
    """Open the checkpoint in a folder, or in its only subfolder that has one."""
    names, folders = files.entries(folder)
    if is_dcp(names):
        return _open_dcp(files, folder, names)
    if not holds_checkpoint(names):
        subfolders = _latest(files, folder, names, folders) or _find_checkpoint_folders(files, folder, folders)
        if subfolders:
            return _open_subfolder(files, folder, subfolders)
    indexed = _shards_of_indexes(files, folder, names)
    candidates = [name for name in names if name not in indexed]
    chosen = choose_checkpoint(candidates, folders, files.name(folder), files.error)
    if len(chosen) > 1:
        note = f"no index: read the {len(chosen)} shards by their headers"
        return _open_files(files, folder, folder, chosen, notes=(note,))
    located = _open_path(files, folder / chosen[0])
    adapters = [name for name in ADAPTER_NAMES if name in names and name not in chosen]
    notes = (f"{name} next to it, a LoRA adapter, is merged by --lora {files.name(folder)} alone" for name in adapters)
    located.notes = (*located.notes, *notes)
    return located


def _latest(files: Files, folder: PurePath, names: Collection[str], folders: Collection[str]) -> list[PurePath]:
    """Return the folder that DeepSpeed's file `latest` names; an empty list if there is none."""
    if "latest" not in names:
        return []
    with closing(files.open(folder / "latest")) as file:
        step = file.read(0, min(file.size, 256)).decode("utf-8-sig", errors="replace").strip()
    return [folder / step] if step in folders else []


def _find_checkpoint_folders(files: Files, folder: PurePath, folders: Collection[str]) -> list[PurePath]:
    """Return the subfolders that have a checkpoint. Folders within these are not searched."""
    found, level = [], [folder / name for name in folders]
    for _ in range(_MAX_LEVELS):
        searched, level = [path for path in level if may_hold_checkpoint(path.name)][:_MAX_FOLDERS], []
        for path in searched:
            names, inner = files.entries(path)
            if "latest" in names or holds_checkpoint(names):
                found.append(path)
            else:
                level += [path / name for name in inner]
    return sorted(found, key=lambda path: natural_sort_key(str(path)))


def _open_subfolder(files: Files, folder: PurePath, subfolders: Sequence[PurePath]) -> Located:
    """Open the checkpoint in the only one of `subfolders`; raise an error that lists them if there are several."""
    shown = [printable(str(path.relative_to(folder))) for path in subfolders]
    if len(subfolders) > 1:
        message = f"{files.name(folder)}: has no checkpoint itself; {len(subfolders)} of its folders have one: "
        error = files.error(message + first_names(shown, MAX_SHOWN), "give the path of one of them")
        error.choices = str(folder), list(map(str, subfolders))
        raise error
    try:
        located = _open_folder(files, subfolders[0])
    except DsocrError as error:
        error.choices = str(folder), error.choices[1]
        raise
    find_inside = located.find_config
    located.find_config = cache(lambda name: find_inside(name) or _find_config(files, folder, ["latest"], name))
    located.notes = (f"read from its folder {shown[0]}", *located.notes)
    return located


def _open_dcp(files: Files, folder: PurePath, names: Collection[str]) -> Located:
    shown = files.name(folder)
    if METADATA in names:
        used = [METADATA, *sorted(name for name in names if name.endswith(SUFFIX))]
        return _open_files(files, folder, folder, used, is_dcp=True)
    if any(name.endswith(METADATA) for name in names):
        raise files.error(
            f"{shown}: each rank wrote its own metadata, without the others (use_collectives=False)",
            "load it on as many ranks, and save it again with use_collectives=True",
        )
    raise files.error(
        f"{shown}: lacks {METADATA}, which torch.distributed.checkpoint writes last",
        f"the save or the copy was not finished: `cp FOLDER/*` leaves {METADATA} out, `cp -r FOLDER` does not",
    )


def _shards_of_indexes(files: Files, folder: PurePath, names: Collection[str]) -> set[str]:
    """Return the names of shards that indexes in a folder list, unless the folder has a standard name to open."""
    if any(name in names for name in STANDARD_NAMES):
        return set()
    return {shard for name in names if is_index(name) for shard in _try_weight_map(files, folder / name).values()}


def _try_weight_map(files: Files, index: PurePath) -> dict[str, str]:
    """Return the `weight_map` of an index; empty if it cannot be read."""
    with closing(files.open(index)) as file, suppress(ContainerError):
        return _weight_map(file, index.name)
    return {}


def _open_path(files: Files, path: PurePath) -> Located:
    """Open the file at `path` or, if it is an index, the shards in its folder."""
    if is_index(path.name) or _looks_like_index(files, path):
        with closing(files.open(path)) as index:
            weight_map, shards = _read_index(index, files.name(path), lambda shard: files.exists(path.with_name(shard)))
        return _open_files(files, path, path.parent, shards, weight_map=weight_map)
    located = _open_files(files, path, path.parent, [path.name])
    if count_shards(path.name) > 1:
        _add_all_shards_step(files, path, located)
    return located


def _looks_like_index(files: Files, path: PurePath) -> bool:
    """Return whether a JSON file is an index by its content."""
    if path.suffix.lower() != ".json":
        return False
    with closing(files.open(path)) as file:
        return b'"weight_map"' in file.read(0, min(file.size, 4096))


def _add_all_shards_step(files: Files, path: PurePath, located: Located) -> None:
    """Add the next step to read all shards to a shard that is read alone."""
    indexes = [name for name in files.entries(path.parent)[0] if is_index(name)]
    step, weight_map = "give its folder", dict[str, str]()
    if len(indexes) == 1:
        step, weight_map = (
            f"give {printable(indexes[0])} next to it",
            _try_weight_map(files, path.with_name(indexes[0])),
        )
    located.in_other_shards = tuple(name for name, shard in weight_map.items() if shard != path.name)
    located.all_shards_step = f"the file is one of several shards: {step}"
    shards = f"one of {count_shards(path.name)} shards, read alone"
    located.notes = (f"{printable(path.name)}: {shards}; for the whole, {step}",)


def _open_files(files: Files, path: PurePath, folder: PurePath, names: Sequence[str], **fields: Any) -> Located:
    """Open the files `names` of a folder as one checkpoint; `path` is the folder, the only file or the index."""
    with ExitStack() as stack:
        opened = [stack.enter_context(closing(_open_file(files, folder / name))) for name in names]
        stack.pop_all()
    used = names if path == folder else [path.name, *names]
    # Cached, because each call lists the folder.
    find_config = cache(partial(_find_config, files, folder, used))
    return Located(name=files.name(path), files=tuple(opened), find_config=find_config, **fields)


def _open_file(files: Files, path: PurePath) -> SourceFile:
    # aria2 creates a file with its full size before the download.
    if files.exists(path.with_name(f"{path.name}.aria2")):
        raise files.error(f"{files.name(path)}: an unfinished download of aria2", "finish it")
    return files.open(path)


def _find_config(files: Files, folder: PurePath, used: Sequence[str], name: str) -> Callable[[], SourceFile] | None:
    """Find the config `name` in a folder, if it describes the checkpoint that consists of the files `used`."""
    names, _ = files.entries(folder)
    return partial(files.open, folder / name) if name in names and config_applies(used, names) else None


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
        weight_map = strict_json.parse_file(file.read(0, file.size))["weight_map"]
        if not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ValueError("a file name is not a string")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = error if isinstance(error, ValueError) else "expected a `weight_map` of names"
        raise ContainerError(f"{name}: not an index of a sharded checkpoint: {why}", _INDEX_STEP) from error
    if not weight_map:
        raise ContainerError(f"{name}: its `weight_map` lists no files", _INDEX_STEP)
    return cast("dict[str, str]", weight_map)

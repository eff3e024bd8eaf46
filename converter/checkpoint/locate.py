"""Finding a checkpoint's files: local or on a hub, a single file, a folder or a sharded checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from pathlib import Path, PurePath, PurePosixPath
from typing import NamedTuple, TypeVar, cast

from converter.errors import ContainerError, DsocrError, HubError, UsageError, printable
from converter.formats import strict_json
from converter.hub.address import is_address, looks_like_repository, parse_address
from converter.options import NO_HUB_OPTIONS, HubOptions
from converter.storage.local_file import READ_HINT, LocalFile, SourceFile, exists

# The file to use in a folder is the first of these that exists, in the order of transformers.
_STANDARD_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
INDEX_SUFFIX = ".index.json"
# Names that transformers and open_clip give to the weights of a folder, shards included. The folder's config describes
# such a file even where other checkpoints are in the folder.
_DESCRIBED = re.compile(r"(open_clip_)?(model|pytorch_model)(-[0-9]+-of-[0-9]+)?(\.safetensors|\.bin)(\.index\.json)?")
_INDEX_STEP = "download it again from where its checkpoint was published"
# Number of file names in a message. Some repositories have hundreds of checkpoints.
_MAX_SHOWN = 20

P = TypeVar("P", bound=PurePath)


class Located(NamedTuple):
    """The open files of one checkpoint.

    Attributes:
        name: The path or the hub address of the file, or of the index.
        files: The file, or all shards.
        weight_map: Shard names by tensor name, from the index; None without an index.
        commit: The commit of the hub repository; empty for local files.
        notes: Messages for the user about where the files were found.
        open_config: Opens a config of the given name that describes the files; None if there is none.
    """

    name: str
    files: tuple[SourceFile, ...]
    weight_map: dict[str, str] | None = None
    commit: str = ""
    notes: tuple[str, ...] = ()
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
    return path.suffix in (*WEIGHT_SUFFIXES, ".json") and (len(path.parts) == 2 or exists(path.parts[0]))


def _locate_local(path: Path) -> Located:
    if path.is_dir():
        path = path / choose_checkpoint(_files_in(path), str(path))
    located = _open_files(printable(str(path)), path, LocalFile, exists)
    return located._replace(open_config=lambda name: _open_local_config(path, name))


def _open_local_config(weights: Path, name: str) -> SourceFile | None:
    """Open a config next to the weights, if it describes them."""
    names = _files_in(weights.parent)
    return LocalFile(weights.with_name(name)) if name in names and _is_described(weights.name, names) else None


def _is_described(name: str, names: Iterable[str]) -> bool:
    """Return whether a config in a folder is that of the checkpoint `name`.

    Args:
        name: The checkpoint that was chosen.
        names: All files in the folder.
    """
    others = [other for other in names if other.endswith(WEIGHT_SUFFIXES) and other != name]
    return not others or _DESCRIBED.fullmatch(name) is not None


def _files_in(folder: Path) -> list[str]:
    """List names that are not folders; `LocalFile` reports broken links and special files."""
    try:
        return [path.name for path in folder.iterdir() if not path.is_dir()]
    except OSError as error:
        raise ContainerError(f"{printable(str(folder))}: cannot be read: {error.strerror}", READ_HINT) from error


def _open_files(name: str, path: P, open_: Callable[[P], SourceFile], is_file: Callable[[P], bool]) -> Located:
    """Open the file at `path` or, if it is an index, the shards in its folder."""
    if not path.name.endswith(INDEX_SUFFIX):
        return Located(name, (open_(path),))
    with closing(open_(path)) as index:
        weight_map, shards = _read_index(index, name, lambda shard: is_file(path.with_name(shard)))
    with ExitStack() as stack:
        files = tuple(stack.enter_context(closing(open_(path.with_name(shard)))) for shard in shards)
        stack.pop_all()
    return Located(name, files, weight_map)


def _locate_on_hub(source: str, hub_options: HubOptions) -> Located:
    # Imported here, because the libraries of the hubs take 0.2 s to import.
    from converter.hub.open import open_repository
    from converter.hub.remote_file import RemoteFile

    address = parse_address(source, hub_options)
    repository = open_repository(address, lambda folder: _is_complete(folder / address.path))
    folder, notes = repository.cached_snapshot, repository.notes
    if folder is not None:
        located = _locate_local(folder / address.path)
        # The output records this name, and must not depend on where the cache is.
        name = f"{repository.name}/{PurePath(located.name).relative_to(printable(str(folder))).as_posix()}"
        return located._replace(name=name, commit=repository.commit, notes=tuple(notes))
    path = _choose_in_repository(repository.files, address.path, repository.name)

    def open_(path: PurePosixPath) -> SourceFile:
        name = str(path)
        local = repository.download(name) if hub_options.download else repository.cached_file(name)
        return LocalFile(local) if local is not None else RemoteFile(repository, name)

    def open_config(name: str) -> SourceFile | None:
        weights = PurePosixPath(path)
        names = [other.name for other in map(PurePosixPath, repository.files) if other.parent == weights.parent]
        return open_(weights.with_name(name)) if name in names and _is_described(weights.name, names) else None

    located = _open_files(
        f"{repository.name}/{path}", PurePosixPath(path), open_, lambda path: str(path) in repository.files
    )
    notes = [*notes, *_cache_note(located.files, hub_options)]
    return located._replace(commit=repository.commit, notes=tuple(notes), open_config=open_config)


def _cache_note(files: Iterable[SourceFile], hub_options: HubOptions) -> list[str]:
    """Return a note if all files came from the local cache."""
    if any(file.identity is None for file in files):
        return []
    return [
        "downloaded into the hub's cache, SHA-256 checked" if hub_options.download else "taken from the hub's cache"
    ]


def _is_complete(path: Path) -> bool:
    """Return whether a cache has a checkpoint at `path`, with all its shards."""
    try:
        located = _locate_local(path)
    except ContainerError:
        return False
    for file in located.files:
        file.close()
    return True


def _choose_in_repository(files: Iterable[str], path: str, where: str) -> str:
    """Return the file `path` of a repository, or the checkpoint in the folder `path`; HubError if there is none."""
    if path in files:
        return path
    prefix = f"{path}/" if path else ""
    inside = [name.removeprefix(prefix) for name in files if name.startswith(prefix)]
    if not inside:
        candidates = [name for name in files if name.endswith((*WEIGHT_SUFFIXES, INDEX_SUFFIX))]
        shown = ", ".join(sorted(candidates)[:_MAX_SHOWN]) + (", ..." if len(candidates) > _MAX_SHOWN else "")
        raise HubError(f"{where}: there is no file {path!r}", f"its checkpoints: {shown or 'none'}")
    return prefix + choose_checkpoint(
        (name for name in inside if "/" not in name), f"{where}/{path}".rstrip("/"), HubError
    )


def choose_checkpoint(names: Iterable[str], where: str, error: type[DsocrError] = ContainerError) -> str:
    """Return the name of the checkpoint in a folder.

    Args:
        names: Names of all files in the folder.
        where: The folder, for messages.
        error: The exception to raise if there is no checkpoint, or more than one candidate.
    """
    ordered = sorted(names)
    for name in _STANDARD_NAMES:
        if name in ordered:
            return name
    candidates = [name for name in ordered if name.endswith(WEIGHT_SUFFIXES)]
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        expected = ", ".join((*_STANDARD_NAMES, *(f"*{suffix}" for suffix in WEIGHT_SUFFIXES)))
        raise error(f"{where}: contains no checkpoint", f"looked for {expected}")
    raise error(
        f"{where}: contains several checkpoints: {', '.join(map(printable, candidates))}",
        "give the path of one of them",
    )


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
        weight_map = strict_json.parse(file.read(0, file.size))["weight_map"]
        if not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ValueError("a file name is not a string")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = error if isinstance(error, ValueError) else "expected a `weight_map` of names"
        raise ContainerError(f"{name}: not an index of a sharded checkpoint: {why}", _INDEX_STEP) from error
    if not weight_map:
        raise ContainerError(f"{name}: its `weight_map` lists no files", _INDEX_STEP)
    return cast("dict[str, str]", weight_map)

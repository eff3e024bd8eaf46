"""From what a user names to the files that hold the tensors: files here or on a hub, a folder, a sharded checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from pathlib import Path, PurePath, PurePosixPath
from typing import NamedTuple, TypeVar, cast

from converter.errors import ContainerError, DsocrError, HubError, UsageError, printable
from converter.formats import strict_json
from converter.hub.address import HubOptions, is_address, looks_like_repository, parse
from converter.storage.local_file import READ_HINT, LocalFile, SourceFile, exists

# In a folder, the first of these that is there: transformers looks in the same order.
_STANDARD = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
INDEX_SUFFIX = ".index.json"
_INDEX_STEP = "download it again, from where its checkpoint was published"
# Names in a message: some repositories have a checkpoint for every thousandth step.
_SHOWN = 20

P = TypeVar("P", bound=PurePath)


class Located(NamedTuple):
    """The files of one checkpoint; `weight_map` is tensor name -> file name, where an index gives it.

    `commit` is the one that a hub had them at, `notes` what a user should know of where they were found.
    """

    name: str
    files: tuple[SourceFile, ...]
    weight_map: dict[str, str] | None = None
    commit: str = ""
    notes: tuple[str, ...] = ()


def locate(source: str, hub_options: HubOptions = HubOptions()) -> Located:  # noqa: B008 (a tuple)
    """The files behind SOURCE; ContainerError where it is missing or leaves a choice, HubError where a hub fails."""
    if not source:
        # What a shell makes of a variable that is not set; to Path, the current folder.
        raise UsageError("SOURCE is empty: give a checkpoint file, its folder or its index, or hf://org/name")
    path, shown = Path(source), printable(source)
    if is_address(source) or hub_options.hub is not None:
        return _on_hub(source, hub_options)
    if exists(path):
        if hub_options.revision is not None or hub_options.download:
            raise UsageError(f"{shown}: is here already: --revision and --download are for repositories on a hub")
        return _here(path)
    if looks_like_repository(source) and not _meant_here(path):
        return _on_hub(source, hub_options)
    raise ContainerError(
        f"{shown}: no such file or folder", "give a checkpoint file, its folder or its index, or hf://org/name"
    )


def _meant_here(path: Path) -> bool:
    """Whether a path to nothing is a mistyped file's, not a repository's: by its suffix, and the folder it is in."""
    return path.suffix in (*WEIGHT_SUFFIXES, ".json") and (len(path.parts) == 2 or exists(path.parts[0]))


def _here(path: Path) -> Located:
    if path.is_dir():
        path = path / choose_checkpoint(_files_in(path), str(path))
    return _with_shards(printable(str(path)), path, LocalFile, exists)


def _with_shards(name: str, path: P, open_: Callable[[P], SourceFile], there: Callable[[P], bool]) -> Located:
    """The file at a path or, where that is an index, the shards beside it."""
    if not path.name.endswith(INDEX_SUFFIX):
        return Located(name, (open_(path),))
    with closing(open_(path)) as index:
        weight_map, shards = _read_index(index, name, lambda shard: there(path.with_name(shard)))
    with ExitStack() as stack:
        files = tuple(stack.enter_context(closing(open_(path.with_name(shard)))) for shard in shards)
        stack.pop_all()
    return Located(name, files, weight_map)


def _files_in(folder: Path) -> list[str]:
    """All but folders: of what leads nowhere, or is no file, `LocalFile` says so."""
    try:
        return [path.name for path in folder.iterdir() if not path.is_dir()]
    except OSError as error:
        raise ContainerError(f"{printable(str(folder))}: cannot be read: {error.strerror}", READ_HINT) from error


def _on_hub(source: str, hub_options: HubOptions) -> Located:
    # Two libraries that conversions of local files need not wait for.
    from converter.hub import open_repository
    from converter.hub.remote_file import RemoteFile

    address = parse(source, hub_options)
    repository = open_repository(address, lambda folder: _is_whole(folder / address.path))
    folder, notes = repository.folder, repository.notes
    if folder is not None:
        found = _here(folder / address.path)
        # The name goes into the output, which is to be the same wherever the cache lies.
        name = f"{repository.name}/{PurePath(found.name).relative_to(printable(str(folder))).as_posix()}"
        return found._replace(name=name, commit=repository.commit, notes=tuple(notes))
    path = _chosen(repository.files, address.path, repository.name)

    def open_(path: PurePosixPath) -> SourceFile:
        name = str(path)
        local = repository.download(name) if hub_options.download else repository.cached(name)
        return LocalFile(local) if local is not None else RemoteFile(repository, name)

    found = _with_shards(
        f"{repository.name}/{path}", PurePosixPath(path), open_, lambda path: str(path) in repository.files
    )
    return found._replace(commit=repository.commit, notes=(*notes, *_whence(found.files, hub_options)))


def _whence(files: Iterable[SourceFile], hub_options: HubOptions) -> list[str]:
    """A word on files that are here already."""
    if any(file.identity is None for file in files):
        return []
    return [
        "downloaded into the hub's cache, SHA-256 checked" if hub_options.download else "taken from the hub's cache"
    ]


def _is_whole(path: Path) -> bool:
    """Whether a checkpoint lies at a path in a cache, with all its shards."""
    try:
        located = _here(path)
    except ContainerError:
        return False
    for file in located.files:
        file.close()
    return True


def _chosen(files: Iterable[str], path: str, where: str) -> str:
    """The file that `path` names in a repository, or the checkpoint in the folder that it names."""
    if path in files:
        return path
    prefix = f"{path}/" if path else ""
    inside = [name.removeprefix(prefix) for name in files if name.startswith(prefix)]
    if not inside:
        candidates = [name for name in files if name.endswith((*WEIGHT_SUFFIXES, INDEX_SUFFIX))]
        shown = ", ".join(sorted(candidates)[:_SHOWN]) + (", ..." if len(candidates) > _SHOWN else "")
        raise HubError(f"{where}: there is no file {path!r}", f"its checkpoints: {shown or 'none'}")
    return prefix + choose_checkpoint(
        (name for name in inside if "/" not in name), f"{where}/{path}".rstrip("/"), HubError
    )


def choose_checkpoint(names: Iterable[str], where: str, error: type[DsocrError] = ContainerError) -> str:
    """The checkpoint among the files of a folder; an error where there is none, or more than one could be meant."""
    there = sorted(names)
    for name in _STANDARD:
        if name in there:
            return name
    found = [name for name in there if name.endswith(WEIGHT_SUFFIXES)]
    if len(found) == 1:
        return found[0]
    if not found:
        wanted = ", ".join((*_STANDARD, *(f"*{suffix}" for suffix in WEIGHT_SUFFIXES)))
        raise error(f"{where}: holds no checkpoint", f"looked for {wanted}")
    raise error(f"{where}: holds several checkpoints: {', '.join(map(printable, found))}", "name the one to convert")


def _read_index(file: SourceFile, name: str, there: Callable[[str], bool]) -> tuple[dict[str, str], list[str]]:
    """The `weight_map` of an index, and the shards it lists, which must lie beside it: `there` tells."""
    weight_map = _weight_map(file, name)
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        # Separators of any system, and what Windows takes no notice of at the end: an index made to leave its folder
        # there is as hostile here.
        if not shard or shard[-1] in ". " or set(shard) & set("/\\:") or not shard.isprintable():
            raise ContainerError(f"{name}: the shard {shard!r} is not a file beside the index", _INDEX_STEP)
        if not there(shard):
            raise ContainerError(f"{name}: the shard {shard!r} is missing", "download the rest of the checkpoint")
    return weight_map, shards


def _weight_map(file: SourceFile, name: str) -> dict[str, str]:
    """What an index says of which tensor is in which file."""
    if file.size > strict_json.MAX_BYTES:
        raise ContainerError(f"{name}: larger than any index of a sharded checkpoint", _INDEX_STEP)
    try:
        weight_map = strict_json.parse(file.read(0, file.size))["weight_map"]
        if not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ValueError("a file's name is no text")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = error if isinstance(error, ValueError) else "expected a `weight_map` of names"
        raise ContainerError(f"{name}: no index of a sharded checkpoint: {why}", _INDEX_STEP) from error
    if not weight_map:
        raise ContainerError(f"{name}: its `weight_map` lists no files", _INDEX_STEP)
    return cast("dict[str, str]", weight_map)

"""Opens checkpoints: their files, and the descriptions of the tensors in them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

from converter.checkpoint.file_kinds import by_product_step
from converter.checkpoint.locate import Located, locate
from converter.errors import ContainerError, UsageError, first_names
from converter.formats import strict_json
from converter.formats.registry import open_file
from converter.hub.address import is_address
from converter.options import NO_HUB_OPTIONS, HubOptions
from converter.storage.local_file import Range, SourceFile
from converter.storage.progress import OnProgress
from converter.tensors.lazy_tensor import stored_parts
from converter.tensors.tensor_info import Contents, FileContents, TensorInfo

if TYPE_CHECKING:
    from converter.checkpoint.lora import Adapter
    from converter.hub.remote_file import RemoteFile

# The model configs of transformers and timm, and of open_clip.
CONFIG_NAMES = ("config.json", "open_clip_config.json")
# The largest config. Those of language models with a vision tower have about 50 kB.
_MAX_CONFIG_NBYTES = 1 << 20
_SHARDS_STEP = "download the checkpoint again, shards and index"


@dataclass(eq=False, kw_only=True)
class Checkpoint(Located):
    """An open checkpoint. Its metadata was read, but no tensor."""

    containers: tuple[str, ...]  # The container format of each file
    contents: Contents  # Tensors and other values of all files, nested as in the files
    ignored: tuple[str, ...] = ()  # Full names of the classes and functions in pickles that were not imported
    adapter: Adapter | None = None  # A LoRA adapter to merge into the tensors

    @property
    def remote(self) -> list[RemoteFile]:
        """The files that are read from a hub by byte ranges."""
        return [cast("RemoteFile", file) for file in self.files if file.identity is None]

    def prefetch(self, tensors: Iterable[TensorInfo], on_progress: OnProgress) -> None:
        """Start to fetch tensors of remote files in the background. Each can be read once, in this order."""
        self._fetch(tensors, on_progress, keep=False)

    def fetch(self, tensors: Iterable[TensorInfo], on_progress: OnProgress) -> None:
        """Fetch tensors of remote files into local files. They can be read in any order, also at `SourceFile.path`."""
        self._fetch(tensors, on_progress, keep=True)

    def _fetch(self, tensors: Iterable[TensorInfo], on_progress: OnProgress, keep: bool) -> None:
        remote = self.remote
        if not remote:
            return
        spans: dict[SourceFile, list[Range]] = {file: [] for file in remote}
        for tensor in tensors:
            for part in stored_parts(tensor) if tensor.storage.file in spans else ():
                spans[part.storage.file].append(part.storage.span)
        total, lock = sum(file.size for file in self.files), Lock()

        def report() -> None:
            """Report the bytes that were received. Threads call this."""
            with lock:
                fetched, needed = sum(file.fetched_bytes for file in remote), sum(file.needed_bytes for file in remote)
                spared = f"{1 - needed / total:.1%} of {total / 1e9:.2f} GB spared"
                on_progress(f"fetching ({spared})", fetched, needed)

        for file in remote:
            (file.fetch_all if keep else file.prefetch)(spans[file], report)

    def has_config(self, name: str) -> bool:
        """Return whether a config of this name describes the files."""
        return self.find_config(name) is not None

    def read_config(self, name: str) -> dict[str, Any] | None:
        """Parse a config that describes the files; None if there is none, ValueError if it cannot be used."""
        open_config = self.find_config(name)
        if open_config is None:
            return None
        with closing(open_config()) as file:
            if file.size > _MAX_CONFIG_NBYTES:
                raise ValueError(f"{file.size} bytes; the limit is {_MAX_CONFIG_NBYTES}")
            config = strict_json.parse_file(file.read(0, file.size))
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
        return config

    def close(self) -> None:
        """Close all files."""
        for file in self.files:
            file.close()


def open_checkpoint(name: str | Path, hub_options: HubOptions = NO_HUB_OPTIONS) -> Checkpoint:
    """Open all files of SOURCE and read their metadata.

    Raises:
        ContainerError: A file is missing, damaged or hostile.
        HubError: A hub fails or refuses.
        UsageError: SOURCE and `hub_options` contradict each other.
    """
    check_name(name)
    located = locate(str(name), hub_options)
    with ExitStack() as stack:
        for file in located.files:
            stack.callback(file.close)
        containers, shards = zip(*_open_files(located), strict=True)
        is_single = len(shards) == 1 and located.weight_map is None
        contents = shards[0] if is_single else _join_shards(located, shards)
        stack.pop_all()
    with_notes = [contents for contents in shards if isinstance(contents, FileContents)]
    ignored = tuple(dict.fromkeys(name for contents in with_notes for name in contents.ignored))
    notes = [*located.notes, *dict.fromkeys(note for contents in with_notes for note in contents.notes)]
    if ignored:
        # `inspect` lists all of them.
        notes.append(f"not imported or run: {first_names(ignored, 6)}; their instances are ignored")
    fields = {**vars(located), "notes": tuple(notes)}
    return Checkpoint(**fields, containers=containers, contents=contents, ignored=ignored)


def _open_files(located: Located) -> list[tuple[str, Contents]]:
    """Return the container and the contents of each file."""
    if not located.is_dcp:
        try:
            return [open_file(file) for file in located.files]
        except ContainerError as error:
            from converter.formats.pickle_opcodes import RESAVE

            if error.hint == RESAVE:
                error.hint = by_product_step(located.name) or RESAVE
            raise
    from converter.formats import torch_dcp

    metadata, *others = located.files
    contents = torch_dcp.load(metadata, {PurePath(file.name).name: file for file in others})
    return [(torch_dcp.CONTAINER, contents), *((torch_dcp.CONTAINER, {}) for _ in others)]


def check_name(name: object) -> None:
    """Raise UsageError for a source that is neither a path nor an address, such as a dict of tensors."""
    if not isinstance(name, str | os.PathLike):
        step = "save tensors to a file first, with torch.save(tensors, PATH), and give its path"
        raise UsageError(f"a source is a path or an address, not a {type(name).__name__}", step)


@contextmanager
def open_checkpoints(names: Sequence[str | Path], hub_options: HubOptions) -> Iterator[list[Checkpoint]]:
    """Open all sources of a command, as `open_checkpoint` does; close them at the end of the block."""
    with ExitStack() as stack:
        opened = [stack.enter_context(closing(open_checkpoint(name, hub_options))) for name in names]
        check_hub_options(hub_options, opened)
        yield opened


def check_hub_options(hub_options: HubOptions, opened: Iterable[Checkpoint]) -> None:
    """Raise UsageError for hub options of a command whose sources are all local."""
    names = [checkpoint.name for checkpoint in opened]
    given = [name for name in ("hub", "revision", "download") if getattr(hub_options, name)]
    if given and not any(map(is_address, names)):
        raise UsageError(f"{names[0]}: is a local path: --{given[0]} only applies to hub repositories")


def check_unchanged(checkpoints: Iterable[Checkpoint]) -> None:
    """Raise ContainerError if a file was modified after it was opened."""
    for file in (file for checkpoint in checkpoints for file in checkpoint.files):
        file.check_unchanged()


def _join_shards(located: Located, shards: Sequence[Contents]) -> Contents:
    """Merge the contents of all shards; ContainerError if they contradict the index or each other."""
    weight_map = located.weight_map
    joined: Contents = {}
    for file, contents in zip(located.files, shards, strict=True):
        shard = PurePath(file.name).name
        for key, value in contents.items():
            if key in joined:
                raise ContainerError(f"{file.name}: {key!r} is in another shard too", _SHARDS_STEP)
            listed_shard = shard if weight_map is None else weight_map.get(key)
            if isinstance(value, TensorInfo) and listed_shard != shard:
                problem = f"puts it into {listed_shard!r}" if listed_shard else "does not list it"
                raise ContainerError(f"{file.name}: holds {key!r}, but {located.name} {problem}", _SHARDS_STEP)
            joined[key] = value
    missing = [key for key in weight_map or () if not isinstance(joined.get(key), TensorInfo)]
    if missing:
        what = f"lists {len(missing)} tensors that its shards do not hold, such as {missing[0]!r}"
        raise ContainerError(f"{located.name}: {what}", _SHARDS_STEP)
    return joined

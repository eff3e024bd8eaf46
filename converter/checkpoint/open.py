"""A checkpoint opened: its files, and what they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path, PurePath
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple, cast

from converter.checkpoint.locate import Located, locate
from converter.errors import ContainerError
from converter.formats.registry import open_file
from converter.hub.address import HubOptions
from converter.storage.local_file import Range, SourceFile
from converter.tensors.tensor_info import Contents, TensorInfo

if TYPE_CHECKING:
    from converter.hub.remote_file import RemoteFile


# Told what is being done, how much of it is done, and of how much.
OnProgress = Callable[[str, int, int], None]


def progress_counter(on_progress: OnProgress, what: str, total: int) -> Callable[[int], None]:
    """What sums up the bytes it is told of, and tells `progress`."""
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        on_progress(what, done, total)

    return count


def check_unchanged(opened: Iterable[Checkpoint]) -> None:
    """ContainerError where a file has changed since it was opened: what was read may be halves of two."""
    for file in (file for source in opened for file in source.files):
        file.check_unchanged()


# What to do where shards and their index disagree.
_SHARDS_STEP = "download the checkpoint again, shards and index"


class Checkpoint(NamedTuple):
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

    def prefetch(self, tensors: Iterable[TensorInfo], on_progress: OnProgress) -> None:
        """Have remote files fetch ahead what will be read once, in the order of `tensors`; `progress` is told of it."""
        self._fetch(tensors, on_progress, keep=False)

    def fetch(self, tensors: Iterable[TensorInfo], on_progress: OnProgress) -> None:
        """Have remote files fetch `tensors`, for others to read."""
        self._fetch(tensors, on_progress, keep=True)

    def _fetch(self, tensors: Iterable[TensorInfo], on_progress: OnProgress, keep: bool) -> None:
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
                on_progress(f"fetching ({1 - needed / whole:.1%} of {whole / 1e9:.2f} GB spared)", fetched, needed)

        for file in remote:
            (file.fetch_all if keep else file.prefetch)(spans[file], tell)

    def close(self) -> None:
        """Let go of the files."""
        for file in self.files:
            file.close()


def open_checkpoint(name: str | Path, hub_options: HubOptions = HubOptions()) -> Checkpoint:  # noqa: B008 (a tuple)
    """Open all files of SOURCE and read what they say of their tensors, not the tensors.

    ContainerError where one is missing, damaged or hostile, HubError where a hub fails, UsageError for a SOURCE that
    contradicts `access`.
    """
    located = locate(str(name), hub_options)
    with ExitStack() as stack:
        for file in located.files:
            stack.callback(file.close)
        opened = [open_file(file) for file in located.files]
        containers = tuple(container for container, _ in opened)
        held = [contents for _, contents in opened]
        contents = held[0] if located.weight_map is None else _joined(located, held)
        stack.pop_all()
    return Checkpoint(located.name, located.files, containers, contents, located.commit, located.notes)


def _joined(located: Located, shards: list[Contents]) -> Contents:
    """The tensors of all shards, which must be those that the index lists, where it lists them."""
    joined: Contents = {}
    for file, contents in zip(located.files, shards, strict=True):
        shard = PurePath(file.name).name
        for key, value in contents.items():
            if key in joined:
                raise ContainerError(f"{file.name}: {key!r} stands in another shard too", _SHARDS_STEP)
            listed = (located.weight_map or {}).get(key)
            if isinstance(value, TensorInfo) and listed != shard:
                where = f"puts it into {listed!r}" if listed else "does not list it"
                raise ContainerError(f"{file.name}: holds {key!r}, but {located.name} {where}", _SHARDS_STEP)
            joined[key] = value
    absent = [key for key in located.weight_map or {} if not isinstance(joined.get(key), TensorInfo)]
    if absent:
        what = f"lists {len(absent)} tensors that its shards do not hold, such as {absent[0]!r}"
        raise ContainerError(f"{located.name}: {what}", _SHARDS_STEP)
    return joined

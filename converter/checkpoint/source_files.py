"""Access to files on this machine and in a repository on a hub, under one interface."""

from __future__ import annotations

from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING

from converter.errors import ContainerError, DsocrError, HubError, printable
from converter.storage.local_file import READ_HINT, LocalFile, SourceFile, exists

if TYPE_CHECKING:
    from converter.hub.repository import Repository


class LocalFiles:
    """The files of this machine."""

    error: type[DsocrError] = ContainerError  # The exception for a folder without a checkpoint

    def name(self, path: PurePath) -> str:
        """Return the text of a path for messages."""
        return printable(str(path))

    def exists(self, path: PurePath) -> bool:
        return exists(Path(path))

    def open(self, path: PurePath) -> SourceFile:
        return LocalFile(Path(path))

    def entries(self, folder: PurePath) -> tuple[list[str], list[str]]:
        """Return the names of the files and of the folders in a folder."""
        try:
            entries = [(path.name, path.is_dir()) for path in Path(folder).iterdir() if not _is_of_macos(path.name)]
        except OSError as error:
            raise ContainerError(f"{self.name(folder)}: cannot be read: {error.strerror}", READ_HINT) from error
        # `LocalFile` reports broken links and special files.
        return [name for name, is_dir in entries if not is_dir], [name for name, is_dir in entries if is_dir]


class HubFiles:
    """The files of a repository. Files in the hub's cache are read from the cache."""

    error: type[DsocrError] = HubError

    def __init__(self, repository: Repository, download: bool) -> None:
        self._repository, self._download = repository, download

    def name(self, path: PurePath) -> str:
        return f"{self._repository.name}/{path}".removesuffix("/.")

    def exists(self, path: PurePath) -> bool:
        return str(path) in self._repository.files

    def open(self, path: PurePath) -> SourceFile:
        from converter.hub.remote_file import RemoteFile

        name = str(path)
        local = self._repository.download(name) if self._download else self._repository.cached_file(name)
        return LocalFile(local) if local is not None else RemoteFile(self._repository, name)

    def entries(self, folder: PurePath) -> tuple[list[str], list[str]]:
        paths = [PurePosixPath(name) for name in self._repository.files]
        inside = [path.relative_to(folder).parts for path in paths if path.is_relative_to(folder)]
        files = [parts[0] for parts in inside if len(parts) == 1 and not _is_of_macos(parts[0])]
        return files, sorted({parts[0] for parts in inside if len(parts) > 1})


def _is_of_macos(name: str) -> bool:
    """Return whether macOS wrote a file next to another one on another file system: ._NAME is no copy of NAME."""
    return name.startswith("._")


Files = LocalFiles | HubFiles

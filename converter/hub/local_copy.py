"""Parts of a remote file in a temporary file, for libraries that open files by path."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from threading import Lock

from converter.errors import OutputError
from converter.storage.local_file import LocalFile
from converter.storage.range_set import RangeSet

_HINT = "free some space, or set TMPDIR to a folder that has it"


class LocalCopy:
    """A sparse temporary file that has the fetched bytes of a remote file at the same offsets.

    Args:
        name: Name of the remote file, for messages.
        size: Size of the remote file in bytes.
    """

    def __init__(self, name: str, size: int) -> None:
        self._name = name
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="dsocr-", ignore_cleanup_errors=True)
            self.path = Path(self._folder.name) / "partial"
            with self.path.open("wb") as file:
                file.truncate(size)
        except (OSError, OverflowError) as error:
            raise self._storage_error(error) from error
        self.file = LocalFile(self.path, name)
        self.stored_ranges, self._lock = RangeSet(), Lock()

    def require_space(self, nbytes: int) -> None:
        """Raise OutputError if the disk has less than `nbytes` free."""
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        if free < nbytes:
            raise OutputError(f"{folder}: {nbytes} bytes of {self._name} do not fit, {free} are free", _HINT)

    def write(self, offset: int, pieces: Iterable[bytes]) -> None:
        """Write consecutive bytes from `offset` on; several threads may write."""
        try:
            with self.path.open("r+b", buffering=0) as file:
                file.seek(offset)
                for piece in pieces:
                    file.write(piece)
                end = file.tell()
        except OSError as error:
            raise self._storage_error(error) from error
        with self._lock:
            self.stored_ranges.add(offset, end)

    def close(self) -> None:
        """Delete the file."""
        self.file.close()
        self._folder.cleanup()

    def _storage_error(self, error: Exception) -> OutputError:
        return OutputError(f"{tempfile.gettempdir()}: a copy of {self._name} cannot be stored: {error}", _HINT)

"""A file on a hub that is read as if it lay here: what is read is fetched, and nothing else.

Fetched bytes go into a sparse file of the remote one's size, at their own places. Everything that reads local files
(checksums, computed tensors, torch.load for the verification) can so read remote ones, and memory holds none of them.
A conversion, which reads each byte once, has them removed behind it: they are never more than a few chunks.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO

from converter.errors import HubError, OutputError
from converter.hub.http_range import Transfer
from converter.hub.ranges import Chunk, chunks
from converter.hub.repository import Repository
from converter.storage.local_file import LocalFile, Range
from converter.storage.range_set import RangeSet

# Headers, directories and pickles lie at a file's ends: one request brings what several small reads want.
_BLOCK = 128 << 10
# Before a torch zip's directory lie members of a few bytes that torch.load asks for, and we do not.
_BEFORE = 4 << 10
# Requests under way, and chunks that may lie ahead of the reader: enough for a line with a long delay, few enough for
# what is kept to stay small.
_WORKERS, _AHEAD = 4, 8
# Seconds that a thread gets to notice that it is no longer wanted; while a server has not begun to answer, it cannot.
_LEAVING = 1.0


class RemoteFile:
    """A SourceFile on a hub. `fetched` counts the bytes that have come, `needed` those and what they are to become.

    Threads may read it, one at a time: what is removed behind one reader would be zeros to another. Reading raises
    HubError where the hub fails, OutputError where what is fetched finds no room.
    """

    identity = None

    def __init__(self, repository: Repository, path: str) -> None:
        self.name = f"{repository.name}/{path}"
        size = repository.files[path].size
        if size is None:
            raise HubError(f"{self.name}: the hub does not tell its size", "add --download to fetch it whole")
        self.size = size
        self.fetched = self.needed = 0
        self._transfer = Transfer(repository, path, self.size)
        self._spool, self.path = _spool(self.size, self.name)
        self._local = LocalFile(Path(self.path), self.name)
        self._have, self._lock = RangeSet(), threading.Lock()
        self._reading = threading.RLock()
        self._pool = ThreadPoolExecutor(_WORKERS, "fetch")
        # What will be read, in order, and the place in it that the reader has come to.
        self._wanted: list[Range] = []
        self._place = 0
        # Whether it is known what will be read: until then it is headers and directories.
        self._announced = False
        # Chunks not yet asked for, and those asked for whose bytes are still of use.
        self._ahead: deque[Chunk] = deque()
        self._asked: list[tuple[Chunk, Future[None]]] = []
        self._under_way: set[Future[None]] = set()
        self._tell: Callable[[], None] = lambda: None

    def close(self) -> None:
        """Stop what is under way and remove what was fetched."""
        self._transfer.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._local.close()
        # A thread that wrote after this would write into whatever file has the number next: the last one closes it.
        if not wait(list(self._under_way), _LEAVING).not_done:
            self._spool.close()
        self._transfer.close()

    def prefetch(self, wanted: Sequence[Range], tell: Callable[[], None]) -> None:
        """Fetch ahead what will be read once, in this order; `tell` is called as bytes come."""
        self._tell, self._place = tell, 0
        self._wanted = [(start, min(end, self.size)) for start, end in wanted]
        self._ahead = deque(chunks(self._wanted))
        self._expect(self._ahead)
        self._ask_ahead()

    def fetch_all(self, wanted: Sequence[Range], tell: Callable[[], None] = lambda: None) -> None:
        """Fetch what others will read from `path`, and return when it is there."""
        self._tell = tell
        asked = chunks([(start, min(end, self.size)) for start, end in wanted])
        self._expect(asked)
        self._check_room()
        for future in [self._submit(chunk.start, chunk.end) for chunk in asked]:
            future.result()

    def _expect(self, asked: Iterable[Chunk]) -> None:
        self._announced = True
        missing = [part for chunk in asked for part in self._missing(chunk.start, chunk.end)]
        self.needed = self.fetched + sum(end - start for start, end in missing)

    def _check_room(self) -> None:
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        if free < self.needed - self.fetched:
            raise OutputError(
                f"{folder}: {self.needed} bytes of {self.name} are kept there for a while, and {free} are free",
                "free some room, or set TMPDIR to a folder that has it",
            )

    def readinto(self, buffer: memoryview, offset: int) -> None:
        with self._reading:
            self._ensure(offset, min(offset + len(buffer), self.size))
            self._local.readinto(buffer, offset)

    def read(self, offset: int, length: int) -> bytes:
        with self._reading:
            self._ensure(max(offset, 0), min(offset + length, self.size))
            return self._local.read(offset, length)

    def check_unchanged(self) -> None:
        """Nothing to do: every answer was checked to be of the same file."""

    def _missing(self, start: int, end: int) -> list[Range]:
        with self._lock:
            return list(self._have.missing(start, end))

    def _ensure(self, start: int, end: int) -> None:
        """Have start to end fetched: wait for it if it was to be, else ask for it now, with what lies around it."""
        self._advance(start)
        while any(chunk.start < end and start < chunk.end for chunk in self._ahead):
            self._ask(self._ahead.popleft())
        for chunk, future in self._asked:
            if chunk.start < end and start < chunk.end:
                future.result()
        for low, high in self._missing(start if self._announced else max(start - _BEFORE, 0), end):
            self._fetch(low - low % _BLOCK, min(high + -high % _BLOCK, self.size))

    def _advance(self, offset: int) -> None:
        """The reader is at `offset`: remove what lies behind it, and ask for what comes next."""
        rest = range(self._place, len(self._wanted))
        place = next((i for i in rest if self._wanted[i][0] <= offset < self._wanted[i][1]), self._place)
        if place == self._place:
            return
        self._place = place
        for chunk, future in self._asked:
            if chunk.last < place:
                # One that the reader passed by may still be written to.
                future.cancel() or wait([future])
                self._remove(chunk)
        self._asked = [(chunk, future) for chunk, future in self._asked if chunk.last >= place]
        self._ask_ahead()

    def _ask_ahead(self) -> None:
        while self._ahead and sum(chunk.first > self._place for chunk, _ in self._asked) < _AHEAD:
            self._ask(self._ahead.popleft())

    def _ask(self, chunk: Chunk) -> None:
        self._asked.append((chunk, self._submit(chunk.start, chunk.end)))

    def _submit(self, start: int, end: int) -> Future[None]:
        future = self._pool.submit(self._fetch, start, end)
        self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)
        return future

    def _remove(self, chunk: Chunk) -> None:
        """Let go of a chunk's bytes: should they be read again after all, they are fetched again."""
        with self._lock:
            self._have.remove(chunk.start, chunk.end)
        _punch_hole(self._spool.fileno(), chunk.start, chunk.end - chunk.start)

    def _fetch(self, start: int, end: int) -> None:
        """Have start to end here; what came with the metadata is."""
        for part in self._missing(start, end):
            for segment, at in self._transfer.fetch(*part):
                self._keep(segment, at)

    def _keep(self, segment: memoryview, at: int) -> None:
        end = at + len(segment)
        rest = segment
        try:
            while rest:
                rest = rest[os.pwrite(self._spool.fileno(), rest, end - len(rest)) :]
        except OSError as error:
            raise _no_room(self.name, error) from error
        with self._lock:
            self._have.add(at, end)
            self.fetched += len(segment)
        self._tell()


def _spool(size: int, name: str) -> tuple[IO[bytes], str]:
    """A sparse file of `size` bytes, and a path for the libraries that open files by theirs.

    Where a file without a name can be opened by its number, it has none: then nothing is left, however we end.
    """
    try:
        if Path("/proc/self/fd").is_dir():
            file: IO[bytes] = tempfile.TemporaryFile(prefix="dsocr-")  # noqa: SIM115
            path = f"/proc/self/fd/{file.fileno()}"
        else:
            file = tempfile.NamedTemporaryFile(prefix="dsocr-")  # noqa: SIM115
            path = file.name
        os.truncate(file.fileno(), size)
    except (OSError, OverflowError) as error:
        raise _no_room(f"{name} ({size} bytes)", error) from error
    return file, path


def _punch_hole(fd: int, start: int, length: int) -> None:
    """Give the room of a part of a file back, where the system can: on Linux alone, and not on every file system."""
    if sys.platform == "linux":
        keep_size, punch = 1, 2
        # A failure costs room, and nothing else.
        ctypes.CDLL(None).fallocate(fd, keep_size | punch, ctypes.c_long(start), ctypes.c_long(length))


def _no_room(name: str, error: Exception) -> OutputError:
    return OutputError(
        f"{tempfile.gettempdir()}: parts of {name} cannot be kept there: {error}",
        "free some room, or set TMPDIR to a folder that has it",
    )

"""A file on a hub, read like a local one: only the bytes that are read are fetched."""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial

from converter.errors import ContainerError, HubError
from converter.hub.http_range import RangeReader
from converter.hub.local_copy import LocalCopy
from converter.hub.read_ahead import CHUNK, ReadAhead, chunks, in_background
from converter.hub.repository import Repository
from converter.storage.local_file import Range
from converter.storage.range_set import RangeSet

# Metadata is at a file's ends and is read in small parts: each request is rounded to whole blocks.
_BLOCK = 128 << 10
# torch.load reads members of a few bytes just before a zip's directory, which a conversion does not.
_BEFORE = 4 << 10
# Bytes of metadata that are kept for the next read.
_MAX_RECENT = 16 << 20
_CONNECTIONS = 4


class RemoteFile:
    """A SourceFile on a hub.

    Threads may read it, one at a time. Reading raises HubError, or ContainerError if the file has been replaced.

    Attributes:
        fetched: Bytes received so far.
        needed: Bytes received so far and bytes that are known to be needed.
    """

    identity = None

    def __init__(self, repository: Repository, path: str) -> None:
        self.name = f"{repository.name}/{path}"
        size = repository.files[path].size
        if size is None:
            raise HubError(f"{self.name}: the hub does not give its size", "add --download to fetch the whole file")
        self.size = size
        self.fetched = self.needed = 0
        self._repository, self._reader = repository, RangeReader(repository, path, size)
        self._counting, self._reading = threading.Lock(), threading.RLock()
        self._on_fetched: Callable[[], None] = lambda: None
        self._ahead: ReadAhead | None = None
        self._copy: LocalCopy | None = None
        # Parts that were read without notice: which ones, and the last ones themselves.
        self._unannounced = RangeSet()
        self._recent: deque[tuple[int, memoryview]] = deque()

    def close(self) -> None:
        self._reader.stop()
        self._repository.close()
        self._ahead = None
        self._recent.clear()
        if self._copy is not None:
            self._copy.close()

    @property
    def path(self) -> str:
        """The temporary file with what `fetch_all` has fetched; empty before."""
        return str(self._copy.path) if self._copy is not None else ""

    def prefetch(self, ranges: Sequence[Range], on_fetched: Callable[[], None]) -> None:
        """Announce reads: from the first one on, the next ones are fetched in the background and held in memory.

        Args:
            ranges: Ranges in the order of reading; each is read once.
            on_fetched: Called by several threads after bytes have been received.
        """
        self._on_fetched = on_fetched
        # Small files are read whole with their metadata.
        held = self._in_memory()
        ranges = [(start, end) for start, end in self._within(ranges) if list(held.missing(start, end))]
        self._expect([(chunk.start, chunk.end) for chunk in chunks(ranges)])
        self._ahead = ReadAhead(ranges, self._fetch)

    def fetch_all(self, ranges: Sequence[Range], on_fetched: Callable[[], None] = lambda: None) -> None:
        """Fetch ranges, and the metadata read so far, into the file at `path`.

        Args:
            ranges: Ranges in any order.
            on_fetched: Called by several threads after bytes have been received.

        Raises:
            OutputError: There is no space for them.
        """
        self._on_fetched = on_fetched
        copy = self._copy = self._copy or LocalCopy(self.name, self.size)
        metadata = [(max(start - _BEFORE, 0), end) for start, end in self._unannounced]
        parts = chunks([*self._within(ranges), *metadata])
        missing = [part for chunk in parts for part in copy.ranges.missing(chunk.start, chunk.end)]
        self._expect(missing)
        copy.require_space(self.needed - self.fetched)
        queue = deque(missing)
        for job in [in_background(partial(self._fetch_into, copy, queue)) for _ in range(_CONNECTIONS)]:
            job.result()

    def _fetch_into(self, copy: LocalCopy, queue: deque[Range]) -> None:
        """Fetch ranges until other threads and this one have emptied the queue."""
        while True:
            try:
                start, end = queue.popleft()
            except IndexError:
                return
            # Closed on errors too: the connection ends with it.
            with closing(self._pieces(start, end)) as pieces:
                copy.write(start, pieces)

    def _in_memory(self) -> RangeSet:
        """Return the ranges of the metadata that are still in memory."""
        held = RangeSet()
        for start, data in self._recent:
            held.add(start, start + len(data))
        return held

    def _within(self, ranges: Sequence[Range]) -> list[Range]:
        return [(start, min(end, self.size)) for start, end in ranges]

    def _expect(self, ranges: Sequence[Range]) -> None:
        self.needed = self.fetched + sum(end - start for start, end in ranges)

    def readinto(self, buffer: memoryview, offset: int) -> None:
        self._check_bounds(offset, len(buffer))
        end = offset + len(buffer)
        with self._reading:
            if self._copy is not None and not list(self._copy.ranges.missing(offset, end)):
                self._copy.file.readinto(buffer, offset)
                return
            while offset < end:
                start, data = self._part(offset, end)
                count = min(start + len(data), end) - offset
                buffer[:count] = data[offset - start : offset - start + count]
                buffer, offset = buffer[count:], offset + count

    def read(self, offset: int, length: int) -> bytes:
        # Checked before memory is allocated: a file may claim any length.
        self._check_bounds(offset, length)
        data = bytearray(length)
        self.readinto(memoryview(data), offset)
        return bytes(data)

    def _check_bounds(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            what = f"{length} bytes at byte {offset} are beyond its end, at {self.size}"
            raise ContainerError(f"{self.name}: truncated: {what}", "run again, or pin it with --revision")

    def check_unchanged(self) -> None:
        """Do nothing: every response was checked to be of the same file."""

    def _part(self, offset: int, end: int) -> tuple[int, memoryview]:
        """Return bytes around `offset` and where they start: from memory, or fetched now."""
        part = self._ahead.find(offset) if self._ahead is not None else None
        recent = (part for part in self._recent if part[0] <= offset < part[0] + len(part[1]))
        return part or next(recent, None) or self._fetch_around(offset, end)

    def _fetch_around(self, offset: int, end: int) -> tuple[int, memoryview]:
        """Fetch `offset` to `end`, rounded to blocks and without what is in memory."""
        low = offset // _BLOCK * _BLOCK
        low = max([low, *(start + len(data) for start, data in self._recent if start <= offset)])
        high = min(-(-end // _BLOCK) * _BLOCK, low + CHUNK, self.size)
        high = min([high, *(start for start, _ in self._recent if start > offset)])
        data = self._fetch(low, high)
        self._unannounced.add(low, high)
        self._recent.append((low, data))
        while sum(len(data) for _, data in self._recent) > _MAX_RECENT:
            self._recent.popleft()
        return low, data

    def _fetch(self, start: int, end: int) -> memoryview:
        # A mapping is given back to the system as soon as it is dropped; malloc keeps what several threads free.
        data = memoryview(mmap.mmap(-1, end - start))
        at = 0
        for piece in self._pieces(start, end):
            data[at : at + len(piece)] = piece
            at += len(piece)
        return data

    def _pieces(self, start: int, end: int) -> Generator[bytes, None, None]:
        for piece in self._reader.read(start, end):
            with self._counting:
                self.fetched += len(piece)
            self._on_fetched()
            yield piece

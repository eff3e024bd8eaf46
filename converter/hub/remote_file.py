"""A file on a hub that is read like a local one; only the bytes that are read are fetched."""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial

from converter.hub.http_range import RangeReader
from converter.hub.local_copy import LocalCopy
from converter.hub.read_ahead import MAX_CHUNK_SIZE, ReadAhead, in_background, plan_chunks
from converter.hub.repository import Repository
from converter.storage.local_file import Range, SourceFile
from converter.storage.range_set import RangeSet

# Requests for metadata are rounded to whole blocks of this many bytes, as metadata is read in small parts.
_BLOCK_SIZE = 128 << 10
# Bytes that `fetch_all` adds before metadata: torch.load reads small members in front of a zip's directory.
_SIZE_BEFORE_METADATA = 4 << 10
# Bytes of metadata that are kept in memory for later reads.
_MAX_METADATA_SIZE = 16 << 20
_NUM_CONNECTIONS = 4


class RemoteFile(SourceFile):
    """A SourceFile on a hub.

    Several threads may read it. Reading raises HubError, or ContainerError if the file has been replaced.

    Attributes:
        path: The path of the temporary file that `fetch_all` writes; empty before it was called.
        fetched_bytes: The number of bytes received so far.
        needed_bytes: `fetched_bytes`, plus the number of bytes that are known to be needed.
    """

    copy_hint = "run again, or pin it with --revision"

    def __init__(self, repository: Repository, path: str) -> None:
        self.name = f"{repository.name}/{path}"
        self._repository, self._reader = repository, RangeReader(repository, path)
        self.size, self.path = self._reader.size, ""
        self.fetched_bytes = self.needed_bytes = 0
        self._count_lock, self._read_lock = threading.Lock(), threading.RLock()
        self._on_fetched: Callable[[], None] = lambda: None
        self._read_ahead: ReadAhead | None = None
        self._copy: LocalCopy | None = None
        # Ranges that were read without `prefetch`, and the latest of them with their bytes, by offset.
        self._metadata_ranges = RangeSet()
        self._metadata: deque[tuple[int, memoryview]] = deque()

    def close(self) -> None:
        self._reader.stop()
        self._repository.close()
        self._read_ahead = None
        self._metadata.clear()
        if self._copy is not None:
            self._copy.close()

    def prefetch(self, ranges: Sequence[Range], on_fetched: Callable[[], None]) -> None:
        """Announce reads, so that the next ranges are fetched in the background while others are read.

        Args:
            ranges: The ranges in the order in which they will be read, each once.
            on_fetched: Called by several threads after bytes have been received.
        """
        self._on_fetched = on_fetched
        in_memory = RangeSet()
        for start, data in self._metadata:
            in_memory.add(start, start + len(data))
        # Reading the metadata of a small file may have fetched all of it.
        ranges = [(start, end) for start, end in self._within(ranges) if list(in_memory.missing(start, end))]
        self._set_needed([(chunk.start, chunk.end) for chunk in plan_chunks(ranges)])
        self._read_ahead = ReadAhead(ranges, self._fetch)

    def fetch_all(self, ranges: Sequence[Range], on_fetched: Callable[[], None] = lambda: None) -> None:
        """Fetch ranges, and the metadata read so far, into the temporary file at `path`.

        Args:
            ranges: Ranges in any order.
            on_fetched: Called by several threads after bytes have been received.

        Raises:
            OutputError: The disk has no space for them.
        """
        self._on_fetched = on_fetched
        copy = self._copy = self._copy or LocalCopy(self.name, self.size)
        self.path = str(copy.path)
        metadata_ranges = [(max(start - _SIZE_BEFORE_METADATA, 0), end) for start, end in self._metadata_ranges]
        chunks = plan_chunks([*self._within(ranges), *metadata_ranges])
        missing = [range_ for chunk in chunks for range_ in copy.stored_ranges.missing(chunk.start, chunk.end)]
        self._set_needed(missing)
        copy.require_space(self.needed_bytes - self.fetched_bytes)
        queue = deque(missing)
        for job in [in_background(partial(self._fetch_into, copy, queue)) for _ in range(_NUM_CONNECTIONS)]:
            job.result()

    def _fetch_into(self, copy: LocalCopy, queue: deque[Range]) -> None:
        """Fetch ranges until the queue, which several threads share, is empty."""
        while True:
            try:
                start, end = queue.popleft()
            except IndexError:
                return
            # Closing it ends the connection, also if writing fails.
            with closing(self._receive(start, end)) as received:
                copy.write(start, received)

    def _within(self, ranges: Sequence[Range]) -> list[Range]:
        return [(start, min(end, self.size)) for start, end in ranges]

    def _set_needed(self, ranges: Sequence[Range]) -> None:
        self.needed_bytes = self.fetched_bytes + sum(end - start for start, end in ranges)

    def _readinto(self, buffer: memoryview, offset: int) -> None:
        end = offset + len(buffer)
        with self._read_lock:
            if self._copy is not None and not list(self._copy.stored_ranges.missing(offset, end)):
                self._copy.file.readinto(buffer, offset)
                return
            while offset < end:
                start, data = self._get(offset, end)
                count = min(start + len(data), end) - offset
                buffer[:count] = data[offset - start : offset - start + count]
                buffer, offset = buffer[count:], offset + count

    def check_unchanged(self) -> None:
        """Do nothing, as every response was already checked to be of the same file."""

    def _get(self, offset: int, end: int) -> tuple[int, memoryview]:
        """Return bytes that include `offset`, preceded by their own offset; fetch them if they are not in memory."""
        chunk = self._read_ahead.find(offset) if self._read_ahead is not None else None
        metadata = (block for block in self._metadata if block[0] <= offset < block[0] + len(block[1]))
        return chunk or next(metadata, None) or self._fetch_metadata(offset, end)

    def _fetch_metadata(self, offset: int, end: int) -> tuple[int, memoryview]:
        """Fetch `offset` to `end`, rounded to blocks, except bytes that are in memory."""
        low = offset // _BLOCK_SIZE * _BLOCK_SIZE
        low = max([low, *(start + len(data) for start, data in self._metadata if start <= offset)])
        high = min(-(-end // _BLOCK_SIZE) * _BLOCK_SIZE, low + MAX_CHUNK_SIZE, self.size)
        high = min([high, *(start for start, _ in self._metadata if start > offset)])
        data = self._fetch(low, high)
        self._metadata_ranges.add(low, high)
        self._metadata.append((low, data))
        while sum(len(data) for _, data in self._metadata) > _MAX_METADATA_SIZE:
            self._metadata.popleft()
        return low, data

    def _fetch(self, start: int, end: int) -> memoryview:
        # Unlike malloc, an anonymous map returns its memory to the system as soon as it is deleted.
        data = memoryview(mmap.mmap(-1, end - start))
        position = 0
        for received in self._receive(start, end):
            data[position : position + len(received)] = received
            position += len(received)
        return data

    def _receive(self, start: int, end: int) -> Generator[bytes, None, None]:
        """Yield the bytes from offset `start` to `end` (exclusive) and count them."""
        for data in self._reader.read(start, end):
            with self._count_lock:
                self.fetched_bytes += len(data)
            self._on_fetched()
            yield data

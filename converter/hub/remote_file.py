"""A file on a hub that is read like a local one; only the bytes that are read are fetched."""

from __future__ import annotations

import bisect
import mmap
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from converter.errors import OutputError
from converter.hub.http_range import RangeReader
from converter.hub.repository import Repository
from converter.storage.local_file import LocalFile, Range, SourceFile
from converter.storage.range_set import RangeSet

_T = TypeVar("_T")

# Bytes between two ranges that are fetched together with them, as that is faster than another request.
_MAX_GAP = 64 << 10
# Largest size of a request, in bytes.
MAX_CHUNK_SIZE = 8 << 20
# Chunks that are in memory or being fetched at one time.
MAX_CHUNKS = 8
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
        fetched_bytes: The bytes received so far.
        needed_bytes: `fetched_bytes` and the bytes that are known to be needed.
    """

    copy_hint = "run again, or pin it with --revision"

    def __init__(self, repository: Repository, path: str) -> None:
        self.name, self.path = f"{repository.name}/{path}", ""
        self._repository, self._reader = repository, RangeReader(repository, path)
        self.size = self._reader.size
        self.fetched_bytes = self.needed_bytes = 0
        self._count_lock, self._read_lock = threading.Lock(), threading.RLock()
        self._on_fetched: Callable[[], None] = lambda: None
        self._read_ahead: _ReadAhead | None = None
        self._copy: _LocalCopy | None = None
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
        chunks = plan_chunks(ranges)
        self._set_needed([(chunk.start, chunk.end) for chunk in chunks])
        self._read_ahead = _ReadAhead(ranges, chunks, self._fetch)

    def fetch_all(self, ranges: Sequence[Range], on_fetched: Callable[[], None] = lambda: None) -> None:
        """Fetch ranges, and the metadata read so far, into the temporary file at `path`.

        Args:
            ranges: Ranges in any order.
            on_fetched: Called by several threads after bytes have been received.

        Raises:
            OutputError: The disk has no space for them.
        """
        self._on_fetched = on_fetched
        copy = self._copy = self._copy or _LocalCopy(self.name, self.size)
        self.path = str(copy.path)
        metadata_ranges = [(max(start - _SIZE_BEFORE_METADATA, 0), end) for start, end in self._metadata_ranges]
        chunks = plan_chunks([*self._within(ranges), *metadata_ranges])
        missing = [range_ for chunk in chunks for range_ in copy.stored.missing(chunk.start, chunk.end)]
        self._set_needed(missing)
        copy.require_space(self.needed_bytes - self.fetched_bytes)
        queue = deque(missing)
        for job in [_in_background(partial(self._fetch_into, copy, queue)) for _ in range(_NUM_CONNECTIONS)]:
            job.result()

    def _fetch_into(self, copy: _LocalCopy, queue: deque[Range]) -> None:
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
            if self._copy is not None and not list(self._copy.stored.missing(offset, end)):
                self._copy.file.readinto(buffer, offset)
                return
            while offset < end:
                chunk = self._read_ahead.find(offset) if self._read_ahead is not None else None
                cached = (block for block in self._metadata if block[0] <= offset < block[0] + len(block[1]))
                start, data = chunk or next(cached, None) or self._fetch_metadata(offset, end)
                count = min(start + len(data), end) - offset
                buffer[:count] = data[offset - start : offset - start + count]
                buffer, offset = buffer[count:], offset + count

    def check_unchanged(self) -> None:
        """Do nothing, as every response was already checked to be of the same file."""

    def _fetch_metadata(self, offset: int, end: int) -> tuple[int, memoryview]:
        """Fetch `offset` to `end`, rounded to blocks, except those in memory; return them after their offset."""
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
        for data in self._reader.read(start, end):
            with self._count_lock:
                self.fetched_bytes += len(data)
            self._on_fetched()
            yield data


class _LocalCopy:
    """A sparse temporary file with the fetched bytes of a remote file at the same offsets.

    Libraries that open files by path read it.
    """

    def __init__(self, name: str, size: int) -> None:
        self._name, self.stored, self._lock = name, RangeSet(), threading.Lock()
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="dsocr-", ignore_cleanup_errors=True)
            self.path = Path(self._folder.name) / "partial"
            with self.path.open("wb") as file:
                file.truncate(size)
        except (OSError, OverflowError) as error:
            raise self._error(str(error)) from error
        self.file = LocalFile(self.path, name)

    def require_space(self, nbytes: int) -> None:
        """Raise OutputError if the disk has less than `nbytes` free."""
        free = shutil.disk_usage(tempfile.gettempdir()).free
        if free < nbytes:
            raise self._error(f"{nbytes} bytes are needed and {free} are free")

    def write(self, offset: int, pieces: Iterable[bytes]) -> None:
        """Write consecutive bytes from `offset` on; several threads may write."""
        try:
            with self.path.open("r+b", buffering=0) as file:
                file.seek(offset)
                for piece in pieces:
                    file.write(piece)
                end = file.tell()
        except OSError as error:
            raise self._error(str(error)) from error
        with self._lock:
            self.stored.add(offset, end)

    def close(self) -> None:
        """Delete the file."""
        self.file.close()
        self._folder.cleanup()

    def _error(self, problem: str) -> OutputError:
        hint = "free some space, or set TMPDIR to a folder that has it"
        return OutputError(f"{tempfile.gettempdir()}: a copy of {self._name} cannot be stored: {problem}", hint)


class Chunk(NamedTuple):
    """The byte range of one request, and the indices of the first and the last read that need it."""

    first_read: int
    start: int
    end: int
    last_read: int


def plan_chunks(ranges: Sequence[Range], gap: int = _MAX_GAP, size: int = MAX_CHUNK_SIZE) -> list[Chunk]:
    """Merge neighbouring ranges and split them into requests, ordered by their first use.

    Args:
        ranges: Ranges in the order of reading; they may overlap.
        gap: Largest gap between two ranges that are fetched together.
        size: Largest size of a request, in bytes.
    """
    merged: list[Range] = []
    for start, end in sorted(ranges):
        if merged and start - merged[-1][1] <= gap:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    requests = [(low, min(low + size, end)) for start, end in merged for low in range(start, end, size)]
    ends = [end for _, end in requests]
    reads: list[list[int]] = [[] for _ in requests]
    for number, (start, end) in enumerate(ranges):
        for index in range(bisect.bisect_right(ends, start), len(requests)):
            if requests[index][0] >= end:
                break
            reads[index].append(number)
    return sorted(Chunk(min(used), *request, max(used)) for request, used in zip(requests, reads, strict=True) if used)


def _in_background(function: Callable[[], _T]) -> Future[_T]:
    """Call a function in a daemon thread: Python waits for those of `concurrent.futures` when it exits."""
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="fetch", daemon=True).start()
    return future


class _ReadAhead:
    """Keeps a window of chunks in memory that moves along with a reader of `ranges`; `fetch` is called in threads.

    A chunk that is needed again after it has left the window is not fetched again: `find` returns None for it.
    """

    def __init__(
        self, ranges: Sequence[Range], chunks: Iterable[Chunk], fetch: Callable[[int, int], memoryview]
    ) -> None:
        self._ranges, self._fetch, self._next_read = ranges, fetch, 0
        self._queue = deque(chunks)
        self._window: dict[Chunk, Future[memoryview]] = {}

    def find(self, offset: int) -> tuple[int, memoryview] | None:
        """Move the window to `offset`; return the start and the bytes of the chunk there, or None."""
        remaining = range(self._next_read, len(self._ranges))
        reads = (index for index in remaining if self._ranges[index][0] <= offset < self._ranges[index][1])
        self._next_read = next(reads, self._next_read)
        self._window = {chunk: data for chunk, data in self._window.items() if chunk.last_read >= self._next_read}
        while self._queue and len(self._window) < MAX_CHUNKS:
            chunk = self._queue.popleft()
            if chunk.last_read >= self._next_read:
                self._window[chunk] = _in_background(partial(self._fetch, chunk.start, chunk.end))
        for chunk, data in self._window.items():
            if chunk.start <= offset < chunk.end:
                return chunk.start, data.result()
        return None

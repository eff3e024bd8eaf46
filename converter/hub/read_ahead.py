"""Reads ahead: fetches byte ranges in the background and keeps them in memory until they have been read."""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from threading import Thread
from typing import NamedTuple, TypeVar

from converter.storage.local_file import Range

T = TypeVar("T")

# Bytes between two ranges that are fetched together with them, as that is faster than another request.
_MAX_GAP = 64 << 10
# Largest size of a request, in bytes.
MAX_CHUNK_SIZE = 8 << 20
# Chunks that are in memory or being fetched at one time.
MAX_CHUNKS = 8


class Chunk(NamedTuple):
    """The byte range of one request."""

    first_read: int  # The index of the first read that needs it
    start: int  # The offset of its first byte
    end: int  # The offset after its last byte
    last_read: int  # The index of the last read that needs it


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


def in_background(function: Callable[[], T]) -> Future[T]:
    """Call a function in a daemon thread.

    Python waits for the threads of `concurrent.futures` when it exits, which a server that stalls would delay.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="fetch", daemon=True).start()
    return future


class ReadAhead:
    """Keeps a window of chunks in memory that moves along with a reader.

    A chunk that is needed again after it has left the window is not fetched again: `find` returns None for it.

    Args:
        ranges: The ranges in the order of reading.
        fetch: Returns the bytes from offset `start` to `end` (exclusive); called in threads.
    """

    def __init__(self, ranges: Sequence[Range], fetch: Callable[[int, int], memoryview]) -> None:
        self._ranges, self._fetch = ranges, fetch
        self._next_read = 0
        self._queue = deque(plan_chunks(ranges))
        self._window: dict[Chunk, Future[memoryview]] = {}

    def find(self, offset: int) -> tuple[int, memoryview] | None:
        """Move the window to `offset`; return the start and the bytes of the chunk there, or None."""
        self._advance(offset)
        for chunk, future in self._window.items():
            if chunk.start <= offset < chunk.end:
                return chunk.start, future.result()
        return None

    def _advance(self, offset: int) -> None:
        remaining = range(self._next_read, len(self._ranges))
        self._next_read = next(
            (i for i in remaining if self._ranges[i][0] <= offset < self._ranges[i][1]), self._next_read
        )
        for chunk in [chunk for chunk in self._window if chunk.last_read < self._next_read]:
            del self._window[chunk]
        while self._queue and len(self._window) < MAX_CHUNKS:
            chunk = self._queue.popleft()
            if chunk.last_read >= self._next_read:
                self._window[chunk] = in_background(partial(self._fetch, chunk.start, chunk.end))

"""Reading ahead: byte ranges that are fetched before they are read, and held in memory until they have been."""

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

# Gaps up to this size are fetched too: a request takes as long as the bytes of many.
_GAP = 64 << 10
# Bytes of one request.
CHUNK = 8 << 20
# Chunks in memory: fetched, being fetched, or still needed.
WINDOW = 8


class Chunk(NamedTuple):
    """A range to request: `start` to `end` (exclusive), needed by the reads number `first` to `last`."""

    first: int
    start: int
    end: int
    last: int


def chunks(ranges: Sequence[Range], gap: int = _GAP, size: int = CHUNK) -> list[Chunk]:
    """Merge neighbouring ranges and cut them into requests, ordered by their first use.

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
    cut = [(low, min(low + size, end)) for start, end in merged for low in range(start, end, size)]
    ends = [end for _, end in cut]
    uses: list[list[int]] = [[] for _ in cut]
    for number, (start, end) in enumerate(ranges):
        for index in range(bisect.bisect_right(ends, start), len(cut)):
            if cut[index][0] >= end:
                break
            uses[index].append(number)
    return sorted(Chunk(min(used), *range_, max(used)) for range_, used in zip(cut, uses, strict=True) if used)


def in_background(function: Callable[[], T]) -> Future[T]:
    """Call a function in a daemon thread.

    The threads of `concurrent.futures` would delay the end of the process until a stalled server's timeout has passed.
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
    """A window of chunks that moves along with a reader.

    A chunk that is needed again after the window has been filled with others is not kept: `find` returns None for it.

    Args:
        ranges: The ranges in the order of reading.
        fetch: Returns the bytes `start` to `end` (exclusive); called in threads.
    """

    def __init__(self, ranges: Sequence[Range], fetch: Callable[[int, int], memoryview]) -> None:
        self._ranges, self._fetch = ranges, fetch
        self._position = 0
        self._queue = deque(chunks(ranges))
        self._window: dict[Chunk, Future[memoryview]] = {}

    def find(self, offset: int) -> tuple[int, memoryview] | None:
        """Move the window to `offset`; return start and bytes of the chunk there, None if it has no such chunk."""
        self._advance(offset)
        for chunk, future in self._window.items():
            if chunk.start <= offset < chunk.end:
                return chunk.start, future.result()
        return None

    def _advance(self, offset: int) -> None:
        ahead = range(self._position, len(self._ranges))
        self._position = next((i for i in ahead if self._ranges[i][0] <= offset < self._ranges[i][1]), self._position)
        for chunk in [chunk for chunk in self._window if chunk.last < self._position]:
            del self._window[chunk]
        while self._queue and len(self._window) < WINDOW:
            chunk = self._queue.popleft()
            if chunk.last >= self._position:
                self._window[chunk] = in_background(partial(self._fetch, chunk.start, chunk.end))

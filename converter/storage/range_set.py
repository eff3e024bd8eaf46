"""Sets of bytes of a file."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from converter.storage.local_file import Range


class RangeSet:
    """Bytes of a file as sorted, disjoint, half-open ranges."""

    def __init__(self) -> None:
        self._ranges: list[Range] = []

    def add(self, start: int, end: int) -> None:
        """Add the bytes `start` to `end` (exclusive)."""
        first = bisect.bisect_left(self._ranges, start, key=lambda r: r[1])
        last = bisect.bisect_right(self._ranges, end, key=lambda r: r[0])
        touched = self._ranges[first:last]
        if touched:
            start, end = min(start, touched[0][0]), max(end, touched[-1][1])
        self._ranges[first:last] = [(start, end)]

    def __iter__(self) -> Iterator[Range]:
        return iter(self._ranges)

    def missing(self, start: int, end: int) -> Iterator[Range]:
        """Yield the parts of `start` to `end` (exclusive) that are not in the set."""
        first = bisect.bisect_right(self._ranges, start, key=lambda r: r[1])
        for low, high in self._ranges[first:]:
            if low >= end:
                break
            if start < low:
                yield start, low
            start = max(start, high)
        if start < end:
            yield start, end

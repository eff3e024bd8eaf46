"""The requests that fetch byte ranges of a file."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

from converter.storage.local_file import Range

# Smaller gaps are read through: a request takes as long as the bytes of many.
_GAP = 64 << 10
# Bytes of one request.
_CHUNK = 16 << 20


class Chunk(NamedTuple):
    """A range to request; `first` and `last` are the places, in the order of reading, at which it is needed."""

    first: int
    start: int
    end: int
    last: int


def chunks(wanted: Sequence[Range], gap: int = _GAP, size: int = _CHUNK) -> list[Chunk]:
    """The requests for `wanted`, ranges in the order of reading, which may overlap: neighbours together, up to `size`.

    They come in the order in which they are first needed, so that who reads in that order waits least.
    """
    merged: list[Range] = []
    for start, end in sorted(wanted):
        if merged and start - merged[-1][1] <= gap:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    cut = [(low, min(low + size, end)) for start, end in merged for low in range(start, end, size)]
    ends = [end for _, end in cut]
    needed: list[list[int]] = [[] for _ in cut]
    for order, (start, end) in enumerate(wanted):
        for index in range(bisect.bisect_right(ends, start), len(cut)):
            if cut[index][0] >= end:
                break
            needed[index].append(order)
    return sorted(Chunk(min(at), *range_, max(at)) for range_, at in zip(cut, needed, strict=True) if at)

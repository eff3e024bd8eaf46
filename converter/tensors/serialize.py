"""Lazy tensors turned into the bytes of an output, streamed in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from converter.storage.atomic_output import write_all
from converter.storage.byte_range import Segment, merge
from converter.storage.stream import BackgroundWriter, Copier, OnBytes, OnData, Write
from converter.tensors.lazy_tensor import LazyTensor, byte_ranges

# Output tensors by name, in the order they are written.
Outputs = dict[str, LazyTensor]


def write_tensors(
    fd: int,
    header: bytes,
    values: Iterable[LazyTensor],
    count: OnBytes,
    seen: OnData | None,
    write: Write | None = None,
) -> None:
    """Write a header, which is not counted, and the bytes of tensors after it, with `write` if there is one."""
    write_all(fd, memoryview(header))
    with BackgroundWriter(fd, seen, write) as writer:
        copier = Copier(writer.exchange, count)
        copier.copy(segments_of(values))
        copier.flush()


def segments_of(values: Iterable[LazyTensor]) -> Iterator[Segment | memoryview]:
    """The bytes of tensors, in order: extents where copying is enough, neighbours merged; else computed one by one."""
    run: list[Segment] = []
    for value in values:
        found = byte_ranges(value)
        if found is not None:
            run += found
            continue
        yield from merge(run)
        run = []
        # Two seconds of import, for those conversions alone that need it.
        from converter.tensors.evaluate import tensor_bytes

        yield tensor_bytes(value)
    yield from merge(run)

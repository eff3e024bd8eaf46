"""Reads the tensors of two checkpoints in parallel, one thread each, and compares them byte by byte."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from itertools import accumulate
from queue import SimpleQueue
from threading import Thread

from converter.storage.stream import BUFFER, Copier
from converter.tensors.lazy_tensor import LazyTensor, nbytes
from converter.tensors.serialize import segments_of

# Tensors of A and B by their common name.
Pairs = Mapping[str, tuple[LazyTensor, LazyTensor]]


class _StoppedError(Exception):
    """The consumer has stopped."""


class Stream:
    """The bytes of tensors, one after another, read in a thread, which checks CRC-32s if the file has any.

    All buffers but the last have the same size, so two streams of the same length stay aligned. An error in the thread
    is raised in the consumer.
    """

    def __init__(self, values: Iterable[LazyTensor]) -> None:
        self._values = values
        self._full: SimpleQueue[memoryview | BaseException | None] = SimpleQueue()
        self._free: SimpleQueue[memoryview | None] = SimpleQueue()
        for _ in range(2):
            self._free.put(memoryview(bytearray(BUFFER)))
        self._thread = Thread(target=self._run, name="reader")

    def __enter__(self) -> Stream:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._free.put(None)
        self._thread.join()

    def __iter__(self) -> Iterator[memoryview]:
        """Yield the buffers; each is overwritten when the next one is requested."""
        while (full := self._full.get()) is not None:
            if isinstance(full, BaseException):
                raise full
            yield full
            self._free.put(memoryview(full.obj))

    def _run(self) -> None:
        try:
            copier = Copier(self._exchange, lambda count: None)
            copier.copy(segments_of(self._values))
            copier.flush()
            self._full.put(None)
        except BaseException as error:  # raised again by the consumer
            self._full.put(error)

    def _exchange(self, full: memoryview) -> memoryview:
        self._full.put(full)
        free = self._free.get()
        if free is None:
            raise _StoppedError
        return free


class ByteReader:
    """Reads a stream, of which nothing else has read, in pieces of any size."""

    def __init__(self, stream: Stream) -> None:
        self._buffers = iter(stream)
        self._rest = memoryview(b"")

    def take(self, count: int) -> bytearray:
        """Read the next `count` bytes."""
        taken = bytearray()
        while len(taken) < count:
            self._rest = self._rest or next(self._buffers)
            part = self._rest[: count - len(taken)]
            self._rest = self._rest[len(part) :]
            taken += part
        return taken


def differing(pairs: Pairs, count: Callable[[int], None]) -> set[str]:
    """Return the names of the pairs whose bytes differ.

    Args:
        pairs: The tensors by name; those of a pair have the same type and shape.
        count: Called with the number of bytes of A that were compared.
    """
    names, ends = list(pairs), list(accumulate(nbytes(a) for a, _ in pairs.values()))
    found: set[str] = set()
    offset = 0
    with Stream(a for a, _ in pairs.values()) as left, Stream(b for _, b in pairs.values()) as right:
        for a, b in zip(left, right, strict=True):
            # bytearrays are compared by memcmp, memoryviews by element. The last buffer may end in stale
            # bytes: they can only cause a needless look at the tensors, of which no stale byte is part.
            index = bisect_right(ends, offset)
            start = 0 if a.obj != b.obj else len(a)
            while start < len(a):
                end = min(ends[index] - offset, len(a))
                if bytes(a[start:end]) != bytes(b[start:end]):
                    found.add(names[index])
                start, index = end, index + 1
            offset += len(a)
            count(len(a))
    return found


def digests(values: Mapping[str, LazyTensor]) -> dict[bytes, list[str]]:
    """Return the names of the tensors with each digest of type, shape and bytes."""
    found: dict[bytes, list[str]] = {}
    for name, value in values.items():
        engine = blake2b(f"{value.dtype.name} {value.shape}".encode(), digest_size=32)
        with Stream([value]) as stream:
            for buffer in stream:
                engine.update(buffer)
        found.setdefault(engine.digest(), []).append(name)
    return found

"""Reads the tensors of two checkpoints in parallel, with a thread for each, and compares them byte by byte."""

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

# Pairs of a tensor of A and a tensor of B by their common name.
Pairs = Mapping[str, tuple[LazyTensor, LazyTensor]]


class _StoppedError(Exception):
    """Ends the thread of a stream whose consumer has stopped."""


class Stream:
    """Reads the bytes of tensors in a thread, one tensor after another, and yields them in buffers.

    The thread checks CRC-32s if the file has any; its errors are raised in the consumer. All buffers but the last have
    the same size, so that two streams of the same length yield buffers of equal lengths.
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
    """Reads a stream from its start, in parts of any size."""

    def __init__(self, stream: Stream) -> None:
        self._buffers = iter(stream)
        self._rest = memoryview(b"")

    def read(self, num_bytes: int) -> bytearray:
        """Read the next `num_bytes` bytes."""
        data = bytearray()
        while len(data) < num_bytes:
            self._rest = self._rest or next(self._buffers)
            part = self._rest[: num_bytes - len(data)]
            self._rest = self._rest[len(part) :]
            data += part
        return data


def differing(pairs: Pairs, on_bytes: Callable[[int], None]) -> set[str]:
    """Return the names of the pairs whose bytes differ.

    Args:
        pairs: The tensors by name; those of a pair have the same type and shape.
        on_bytes: Called with the number of bytes of A that were compared.
    """
    # `ends` are the positions in the streams at which the tensors end.
    names, ends = list(pairs), list(accumulate(nbytes(a) for a, _ in pairs.values()))
    different: set[str] = set()
    position = 0
    with Stream(a for a, _ in pairs.values()) as left, Stream(b for _, b in pairs.values()) as right:
        for a, b in zip(left, right, strict=True):
            # Whole buffers are compared first, as bytearrays: memcmp compares these, but memoryviews are compared by
            # element. The last buffers may end in stale bytes that differ; the comparison by tensor ignores them.
            if a.obj != b.obj:
                different |= _differing_in_buffers(a, b, position, names, ends)
            position += len(a)
            on_bytes(len(a))
    return different


def _differing_in_buffers(a: memoryview, b: memoryview, position: int, names: list[str], ends: list[int]) -> set[str]:
    """Return the names of the tensors whose bytes differ in two buffers at the same position of their streams."""
    different: set[str] = set()
    index, start = bisect_right(ends, position), 0
    while start < len(a):
        end = min(ends[index] - position, len(a))
        if bytes(a[start:end]) != bytes(b[start:end]):
            different.add(names[index])
        start, index = end, index + 1
    return different


def names_by_digest(values: Mapping[str, LazyTensor]) -> dict[bytes, list[str]]:
    """Return the names of the tensors with the same type, shape and bytes, by a digest of these."""
    names: dict[bytes, list[str]] = {}
    for name, value in values.items():
        digest = blake2b(f"{value.dtype.name} {value.shape}".encode(), digest_size=32)
        with Stream([value]) as stream:
            for buffer in stream:
                digest.update(buffer)
        names.setdefault(digest.digest(), []).append(name)
    return names

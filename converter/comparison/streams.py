"""Two checkpoints' tensors read side by side, each by a thread of its own, and compared byte by byte."""

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

# Buffers between a reading thread and who compares: enough that neither waits for the other's hiccups.
_IN_FLIGHT = 2

# The same tensor as A and as B have it.
Pairs = Mapping[str, tuple[LazyTensor, LazyTensor]]


class _StoppedError(Exception):
    """Nobody wants the rest."""


class Stream:
    """The bytes of tensors, end to end, read by a thread of its own and checked where a file has checksums.

    All buffers but the last one have the same size, whatever the tensors' sizes: two streams of equally many bytes go
    in step. An error of the thread is raised where its bytes would have come.
    """

    def __init__(self, values: Iterable[LazyTensor]) -> None:
        self._values = values
        self._full: SimpleQueue[memoryview | BaseException | None] = SimpleQueue()
        self._free: SimpleQueue[memoryview | None] = SimpleQueue()
        for _ in range(_IN_FLIGHT):
            self._free.put(memoryview(bytearray(BUFFER)))
        self._thread = Thread(target=self._run, name="reader")
        self._buffers = iter(self)
        self._rest = memoryview(b"")

    def __enter__(self) -> Stream:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._free.put(None)
        self._thread.join()

    def __iter__(self) -> Iterator[memoryview]:
        """The buffers; each is written over once the next one is asked for."""
        while (full := self._full.get()) is not None:
            if isinstance(full, BaseException):
                raise full
            yield full
            self._free.put(memoryview(full.obj))

    def take(self, count: int) -> bytearray:
        """The next `count` bytes, for readers of another step than the buffers'."""
        taken = bytearray()
        while len(taken) < count:
            self._rest = self._rest or next(self._buffers)
            part = self._rest[: count - len(taken)]
            self._rest = self._rest[len(part) :]
            taken += part
        return taken

    def _run(self) -> None:
        try:
            copier = Copier(self._exchange, lambda count: None)
            copier.copy(segments_of(self._values))
            copier.flush()
            self._full.put(None)
        except BaseException as error:  # told to the thread that waits for it
            self._full.put(error)

    def _exchange(self, full: memoryview) -> memoryview:
        self._full.put(full)
        free = self._free.get()
        if free is None:
            raise _StoppedError
        return free


def differing(pairs: Pairs, count: Callable[[int], None]) -> set[str]:
    """The names of the pairs that differ in a byte; `count` is told of A's bytes as they are compared.

    The two of a pair have one type and one shape, and so equally many bytes.
    """
    names, ends = list(pairs), list(accumulate(nbytes(a) for a, _ in pairs.values()))
    found: set[str] = set()
    at = 0
    with Stream(a for a, _ in pairs.values()) as left, Stream(b for _, b in pairs.values()) as right:
        for a, b in zip(left, right, strict=True):
            # Whole buffers by memcmp, which memoryviews have none of. The last one's tails may be of older bytes.
            if a.obj != b.obj:
                found.update(names[i] for i in _unequal(a, b, at, ends))
            at += len(a)
            count(len(a))
    return found


def _unequal(a: memoryview, b: memoryview, at: int, ends: list[int]) -> Iterator[int]:
    """Which of the tensors that end at `ends` differ in two buffers that begin at byte `at`."""
    start = 0
    index = bisect_right(ends, at)
    while start < len(a):
        end = min(ends[index] - at, len(a))
        if bytes(a[start:end]) != bytes(b[start:end]):
            yield index
        start, index = end, index + 1


def digests(values: Mapping[str, LazyTensor]) -> dict[bytes, list[str]]:
    """The names of tensors by a digest of type, shape and bytes."""
    found: dict[bytes, list[str]] = {}
    for name, value in values.items():
        engine = blake2b(f"{value.dtype.name} {value.shape}".encode(), digest_size=32)
        with Stream([value]) as stream:
            for buffer in stream:
                engine.update(buffer)
        found.setdefault(engine.digest(), []).append(name)
    return found

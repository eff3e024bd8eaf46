"""Writes the bytes of lazy tensors, which are copied from their files or computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from converter.storage.atomic_output import write_all
from converter.storage.byte_range import Segment, merge
from converter.storage.stream import BackgroundWriter, Copier, OnBytes, OnData, Write, read_checked
from converter.tensors.lazy_tensor import Cast, LazyTensor, View, byte_ranges

# Output tensors by name, in the order of the file.
Outputs = dict[str, LazyTensor]


def write_tensors(
    fd: int,
    header: bytes,
    values: Iterable[LazyTensor],
    on_bytes: OnBytes,
    on_data: OnData | None,
    write: Write | None = None,
) -> None:
    """Write a header and the bytes of tensors.

    Args:
        fd: The output file.
        header: The bytes before the tensors.
        values: The tensors in the order of the file.
        on_bytes: Called with the number of tensor bytes copied.
        on_data: Called with each chunk of tensor bytes, or None.
        write: Appends a buffer to a file, such as by seeking over zeros; `write_all` by default.
    """
    write_all(fd, memoryview(header))
    with BackgroundWriter(fd, on_data, write) as writer:
        copier = Copier(writer.exchange, on_bytes)
        copier.copy(segments_of(values))
        copier.flush()


def segments_of(values: Iterable[LazyTensor]) -> Iterator[Segment | memoryview]:
    """Yield the data of tensors in order: merged byte ranges of files, or the bytes of one computed tensor."""
    pending: list[Segment] = []
    for value in values:
        ranges = byte_ranges(value)
        if ranges is not None:
            pending += ranges
            continue
        yield from merge(pending)
        pending = []
        yield _computed(value)
    yield from merge(pending)


def _computed(value: LazyTensor) -> memoryview:
    """Compute the bytes of a tensor, without the slow import of torch for a cast of bfloat16 to float32."""
    if isinstance(value, View):
        return _computed(value.base)
    if isinstance(value, Cast) and (value.base.dtype.name, value.dtype.name) == ("bfloat16", "float32"):
        ranges = byte_ranges(value.base)
        if ranges is not None:
            return _bfloat16_to_float32(read_checked(merge(ranges)))
    from converter.tensors.evaluate import tensor_bytes

    return tensor_bytes(value)


def _bfloat16_to_float32(data: bytes) -> memoryview:
    """Cast little-endian elements: a float32 is two bytes of zero, then the two bytes of the bfloat16."""
    result = bytearray(2 * len(data))
    result[2::4], result[3::4] = data[0::2], data[1::2]
    return memoryview(result)

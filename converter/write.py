"""A plan written as a safetensors file: header first, then the tensors' bytes, streamed through one buffer."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator

from converter.copier import BackgroundWriter, Copier, Count, Seen, Write
from converter.mapping.expr import Expr, Piece, extents, merge, nbytes
from converter.stage import write_all

# Output tensors by name, in the order they are written.
Outputs = dict[str, Expr]


def write_safetensors(
    fd: int, outputs: Outputs, metadata: dict[str, str], count: Count, seen: Seen | None = None
) -> None:
    """Write a safetensors file: length of the header, header, then the tensors in the header's order.

    The format is documented at https://github.com/huggingface/safetensors#format. ContainerError where a source is
    damaged, OSError where the system refuses to write.
    """
    write_tensors(fd, safetensors_header(outputs, metadata), outputs.values(), count, seen)


def write_tensors(
    fd: int, header: bytes, values: Iterable[Expr], count: Count, seen: Seen | None, write: Write | None = None
) -> None:
    """Write a header, which is not counted, and the bytes of tensors after it, with `write` if there is one."""
    write_all(fd, memoryview(header))
    with BackgroundWriter(fd, seen, write) as writer:
        copier = Copier(writer.exchange, count)
        copier.copy(pieces_of(values))
        copier.flush()


def safetensors_header(outputs: Outputs, metadata: dict[str, str]) -> bytes:
    """The header of these tensors, with its length before it."""
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, value in outputs.items():
        end = offset + nbytes(value)
        header[name] = {"dtype": value.dtype.code, "shape": list(value.shape), "data_offsets": [offset, end]}
        offset = end
    return with_length(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())


def with_length(header: bytes) -> bytes:
    """The JSON of a header after its length, padded so that the data begins at a multiple of eight."""
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header


def pieces_of(values: Iterable[Expr]) -> Iterator[Piece | memoryview]:
    """The bytes of tensors, in order: extents where copying is enough, neighbours merged; else computed one by one."""
    run: list[Piece] = []
    for value in values:
        found = extents(value)
        if found is not None:
            run += found
            continue
        yield from merge(run)
        run = []
        # Two seconds of import, for those conversions alone that need it.
        from converter.compute import materialise

        yield materialise(value)
    yield from merge(run)

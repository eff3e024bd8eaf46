"""A plan written as a safetensors file: header first, then the tensors' bytes, streamed through one buffer."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator

from converter.copier import BackgroundWriter, Copier, Progress, Seen
from converter.mapping.expr import Expr, Piece, extents, merge, nbytes
from converter.stage import write_all

# Output tensors by name, in the order they are written.
Outputs = dict[str, Expr]


def write_safetensors(
    fd: int, outputs: Outputs, metadata: dict[str, str], progress: Progress, seen: Seen | None = None
) -> None:
    """Write a safetensors file: length of the header, header, then the tensors in the header's order."""
    # Apart from the tensors, whose bytes alone `progress` counts.
    write_all(fd, memoryview(safetensors_header(outputs, metadata)))
    with BackgroundWriter(fd, seen) as writer:
        copier = Copier(writer.exchange, progress)
        copier.copy(pieces_of(outputs.values()))
        copier.flush()


def safetensors_header(outputs: Outputs, metadata: dict[str, str]) -> bytes:
    """The header with its length before it, padded so that the data begins at a multiple of eight."""
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, value in outputs.items():
        end = offset + nbytes(value)
        header[name] = {"dtype": value.dtype.code, "shape": list(value.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


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

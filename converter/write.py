"""A plan written as a file: header first, then the tensors' bytes, streamed through one buffer."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterable, Iterator

from converter.copier import Copier, Progress
from converter.mapping.expr import Expr, Piece, extents, merge
from converter.stage import write_all
from converter.state_dict_pickle import state_dict_pickle

# Output tensors by name, in the order they are written.
Outputs = dict[str, Expr]


def write_safetensors(fd: int, outputs: Outputs, metadata: dict[str, str], progress: Progress) -> None:
    """Write a safetensors file: length of the header, header, then the tensors in the header's order."""
    copier = Copier(lambda data: write_all(fd, data), progress)
    copier.copy([safetensors_header(outputs, metadata)])
    for run in _runs(outputs.values()):
        copier.copy(run)
    copier.flush()


def safetensors_header(outputs: Outputs, metadata: dict[str, str]) -> bytes:
    """The header with its length before it, padded so that the data begins at a multiple of eight."""
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, value in outputs.items():
        end = offset + value.nbytes
        header[name] = {"dtype": value.dtype.code, "shape": list(value.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_pth(fd: int, outputs: Outputs, progress: Progress) -> None:
    """Write what torch.save would make of an ordered dict of tensors: a zip of a pickle and stored members."""
    with open(fd, "wb", buffering=0, closefd=False) as file, zipfile.ZipFile(file, "w") as archive:
        _add(archive, "data.pkl", [state_dict_pickle(outputs)])
        _add(archive, "byteorder", [b"little"])
        for index, value in enumerate(outputs.values()):
            _add(archive, f"data/{index}", pieces_of(value), value.nbytes, progress)
        _add(archive, "version", [b"3\n"])


def _add(
    archive: zipfile.ZipFile,
    name: str,
    pieces: Iterable[Piece | memoryview],
    size: int = 0,
    progress: Progress = lambda _: None,
) -> None:
    # The date that zip gives to files without one: repeated runs give identical files.
    info = zipfile.ZipInfo(f"archive/{name}")
    # Data begins at multiples of 64 bytes, so that torch.load can map it; torch pads in the same way.
    assert archive.fp is not None
    large = size >= zipfile.ZIP64_LIMIT
    begin = archive.fp.tell() + zipfile.sizeFileHeader + len(info.filename) + 4 + (20 if large else 0)
    padding = -begin % 64
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=large) as member:
        copier = Copier(member.write, progress)
        copier.copy(pieces)
        copier.flush()


def pieces_of(value: Expr) -> Iterator[Piece | memoryview]:
    """The bytes of one output tensor: extents where copying is enough, else computed."""
    found = extents(value)
    if found is not None:
        yield from merge(found)
        return
    # Two seconds of import, for those conversions alone that need it.
    from converter.compute import materialise

    yield materialise(value)


def _runs(values: Iterable[Expr]) -> Iterator[Iterable[Piece | memoryview]]:
    """The pieces of all tensors, extents that follow on each other merged across tensors too."""
    run: list[Piece] = []
    for value in values:
        found = extents(value)
        if found is not None:
            run += found
            continue
        yield merge(run)
        run = []
        yield pieces_of(value)
    yield merge(run)

"""What every command that writes tensors does: read the sources ahead, write the output, check the sources."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from converter.copier import Seen
from converter.errors import OutputError
from converter.mapping.expr import Expr, sources
from converter.source import Progress, Source
from converter.write import Outputs, write_safetensors

FORMATS = ("safetensors", "pth")


def check_not_source(target: Path, opened: Sequence[Source]) -> None:
    """OutputError if what is to be written is one of the sources, or the folder of one."""
    try:
        stat = target.stat()
    except OSError:
        # There is no such file yet, or it cannot be looked at: either way it is not one that was opened.
        return
    local = [file for source in opened for file in source.files if file.identity]
    for file in local:
        if Path(file.name).resolve().parent == target.resolve():
            raise OutputError(f"{target}: holds the source, {file.name}\nchoose another path with --output")
    if (stat.st_dev, stat.st_ino) in [file.identity for file in local]:
        raise OutputError(f"{target}: is the source itself\nchoose another path with --output")


def read_ahead(
    opened: Sequence[Source], values: Iterable[Expr], total: int, progress: Progress
) -> Callable[[int], None]:
    """Have what is on hubs fetched in the order of `values`; what is to be told of bytes that were written."""
    tensors = [tensor for value in values for tensor in sources(value)]
    for source in opened:
        source.prefetch(tensors, progress)
    # What is fetched takes longer than what is written, and is told of instead.
    return (lambda nbytes: None) if any(source.remote for source in opened) else _counter(progress, total)


def _counter(progress: Progress, total: int) -> Callable[[int], None]:
    """A sum of the bytes it is told, passed on to `progress`."""
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress("converting", done, total)

    return count


def write_tensors(
    fd: int,
    outputs: Outputs,
    format: str,
    metadata: dict[str, str],
    count: Callable[[int], None],
    seen: Seen | None = None,
) -> None:
    """The tensors as a file of the format; `metadata` has a place in safetensors alone."""
    if format == "pth":
        # Imported here: the zip module is for those alone who ask for it.
        from converter.pth import write_pth

        write_pth(fd, outputs, count, seen)
    else:
        write_safetensors(fd, outputs, metadata, count, seen)


def check_unchanged(opened: Sequence[Source]) -> None:
    """Before the output takes its place: a source that changed midway may have given halves of two files."""
    for file in (file for source in opened for file in source.files):
        file.check_unchanged()


def fetched(opened: Sequence[Source]) -> dict[str, int]:
    """Bytes that came over the network, by remote file."""
    return {file.name: file.fetched for source in opened for file in source.remote}

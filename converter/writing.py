"""What every command that writes tensors does: read the sources ahead, write the output, check the sources."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from converter.copier import Seen
from converter.errors import OutputError
from converter.locate import WEIGHTS
from converter.mapping.expr import Expr, sources
from converter.planning import check_choices
from converter.source import Progress, Source
from converter.stage import check_name, writing
from converter.write import Outputs, write_safetensors

FORMATS = ("safetensors", "pth")


def format_for(out: str | Path | None, format: str | None) -> str:
    """The format to write: the one asked for or, without, the one that the output's ending stands for."""
    if format is not None:
        check_choices(format=(format, FORMATS))
        return format
    ending = Path(out).suffix if out is not None else ""
    return "pth" if ending in WEIGHTS and ending != ".safetensors" else "safetensors"


def check_not_source(target: Path, opened: Sequence[Source], mapping: str | Path | None = None) -> None:
    """OutputError if what is to be written is one of the sources, the folder of one, or the mapping file."""
    check_name(target)
    with writing(target):
        for file in (file for source in opened for file in source.files if file.identity and target.is_dir()):
            # A link lies in one folder and leads to another.
            if any(path.parent.samefile(target) for path in (Path(file.path), Path(file.path).resolve())):
                raise OutputError(f"{target}: holds the source, {file.name}\nchoose another path with --output")
    if is_source(target, opened, mapping):
        raise OutputError(f"{target}: is the source itself\nchoose another path with --output")


def is_source(path: Path, opened: Sequence[Source], *others: str | Path | None) -> bool:
    """Whether a path leads to a file of the sources, to an index of theirs, or to one of the other files."""
    # An index is a source's name; one on a hub has a name that is no path.
    names = [*(source.name for source in opened), *(other for other in others if other is not None)]
    with writing(path):
        try:
            stat = path.stat()
        except (FileNotFoundError, NotADirectoryError, ValueError):
            # There is no such file yet.
            return False
        if (stat.st_dev, stat.st_ino) in [file.identity for source in opened for file in source.files]:
            return True
        return any(os.path.exists(name) and os.path.samefile(name, path) for name in names)  # noqa: PTH110, PTH121


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

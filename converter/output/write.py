"""How every command writes tensors: whole, with the card's files or not at all, and nothing over what it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from converter.checkpoint.locate import WEIGHT_SUFFIXES
from converter.checkpoint.open import Checkpoint, check_unchanged
from converter.errors import OutputError
from converter.formats.safetensors import write_safetensors
from converter.options import check_choices
from converter.output.pretrained import pretrained_file
from converter.output.record import ConversionRecord
from converter.output.record_files import RecordFiles
from converter.output.target import check_folder, check_not_source, check_target
from converter.storage.atomic_output import remove_stale, staging
from converter.storage.progress import OnProgress, progress_counter
from converter.storage.stream import OnBytes, OnData
from converter.tensors.lazy_tensor import LazyTensor, source_tensors
from converter.tensors.serialize import Outputs

FORMATS = ("safetensors", "pth")


class Output(NamedTuple):
    """What is to be written: `tensors` by name, in their order, which take `room` bytes, and `fill`, which writes them.

    `fill` is given the descriptor of a new file, or the path of a new folder if this is one, whom to tell of bytes and
    whom to show them to. `metadata` is what the output says of its making, if it says anything. It may not take the
    place of `mapping`, a file that was read, nor lie in the folder `apart`.
    """

    tensors: Outputs
    room: int
    fill: Callable[[int | Path, OnBytes, OnData | None], None]
    folder: bool = False
    metadata: dict[str, str] | None = None
    mapping: str | Path | None = None
    apart: Path | None = None


def format_for(out: str | Path | None, format: str | None) -> str:
    """The format to write: what was asked for or, without, what the output's ending says; UsageError if unknown."""
    if format is not None:
        check_choices(format=(format, FORMATS))
        return format
    ending = Path(out).suffix if out is not None else ""
    return "pth" if ending in WEIGHT_SUFFIXES and ending != ".safetensors" else "safetensors"


def make_output(
    tensors: Outputs,
    card: ConversionRecord,
    metadata: dict[str, str],
    documents: Mapping[str, bytes] | None = None,
    mapping: str | Path | None = None,
) -> Output:
    """A file of the tensors in the card's format, in a folder beside `documents` if there are any.

    `metadata` has a place in safetensors alone.
    """

    def fill(place: int | Path, count: OnBytes, seen: OnData | None) -> None:
        with nullcontext(place) if isinstance(place, int) else pretrained_file(place, documents or {}) as fd:
            if card.format == "pth":
                # Imported here: the zip module is for those alone who ask for it.
                from converter.formats.torch_zip import write_pth

                write_pth(fd, tensors, count, seen)
            else:
                write_safetensors(fd, tensors, metadata, count, seen)

    told = metadata if card.format == "safetensors" else None
    return Output(tensors, card.nbytes, fill, documents is not None, told, mapping)


def write(
    output: Output,
    card: ConversionRecord,
    opened: Sequence[Checkpoint],
    files: RecordFiles,
    force: bool,
    on_progress: OnProgress,
) -> ConversionRecord:
    """Write an output to the card's place, with the card's files, or nothing of it; the card of what was written.

    OutputError where it cannot be written there, or may not replace what stands there; ContainerError for a source that
    is damaged, or changed meanwhile.
    """
    target = Path(card.output)
    _check(output, target, opened, files, force)
    with staging(force) as new:
        place = new.folder(target) if output.folder else new.file(target)
        seen = files.stage(new, output.tensors)
        output.fill(place, _read_ahead(opened, output.tensors.values(), card.nbytes, on_progress), seen)
        files.write(card, output.tensors, opened, seen, output.metadata, on_progress)
        check_unchanged(opened)
    return card._replace(written=True, fetched={file.name: file.fetched for source in opened for file in source.remote})


def _check(output: Output, target: Path, opened: Sequence[Checkpoint], files: RecordFiles, force: bool) -> None:
    """OutputError where the output or the card's files cannot be written; clears what dead runs left there."""
    check_not_source(target, opened, output.mapping)
    remove_stale(target, files.all)
    if output.apart is not None and target.resolve().is_relative_to(output.apart.resolve()):
        raise OutputError(f"{target}: lies in the checkpoint's own folder", "choose another path with --output")
    (check_folder if output.folder else check_target)(target, force, output.room)
    files.check(target, opened, force, output.mapping)


def _read_ahead(
    opened: Sequence[Checkpoint], values: Iterable[LazyTensor], total: int, on_progress: OnProgress
) -> OnBytes:
    """Have what is on hubs fetched in the order of `values`; what is to be told of bytes that were written."""
    tensors = [tensor for value in values for tensor in source_tensors(value)]
    for source in opened:
        source.prefetch(tensors, on_progress)
    # What is fetched takes longer than what is written, and is told of instead.
    return (
        (lambda nbytes: None)
        if any(source.remote for source in opened)
        else progress_counter(on_progress, "converting", total)
    )

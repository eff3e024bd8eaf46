"""Writes the outputs of all commands with their records. Both are complete or absent, and never replace an input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from converter.checkpoint.folder import WEIGHT_SUFFIXES, has_weight_suffix
from converter.checkpoint.open import Checkpoint, check_unchanged
from converter.errors import OutputError, UsageError
from converter.formats.safetensors import write_safetensors
from converter.formats.torch_zip import write_pth
from converter.options import check_choices
from converter.output.pretrained import open_pretrained_folder
from converter.output.record import ConversionRecord
from converter.output.record_files import RecordFiles, TensorDigests
from converter.output.target import check_not_source, check_target
from converter.storage.atomic_output import AtomicOutput, output_errors, remove_stale, write_all
from converter.storage.progress import OnProgress, progress_counter
from converter.storage.stream import OnBytes, OnData
from converter.tensors.lazy_tensor import LazyTensor, Read, all_source_tensors, count_overflows
from converter.tensors.serialize import Outputs

if TYPE_CHECKING:
    from converter.formats.gguf import Value

# The formats that can be written, and the names of their containers when they are read.
_CONTAINERS = {"safetensors": "safetensors", "pth": "torch zip", "gguf": "GGUF"}
FORMATS = tuple(_CONTAINERS)


class Output(NamedTuple):
    """A file or a folder to write."""

    tensors: Outputs  # The tensors by name, in the order in which they are written
    nbytes: int  # The size of the output in bytes
    # Writes the output to a file descriptor or the path of a new folder. The callbacks are called with the number of
    # bytes copied, and with the tensors' data.
    write_to: Callable[[int | Path, OnBytes, OnData | None], None]
    is_folder: bool = False  # Whether the output is a folder
    metadata: dict[str, str] | None = None  # The metadata in the output's header; None if the format has none
    mapping: str | Path | None = None  # The mapping file, which the output must not replace
    source_folder: Path | None = None  # A folder that must not contain the output


def format_for(out: str | Path | None, format: str | None) -> str:
    """Return the format to write: `format`, or the one that the suffix of `out` implies if `format` is None.

    Raises:
        UsageError: `format` is unknown, or the suffix implies none.
    """
    if format is not None:
        check_choices(format=(format, FORMATS))
        return format
    name = Path(out or "").name.lower()
    if has_weight_suffix(name):
        return next((format for format in FORMATS if name.endswith(f".{format}")), "pth")
    if suffix := Path(name).suffix:
        raise UsageError(
            f"--output {out}: the suffix {suffix} implies no format",
            f"end the name in {', '.join(WEIGHT_SUFFIXES)}, or choose with --format {' or '.join(FORMATS)}",
        )
    return "safetensors"


def is_unchanged(source: Checkpoint, outputs: Outputs, format: str) -> bool:
    """Return whether an output would have the same tensors under the same names as its source, in the same format.

    Args:
        source: The checkpoint.
        outputs: The tensors to write.
        format: One of FORMATS.
    """
    return (
        source.containers == (_CONTAINERS[format],)
        and source.contents.keys() == outputs.keys()
        and all(isinstance(value, Read) and value.tensor is source.contents[key] for key, value in outputs.items())
    )


def make_output(
    tensors: Outputs,
    record: ConversionRecord,
    metadata: dict[str, str],
    documents: Mapping[str, bytes] | None = None,
    mapping: str | Path | None = None,
    keys: Mapping[str, Value] | None = None,
) -> Output:
    """Return an output in the format that the record names.

    Args:
        tensors: The tensors by name.
        record: The conversion.
        metadata: Metadata for the header of a safetensors file.
        documents: Other files of a from_pretrained folder; None for a single file.
        mapping: The mapping file, which the output must not replace.
        keys: Keys and values for the header of a GGUF file.
    """

    def write_to(target: int | Path, on_bytes: OnBytes, on_data: OnData | None) -> None:
        with nullcontext(target) if isinstance(target, int) else open_pretrained_folder(target, documents or {}) as fd:
            if record.format == "pth":
                write_pth(fd, tensors, on_bytes, on_data)
            elif record.format == "gguf":
                # Imported here, as few outputs need it.
                from converter.formats.gguf import write_gguf

                write_gguf(fd, tensors, keys or {}, on_bytes, on_data)
            else:
                write_safetensors(fd, tensors, metadata, on_bytes, on_data)

    header = metadata if record.format == "safetensors" else None
    return Output(tensors, record.nbytes, write_to, documents is not None, header, mapping)


def write(
    output: Output,
    record: ConversionRecord,
    opened: Sequence[Checkpoint],
    files: RecordFiles,
    force: bool,
    on_progress: OnProgress,
) -> ConversionRecord:
    """Write an output to `record.output`, then the files of its record.

    Args:
        output: The output.
        record: The planned conversion.
        opened: The sources.
        files: The files of the record.
        force: Whether existing files are replaced.
        on_progress: Called as bytes are written or, for sources on a hub, fetched.

    Returns:
        The record of the finished conversion.

    Raises:
        OutputError: The output cannot be written, or exists and `force` is not set.
        ContainerError: A source is damaged, or was modified meanwhile.
    """
    target = Path(record.output)
    _check_paths(output, target, opened, files, force)
    with AtomicOutput(force) as atomic:
        temporary = atomic.folder(target) if output.is_folder else atomic.file(target)
        fds = {path: atomic.file(path) for path in files.paths}
        digests = TensorDigests(output.tensors) if fds else None
        output.write_to(temporary, _start_reading(opened, output.tensors.values(), record.nbytes, on_progress), digests)
        record = replace(record, overflows=count_overflows(output.tensors))
        if digests is not None:
            for path, data in files.contents(record, output.tensors, opened, digests, output.metadata, on_progress):
                with output_errors(path):
                    write_all(fds[path], memoryview(data))
        check_unchanged(opened)
    fetched = {file.name: file.fetched_bytes for source in opened for file in source.remote}
    return replace(record, written=True, fetched=fetched)


def _check_paths(output: Output, target: Path, opened: Sequence[Checkpoint], files: RecordFiles, force: bool) -> None:
    """Raise OutputError if the output or its record cannot be written; remove temporary files of killed runs."""
    check_not_source(target, opened, output.mapping)
    files.check_names(target, opened, output.mapping)
    for path in (target, *files.paths):
        remove_stale(path)
    if output.source_folder is not None and target.resolve().is_relative_to(output.source_folder.resolve()):
        raise OutputError(f"{target}: is inside the checkpoint's own folder", "choose another path with --output")
    check_target(target, force, output.nbytes, is_folder=output.is_folder)
    for path in files.paths:
        check_target(path, force, 0, "record")


def _start_reading(
    opened: Sequence[Checkpoint], values: Iterable[LazyTensor], nbytes: int, on_progress: OnProgress
) -> OnBytes:
    """Start to fetch remote tensors in the order of `values`; return the callback for the number of bytes copied."""
    tensors = all_source_tensors(values)
    for source in opened:
        source.prefetch(tensors, on_progress)
    if any(source.remote for source in opened):
        # Fetching reports its own progress, and takes longer than writing.
        return lambda count: None
    return progress_counter(on_progress, "converting", nbytes)

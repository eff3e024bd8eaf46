"""Inserts an encoder into a copy of a checkpoint, whose other tensors and files are copied byte for byte."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from converter.assembly.host import Host, Placement, is_same, make_placement
from converter.assembly.parts import EncoderParts
from converter.checkpoint.folder import has_weight_suffix, is_index
from converter.checkpoint.open import Checkpoint
from converter.errors import ContainerError, UsageError, printable
from converter.formats.safetensors import add_header_length
from converter.output.write import Output
from converter.plan.plan import make_plan
from converter.storage.atomic_output import new_file, write_all
from converter.storage.local_file import SourceFile
from converter.storage.stream import BUFFER, OnBytes, OnData
from converter.tensors.lazy_tensor import LazyTensor, cast, lazy_read, nbytes
from converter.tensors.serialize import write_tensors
from converter.tensors.tensor_info import TensorInfo

_ZEROS = bytes(BUFFER)


class Insertion(NamedTuple):
    """A planned copy of a checkpoint with another encoder."""

    host: Host  # The checkpoint that is copied
    placement: Placement  # Which tensors the encoder replaces
    replaced: dict[str, LazyTensor]  # The new tensors by the host's names, cast to the types of the output
    other_files: list[Path]  # The files that are copied besides the shards, as paths relative to the folder
    notes: list[str]  # Messages for the user

    @property
    def tensors(self) -> dict[str, LazyTensor]:
        """All tensors of the new checkpoint, in the order in which they are written."""
        return {key: value for file in self.host.checkpoint.files for key, value in self.tensors_in(file).items()}

    def tensors_in(self, file: SourceFile) -> dict[str, LazyTensor]:
        """Return the tensors of one file in the order of their offsets, which its header need not have."""
        tensors = [
            value
            for value in self.host.checkpoint.contents.values()
            if isinstance(value, TensorInfo) and value.storage.file is file
        ]
        tensors.sort(key=lambda tensor: (tensor.storage.offset, tensor.storage.length))
        return {tensor.key: self.replaced.get(tensor.key) or lazy_read(tensor) for tensor in tensors}

    def canonical_tensors(self, family: str) -> dict[str, LazyTensor]:
        """Return the tensors of a family's encoder in the new checkpoint by canonical names."""
        detected, plan = self.host.resolve(family)
        new = {name: self.replaced.get(tensor.key) or lazy_read(tensor) for name, tensor in detected.tensors.items()}
        is_gguf, prefix = self.host.format == "gguf", detected.match.prefix
        return make_plan(plan.mapping, prefix, plan.target, new, self.host.name, from_ggml=is_gguf).outputs


def plan_insertion(host: Host, parts: EncoderParts, dtype: str) -> Insertion:
    """Plan a copy of a checkpoint with another encoder in place of its own.

    Args:
        host: The checkpoint.
        parts: The encoder.
        dtype: The type of the new tensors; "keep" for the types of the tensors that they replace.

    Raises:
        LayoutError: The checkpoint has several encoders of a family.
        UsageError: Layers, shapes or types differ, or `dtype` is for an mmproj, whose types are fixed.
    """
    if host.format == "gguf" and dtype != "keep":
        raise UsageError(
            f"--dtype: {host.name} keeps its types, which llama.cpp needs",
            f"leave it out, and change the types of the result: encoder RESULT --with-projector --dtype {dtype}",
        )
    placement = make_placement(host, parts)
    replaced = dict(placement.new_tensors)
    for key, value in placement.new_tensors.items():
        if value.dtype.is_float:
            replaced[key] = cast(value, placement.old_tensors[key].dtype.name if dtype == "keep" else dtype)
    other_files, notes = _other_files(host.folder, host.checkpoint) if host.folder else ([], [])
    num_tensors = sum(isinstance(value, TensorInfo) for value in host.checkpoint.contents.values())
    files = f" and {len(other_files)} other files" if host.folder else ""
    counts = f"replaced {len(replaced)} tensors; kept {num_tensors - len(replaced)}{files} as they were"
    if all(is_same(value, placement.old_tensors[key]) for key, value in replaced.items()):
        notes.append("the encoder is the checkpoint's own: nothing changes")
    return Insertion(host, placement, replaced, other_files, [counts, *placement.notes, *notes])


def _other_files(folder: Path, host: Checkpoint) -> tuple[list[Path], list[str]]:
    """Return the files of a checkpoint's folder to copy besides its shards, and notes on those that are left out."""
    shards = {Path(file.path).name for file in host.files}
    copied, notes = [], []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        # Hidden folders are those of git and of the hubs' libraries.
        if path.is_dir() or str(relative) in shards or any(part.startswith(".") for part in relative.parts[:-1]):
            continue
        if not path.is_file() or not _is_within(folder, path):
            notes.append(f"left out {relative}: it is not a file in this folder")
        elif (has_weight_suffix(path.name) or is_index(path.name)) and str(path) != host.name:
            notes.append(f"left out {relative}: other weights, which may hold the old encoder")
        else:
            copied.append(relative)
    return copied, notes


def _is_within(folder: Path, path: Path) -> bool:
    """Return whether a file is in a folder, or is a link to the `blobs` of Hugging Face's cache."""
    cache = folder.absolute().parent
    blobs = [cache.with_name("blobs").resolve()] if cache.name == "snapshots" else []
    return any(path.resolve().is_relative_to(root) for root in (folder.resolve(), *blobs))


def insertion_output(insertion: Insertion) -> Output:
    """Return the output for an insertion: a folder or a single file."""
    # The disk blocks, as holes in sparse files are kept.
    stats = [Path(file.path).stat() for file in insertion.host.checkpoint.files]
    required_nbytes = sum(512 * getattr(stat, "st_blocks", stat.st_size // 512 + 1) for stat in stats)
    required_nbytes += sum(map(nbytes, insertion.replaced.values()))
    folder = insertion.host.folder
    write = partial(_write, insertion)
    return Output(insertion.tensors, required_nbytes, write, folder is not None, source_folder=folder)


def _write(insertion: Insertion, target: int | Path, on_bytes: OnBytes, on_data: OnData | None) -> None:
    if isinstance(target, int):
        _write_shard(insertion, insertion.host.checkpoint.files[0], target, on_bytes, on_data)
        return
    for file in insertion.host.checkpoint.files:
        with new_file(target / Path(file.path).name) as fd:
            _write_shard(insertion, file, fd, on_bytes, on_data)
    for path in insertion.other_files:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        with new_file(target / path) as fd:
            _write_other_file(insertion, path, fd)


def _write_other_file(insertion: Insertion, relative: Path, fd: int) -> None:
    assert insertion.host.folder is not None
    path = insertion.host.folder / relative
    try:
        source = path.open("rb")
    except OSError as error:
        # An OSError from the rest of this function would be one of the output.
        raise ContainerError(f"{path}: cannot be read: {error.strerror}") from error
    with source, open(fd, "wb", closefd=False) as target:
        if printable(str(path)) == insertion.host.name:
            target.write(_updated_index(source.read(), sum(map(nbytes, insertion.tensors.values()))))
        else:
            shutil.copyfileobj(source, target, BUFFER)


def _updated_index(text: bytes, total_size: int) -> bytes:
    """Return an index with another `total_size`; unchanged if it has this one or none."""
    index = json.loads(text)
    metadata = index.get("metadata")
    if not isinstance(metadata, dict) or metadata.get("total_size", total_size) == total_size:
        return text
    metadata["total_size"] = total_size
    # In ASCII: names may contain lone surrogates, which UTF-8 cannot encode.
    return json.dumps(index, indent=2).encode() + b"\n"


def _write_shard(insertion: Insertion, file: SourceFile, fd: int, on_bytes: OnBytes, on_data: OnData | None) -> None:
    values = insertion.tensors_in(file)
    if insertion.host.format == "gguf":
        from converter.formats.gguf import stored_keys, write_gguf

        write_gguf(fd, values, stored_keys(file), on_bytes, on_data)
        return
    write_tensors(fd, _shard_header(file, values), values.values(), on_bytes, on_data, _write_or_skip)
    # The file may end with a hole, which was only sought over.
    os.ftruncate(fd, os.lseek(fd, 0, os.SEEK_CUR))


def _write_or_skip(fd: int, full: memoryview) -> None:
    """Write a buffer, or seek over a full buffer of zeros, which leaves a hole in the file."""
    if len(full) == BUFFER and full.obj == _ZEROS:
        os.lseek(fd, BUFFER, os.SEEK_CUR)
    else:
        write_all(fd, full)


def _shard_header(file: SourceFile, values: Mapping[str, LazyTensor]) -> bytes:
    """Return the header of a shard with its length; unchanged unless the type of a tensor has changed."""
    old_bytes = file.read(0, 8 + int.from_bytes(file.read(0, 8), "little"))
    header: dict[str, Any] = json.loads(old_bytes[8:])
    old_header, end = dict(header), 0
    for key, value in values.items():
        begin, end = end, end + nbytes(value)
        header[key] = {"dtype": value.dtype.code, "shape": list(value.shape), "data_offsets": [begin, end]}
    if header == old_header:
        return old_bytes
    return add_header_length(json.dumps(header, separators=(",", ":")).encode())

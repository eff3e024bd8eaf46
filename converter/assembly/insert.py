"""Inserts an encoder into a copy of a DeepSeek-OCR checkpoint; everything else is copied byte for byte."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from converter.checkpoint.folder import has_weight_suffix, is_index
from converter.checkpoint.open import Checkpoint
from converter.errors import ContainerError, LayoutError, UsageError, printable
from converter.formats.safetensors import add_header_length
from converter.layouts import registry
from converter.layouts.claims import summary
from converter.options import ConvertOptions
from converter.output.write import Output
from converter.plan.planner import resolve_to_canonical
from converter.storage.atomic_output import new_file, write_all
from converter.storage.local_file import SourceFile, exists
from converter.storage.stream import BUFFER, OnBytes, OnData
from converter.tensors.lazy_tensor import LazyTensor, Read, cast, lazy_read, nbytes
from converter.tensors.serialize import write_tensors
from converter.tensors.tensor_info import TensorInfo

_ZEROS = bytes(BUFFER)


@dataclass(frozen=True)
class Insertion:
    """A planned copy of a checkpoint with another encoder."""

    host: Checkpoint  # The checkpoint that is copied
    # Names in DeepSeek-OCR's model, without `model.`, and the host's names of the replaced tensors
    keys: dict[str, str]
    replaced: dict[str, LazyTensor]  # The new tensors by the host's names
    folder: Path | None  # The host's folder; None for a single file
    other_files: list[Path]  # The paths in the folder of other files that are copied
    notes: list[str]  # What is replaced, copied and left out

    @property
    def tensors(self) -> dict[str, LazyTensor]:
        """All tensors of the new checkpoint, in the order in which they are written."""
        return {key: value for file in self.host.files for key, value in self.tensors_in(file).items()}

    def tensors_in(self, file: SourceFile) -> dict[str, LazyTensor]:
        """The tensors of one file by their offsets, which need not be the order of its header."""
        tensors = [
            value
            for value in self.host.contents.values()
            if isinstance(value, TensorInfo) and value.storage.file is file
        ]
        tensors.sort(key=lambda tensor: (tensor.storage.offset, tensor.storage.length))
        return {tensor.key: self.replaced.get(tensor.key) or lazy_read(tensor) for tensor in tensors}

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(map(nbytes, self.tensors.values()))


def plan_insertion(
    path: Path,
    open_file: Callable[[Path], Checkpoint],
    encoder: Mapping[str, LazyTensor],
    constants: Collection[str],
    dtype: str,
) -> Insertion:
    """Plan a copy of the checkpoint at `path` with the tensors of `encoder` in place of its own.

    Args:
        path: A local DeepSeek-OCR checkpoint.
        open_file: Opens a checkpoint.
        encoder: New tensors by their names in DeepSeek-OCR's model.
        constants: Names of tensors that the checkpoint may lack.
        dtype: The type of the new tensors; keep for the checkpoint's types.

    Raises:
        LayoutError: The checkpoint is not a DeepSeek-OCR, or not in safetensors.
        UsageError: Names, shapes or types differ.
    """
    if not exists(path):
        raise UsageError(
            f"--into {path}: no such file or folder",
            "download the checkpoint first (`hf download`), and give its folder",
        )
    host = open_file(path)
    if set(host.containers) != {"safetensors"}:
        formats = ", ".join(sorted(set(host.containers)))
        raise LayoutError(f"{host.name}: {formats}: --into supports only safetensors checkpoints")
    old = _encoder_of(host, encoder)
    _check_fit(host, old, encoder, constants)
    replaced = {tensor.key: _cast(encoder[name], tensor, dtype) for name, tensor in old.items()}
    folder = path if path.is_dir() else path.parent if is_index(path.name) else None
    other_files, notes = _other_files(folder, host) if folder else ([], [])
    kept = sum(isinstance(value, TensorInfo) for value in host.contents.values()) - len(replaced)
    files = f" and {len(other_files)} other files" if folder else ""
    notes.insert(0, f"replaced {len(replaced)} tensors; kept {kept}{files} as they were")
    return Insertion(host, {name: tensor.key for name, tensor in old.items()}, replaced, folder, other_files, notes)


def _check_fit(
    host: Checkpoint, old: Mapping[str, TensorInfo], encoder: Mapping[str, LazyTensor], constants: Collection[str]
) -> None:
    problems = [f"the checkpoint has no {name!r}" for name in encoder if name not in {*old, *constants}]
    problems += [problem for name, tensor in old.items() if (problem := _misfit(name, tensor, encoder.get(name)))]
    if problems:
        raise UsageError(
            f"{host.name}: the encoder does not fit: {summary(problems)}", "use an encoder of the same sizes"
        )


def _encoder_of(opened: Checkpoint, encoder: Mapping[str, LazyTensor]) -> dict[str, TensorInfo]:
    """Return the tensors to replace by their names in DeepSeek-OCR's model."""
    found: dict[str, TensorInfo] = {}
    for family in registry.families():
        encoder_prefix = registry.encoder_prefix(family)
        if not any(name.startswith(encoder_prefix) for name in encoder):
            continue
        detected, plan = resolve_to_canonical(opened, ConvertOptions(family))
        prefix = detected.match.prefix
        if not prefix.endswith(encoder_prefix):
            what = f"its {family.upper()} has the layout {plan.mapping.name}"
            raise LayoutError(f"{opened.name}: is not a DeepSeek-OCR: {what}")
        found |= {
            encoder_prefix + name: value.tensor for name, value in plan.outputs.items() if isinstance(value, Read)
        }
        outer = prefix.removesuffix(encoder_prefix)
        # Those of the projector, which are nobody's family.
        found |= {name: detected.tensors[outer + name] for name in encoder if outer + name in detected.tensors}
    return found


def _misfit(name: str, tensor: TensorInfo, new: LazyTensor | None) -> str:
    if new is None:
        return f"nothing gives {name!r}, which the checkpoint has"
    if new.shape != tensor.shape:
        return f"{name!r} has shape {list(new.shape)}; the checkpoint's has {list(tensor.shape)}"
    if new.dtype != tensor.dtype and not (new.dtype.is_float and tensor.dtype.is_float):
        return f"{name!r} is {new.dtype.name}; the checkpoint's is {tensor.dtype.name}"
    return ""


def _cast(value: LazyTensor, tensor: TensorInfo, dtype: str) -> LazyTensor:
    return cast(value, tensor.dtype.name if dtype == "keep" else dtype) if value.dtype.is_float else value


def _other_files(folder: Path, host: Checkpoint) -> tuple[list[Path], list[str]]:
    """The files of a checkpoint's folder other than its shards, and notes on those that are not copied."""
    shards = {Path(file.path).name for file in host.files}
    copied, notes = [], []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        # Hidden folders belong to git and to the hubs' libraries.
        if path.is_dir() or str(relative) in shards or any(part.startswith(".") for part in relative.parts[:-1]):
            continue
        if not path.is_file() or not _within(folder, path):
            notes.append(f"left out {relative}: it is not a file in this folder")
        elif (has_weight_suffix(path.name) or is_index(path.name)) and str(path) != host.name:
            notes.append(f"left out {relative}: other weights, which may hold the old encoder")
        else:
            copied.append(relative)
    return copied, notes


def _within(folder: Path, path: Path) -> bool:
    """Whether a file is in a folder, or a link from it to `blobs` as in Hugging Face's cache."""
    cache = folder.absolute().parent
    blobs = [cache.with_name("blobs").resolve()] if cache.name == "snapshots" else []
    return any(path.resolve().is_relative_to(root) for root in (folder.resolve(), *blobs))


def insertion_output(insertion: Insertion) -> Output:
    """The copy as an output: a folder or a single file, with the metadata of the host."""
    # Disk blocks, not file sizes: holes in sparse files are kept.
    stats = [Path(file.path).stat() for file in insertion.host.files]
    room = sum(512 * getattr(stat, "st_blocks", stat.st_size // 512 + 1) for stat in stats)
    room += sum(map(nbytes, insertion.replaced.values()))
    folder = insertion.folder
    return Output(insertion.tensors, room, partial(_write, insertion), folder is not None, source_folder=folder)


def _write(insertion: Insertion, target: int | Path, on_bytes: OnBytes, on_data: OnData | None) -> None:
    if isinstance(target, int):
        _write_shard(insertion, insertion.host.files[0], target, on_bytes, on_data)
        return
    for file in insertion.host.files:
        with new_file(target / Path(file.path).name) as fd:
            _write_shard(insertion, file, fd, on_bytes, on_data)
    for path in insertion.other_files:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        with new_file(target / path) as fd:
            _write_other_file(insertion, path, fd)


def _write_other_file(insertion: Insertion, relative: Path, fd: int) -> None:
    assert insertion.folder is not None
    path = insertion.folder / relative
    try:
        source = path.open("rb")
    except OSError as error:
        # All other errors here are those of the output.
        raise ContainerError(f"{path}: cannot be read: {error.strerror}") from error
    with source, open(fd, "wb", closefd=False) as target:
        if printable(str(path)) == insertion.host.name:
            target.write(_index(source.read(), insertion.nbytes))
        else:
            shutil.copyfileobj(source, target, BUFFER)


def _index(text: bytes, total: int) -> bytes:
    """The index with the number of bytes updated; unchanged if it is right."""
    index = json.loads(text)
    metadata = index.get("metadata")
    if not isinstance(metadata, dict) or metadata.get("total_size", total) == total:
        return text
    metadata["total_size"] = total
    # As ASCII: names may hold lone surrogates, which UTF-8 cannot encode.
    return json.dumps(index, indent=2).encode() + b"\n"


def _write_shard(insertion: Insertion, file: SourceFile, fd: int, on_bytes: OnBytes, on_data: OnData | None) -> None:
    values = insertion.tensors_in(file)
    write_tensors(fd, _header(file, values), values.values(), on_bytes, on_data, _write_or_skip)
    # For a hole at the end.
    os.ftruncate(fd, os.lseek(fd, 0, os.SEEK_CUR))


def _write_or_skip(fd: int, full: memoryview) -> None:
    """Write a buffer, or a hole if it is full of zeros."""
    if len(full) == BUFFER and full.obj == _ZEROS:
        os.lseek(fd, BUFFER, os.SEEK_CUR)
    else:
        write_all(fd, full)


def _header(file: SourceFile, values: Mapping[str, LazyTensor]) -> bytes:
    """The header of a shard after its length; unchanged unless a type has changed."""
    old = file.read(0, 8 + int.from_bytes(file.read(0, 8), "little"))
    header: dict[str, Any] = json.loads(old[8:])
    before, end = dict(header), 0
    for key, value in values.items():
        begin, end = end, end + nbytes(value)
        header[key] = {"dtype": value.dtype.code, "shape": list(value.shape), "data_offsets": [begin, end]}
    if header == before:
        return old
    return add_header_length(json.dumps(header, separators=(",", ":")).encode())

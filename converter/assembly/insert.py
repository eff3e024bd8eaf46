"""A copy of a DeepSeek-OCR checkpoint with another encoder in it; all else is, byte for byte, as it was."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from converter.checkpoint.locate import INDEX_SUFFIX, WEIGHT_SUFFIXES
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


class Copy(NamedTuple):
    """A copy that is to be made: `replaced` holds the new tensors by the checkpoint's own names.

    `names` leads to these from the names inside of DeepSeek-OCR's model. `folder` is the checkpoint's, or None for a
    single file that was named itself; `beside` are the paths in it of its other files, `notes` tells of those left out.
    """

    opened: Checkpoint
    names: dict[str, str]
    replaced: dict[str, LazyTensor]
    folder: Path | None
    beside: list[Path]
    notes: list[str]

    @property
    def tensors(self) -> dict[str, LazyTensor]:
        """All of the new checkpoint, in the order in which it is written."""
        return {key: value for file in self.opened.files for key, value in self.within(file).items()}

    def within(self, file: SourceFile) -> dict[str, LazyTensor]:
        """What is written of one file, as it lies there: its header may list the tensors in another order."""
        held = (value for value in self.opened.contents.values() if isinstance(value, TensorInfo))
        mine = [tensor for tensor in held if tensor.storage.file is file]
        mine.sort(key=lambda tensor: (tensor.storage.offset, tensor.storage.length))
        return {tensor.key: self.replaced.get(tensor.key) or lazy_read(tensor) for tensor in mine}

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(map(nbytes, self.tensors.values()))


def plan_copy(
    path: Path,
    open_: Callable[[Path], Checkpoint],
    encoder: Mapping[str, LazyTensor],
    constants: Collection[str],
    dtype: str,
) -> Copy:
    """The copy of the checkpoint at `path` in which `encoder` replaces the tensors of its name, each of its shape.

    `encoder` has the names inside of DeepSeek-OCR's model; the checkpoint may lack those of `constants`. Types are the
    checkpoint's unless `dtype` says otherwise. LayoutError where it is of another kind, UsageError where names, shapes
    or types do not fit.
    """
    if not exists(path):
        raise UsageError(
            f"--into {path}: no such file or folder",
            "download the checkpoint first (`hf download`), and give its folder",
        )
    opened = open_(path)
    if set(opened.containers) != {"safetensors"}:
        kinds = ", ".join(sorted(set(opened.containers)))
        raise LayoutError(f"{opened.name}: {kinds}: only checkpoints in safetensors are given another encoder")
    theirs = _encoder_of(opened, encoder)
    problems = [f"the checkpoint has no {name!r}" for name in encoder if name not in {*theirs, *constants}]
    problems += [problem for name, tensor in theirs.items() if (problem := _misfit(name, tensor, encoder.get(name)))]
    if problems:
        raise UsageError(
            f"{opened.name}: another encoder does not fit: {summary(problems)}", "take one of the same sizes"
        )
    names = {name: tensor.key for name, tensor in theirs.items()}
    replaced = {tensor.key: _cast(encoder[name], tensor, dtype) for name, tensor in theirs.items()}
    folder = path if path.is_dir() else path.parent if path.name.endswith(INDEX_SUFFIX) else None
    beside, notes = _beside(folder, opened) if folder else ([], [])
    copy = Copy(opened, names, replaced, folder, beside, notes)
    files = f" and {len(beside)} other files" if folder else ""
    notes.insert(0, f"replaced {len(replaced)} tensors; kept {len(copy.tensors) - len(replaced)}{files} as they were")
    return copy


def _encoder_of(opened: Checkpoint, encoder: Mapping[str, LazyTensor]) -> dict[str, TensorInfo]:
    """The tensors that are to be replaced, by their names inside of DeepSeek-OCR's model."""
    found: dict[str, TensorInfo] = {}
    for family in registry.families():
        place = registry.encoder_prefix(family)
        known, plan = resolve_to_canonical(opened, ConvertOptions(family))
        prefix = known.match.prefix
        if not prefix.endswith(place):
            what = f"its {family.upper()} has the layout {plan.mapping.name}"
            raise LayoutError(f"{opened.name}: no DeepSeek-OCR: {what}")
        found |= {place + name: value.tensor for name, value in plan.outputs.items() if isinstance(value, Read)}
        outer = prefix.removesuffix(place)
        # Those of the projector, which are nobody's family.
        found |= {name: known.tensors[outer + name] for name in encoder if outer + name in known.tensors}
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


def _beside(folder: Path, opened: Checkpoint) -> tuple[list[Path], list[str]]:
    """The files of a checkpoint's folder but for its shards, and notes on those that are not copied."""
    shards = {Path(file.path).name for file in opened.files}
    found, notes = [], []
    for where, folders, names in os.walk(folder):
        # What git and the hubs' libraries keep for themselves.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(where, name) for name in sorted(names)):
            relative = path.relative_to(folder)
            if str(relative) in shards:
                continue
            if not path.is_file() or not _within(folder, path):
                notes.append(f"left out {relative}: no file of this folder")
            elif path.name.endswith((*WEIGHT_SUFFIXES, INDEX_SUFFIX)) and printable(str(path)) != opened.name:
                notes.append(f"left out {relative}: other weights, which may hold the old encoder")
            else:
                found.append(relative)
    return found, notes


def _within(folder: Path, path: Path) -> bool:
    """Whether a file lies in a folder, or is what Hugging Face's cache has there: a link to snapshots/../blobs."""
    cache = folder.absolute().parent
    blobs = [cache.with_name("blobs").resolve()] if cache.name == "snapshots" else []
    return any(path.resolve().is_relative_to(root) for root in (folder.resolve(), *blobs))


def output_of_copy(copy: Copy) -> Output:
    """The copy as an output: a folder, or a single file, whose headers say of their making what they said before."""
    # Not the files' sizes: what has holes keeps them.
    stats = [Path(file.path).stat() for file in copy.opened.files]
    room = sum(512 * getattr(stat, "st_blocks", stat.st_size // 512 + 1) for stat in stats)
    room += sum(map(nbytes, copy.replaced.values()))
    return Output(copy.tensors, room, partial(_write, copy), copy.folder is not None, source_folder=copy.folder)


def _write(copy: Copy, place: int | Path, count: OnBytes, seen: OnData | None) -> None:
    if isinstance(place, int):
        _write_shard(copy, copy.opened.files[0], place, count, seen)
    else:
        assert copy.folder is not None
        _write_folder(copy, copy.folder, place, count, seen)


def _write_folder(copy: Copy, source: Path, target: Path, count: OnBytes, seen: OnData | None) -> None:
    for file in copy.opened.files:
        with new_file(target / Path(file.path).name) as fd:
            _write_shard(copy, file, fd, count, seen)
    for path in copy.beside:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        with new_file(target / path) as fd:
            _write_beside(copy, source / path, fd)


def _write_beside(copy: Copy, path: Path, fd: int) -> None:
    if printable(str(path)) == copy.opened.name:
        write_all(fd, memoryview(_index(path.read_bytes(), copy.nbytes)))
        return
    try:
        source = path.open("rb")
    except OSError as error:
        # Not the output's fault, as all other errors here are.
        raise ContainerError(f"{path}: cannot be read: {error.strerror}") from error
    with source, open(fd, "wb", closefd=False) as target:
        shutil.copyfileobj(source, target, BUFFER)


def _index(text: bytes, total: int) -> bytes:
    """The index with its sum of bytes put right, or as it was where that is right."""
    index = json.loads(text)
    metadata = index.get("metadata")
    if not isinstance(metadata, dict) or metadata.get("total_size", total) == total:
        return text
    metadata["total_size"] = total
    # In ASCII: escapes may stand for halves of surrogate pairs, which UTF-8 cannot.
    return json.dumps(index, indent=2).encode() + b"\n"


def _write_shard(copy: Copy, file: SourceFile, fd: int, count: OnBytes, seen: OnData | None) -> None:
    values = copy.within(file)
    write_tensors(fd, _header(file, values), values.values(), count, seen, _write_or_skip)
    # What was skipped last.
    os.ftruncate(fd, os.lseek(fd, 0, os.SEEK_CUR))


def _write_or_skip(fd: int, full: memoryview) -> None:
    """Write a buffer, unless all of it is zeros: then a hole says the same and takes no room."""
    if len(full) == BUFFER and full.obj == _ZEROS:
        os.lseek(fd, BUFFER, os.SEEK_CUR)
    else:
        write_all(fd, full)


def _header(file: SourceFile, values: Mapping[str, LazyTensor]) -> bytes:
    """The header of a shard with its length before it, byte for byte as it was unless a type has changed."""
    old = file.read(0, 8 + int.from_bytes(file.read(0, 8), "little"))
    header: dict[str, Any] = json.loads(old[8:])
    before, end = dict(header), 0
    for key, value in values.items():
        begin, end = end, end + nbytes(value)
        header[key] = {"dtype": value.dtype.code, "shape": list(value.shape), "data_offsets": [begin, end]}
    if header == before:
        return old
    return add_header_length(json.dumps(header, separators=(",", ":")).encode())

"""Reads folders of torch.distributed.checkpoint (DCP): `.metadata`, and tensors in files `__<rank>_<number>.distcp`.

`.metadata` is a pickle. It has the dtype, the shape and the chunks (blocks) of each tensor, and the file, offset and
length of each chunk. The bytes there are a file of torch.save with the chunk as a tensor.

A chunk is opened when its tensor is needed, as a large checkpoint has many. Everything else is checked first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import groupby, pairwise
from typing import Any, NamedTuple

from converter.errors import ContainerError
from converter.formats import safetensors, torch_zip
from converter.formats.dcp_files import CONTAINER as CONTAINER
from converter.formats.dcp_files import METADATA, SUFFIX
from converter.formats.pickle_reader import MAX_MEMORY, Placeholder, unpickle
from converter.formats.torch_contents import MAX_DEPTH, MAX_NAME
from converter.formats.torch_pickle import TorchGlobals
from converter.formats.zip_directory import is_zip
from converter.storage.byte_range import damaged
from converter.storage.local_file import FileSlice, SourceFile
from converter.tensors.dtypes import DType, unreadable
from converter.tensors.lazy_tensor import LazyTensor, concatenated, lazy_read
from converter.tensors.tensor_info import (
    MAX_DIMENSIONS,
    Contents,
    FileContents,
    TensorInfo,
    are_sizes,
    plain_tensor_info,
)

_MAX_METADATA_NBYTES = 32 << 20  # a chunk takes about 165 bytes
_MAX_RATIO = 32  # of the memory of the values, as the pickle reader estimates it, to the file's size; usually 27

# The classes of `.metadata` by module, with the modules of torch before 2.2. Objects of other classes are ignored.
_CLASSES = {
    "torch.distributed.checkpoint.metadata": "Metadata MetadataIndex StorageMeta TensorProperties _MEM_FORMAT_ENCODING "
    "TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.distributed._shard.sharded_tensor.metadata": "TensorProperties MEM_FORMAT_ENCODING",
    # For attributes of StorageMeta.
    "pathlib": "PosixPath WindowsPath",
    "pathlib._local": "PosixPath WindowsPath",
}
_GATHER = (
    "where you trust it, make it one file: python -m torch.distributed.checkpoint.format_utils dcp_to_torch {} w.pth"
)

# The files of chunks by the tensor's name and the chunk's offsets. The offsets are text: a hostile file could have many
# tuples of numbers with one hash.
_ChunkFiles = Mapping[tuple[str, str], FileSlice]


class _Chunk(NamedTuple):
    """A chunk of a tensor, and the part of a *.distcp file that is a file of torch.save with the chunk."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: FileSlice


# A chunk, or a dimension and the blocks that are concatenated along it.
_Block = _Chunk | tuple[int, list["_Block"]]


def load(metadata: SourceFile, files: Mapping[str, SourceFile]) -> FileContents:
    """Describe the tensors of a checkpoint, nested as in its state dict, without the states of optimizers.

    Args:
        metadata: The file `.metadata`.
        files: The other files of the folder by name.

    Raises:
        ContainerError: `.metadata` is damaged or hostile, or contradicts the files.
    """
    return _Reader(metadata, files).contents()


class _Reader:
    """Reads and checks one `.metadata`."""

    def __init__(self, metadata: SourceFile, files: Mapping[str, SourceFile]) -> None:
        self._metadata, self._files, self._globals = metadata, files, TorchGlobals()

    def contents(self) -> FileContents:
        saved = self._fields(self._unpickled(), "Metadata")
        tensors, storage_data, paths = map(saved.get, ("state_dict_metadata", "storage_data", "planner_data"))
        if type(tensors) is not dict or type(storage_data) is not dict:
            raise self._damaged("no dicts of tensors and of their places")
        chunk_files = dict(self._chunk_files(storage_data))
        _check_overlaps(chunk_files.values())
        contents: Contents = {}
        num_left_out = 0
        for name, entry in tensors.items():
            if _class_name(entry) == "BytesStorageMetadata":
                continue
            path = self._path(name, paths)
            if _is_of_optimizer(path):
                num_left_out += 1
            else:
                self._add(contents, path, self._tensor(name, str(path[-1]), entry, chunk_files))
        if num_left_out and not contents:
            raise ContainerError(
                f"{self._metadata.name}: holds states of an optimizer alone", "give the model's folder"
            )
        notes = [f"left out {num_left_out} tensors of optimizer states"] if num_left_out else []
        return FileContents(contents, self._globals.ignored, notes)

    def _unpickled(self) -> Any:
        """Return the value of the pickle, in which objects are placeholders with the names of their classes."""
        size = self._metadata.size
        if size > _MAX_METADATA_NBYTES:
            raise self._damaged(f"{size} bytes; the limit is {_MAX_METADATA_NBYTES}")
        # New placeholders for each file, as a pickle may set the state of any of them.
        for module, names in _CLASSES.items():
            self._globals.update({(module, name): Placeholder(name) for name in names.split()})
        data, limit = self._metadata.read(0, size), max(MAX_MEMORY, _MAX_RATIO * size)
        return unpickle(data, self._metadata.name, self._globals, max_memory=limit)[0]

    def _damaged(self, why: str) -> ContainerError:
        return damaged(f"{self._metadata.name}: {why}")

    def _fields(self, value: Any, name: str) -> dict[Any, Any]:
        """Return the attributes of an object of the class `name`."""
        if _class_name(value) != name or type(value.state) is not dict:
            raise self._damaged(f"expected an object of {name}")
        return value.state

    def _sizes(self, value: Any, what: str) -> tuple[int, ...]:
        if type(value) is not tuple or len(value) > MAX_DIMENSIONS or not are_sizes(value):
            raise self._damaged(f"impossible {what}")
        return value

    def _name(self, name: Any) -> str:
        if type(name) is not str or len(name) > MAX_NAME:
            raise self._damaged("an impossible name")
        return name

    def _chunk_files(self, storage_data: dict[Any, Any]) -> Iterator[tuple[tuple[str, str], FileSlice]]:
        for index, info in storage_data.items():
            key, location = self._fields(index, "MetadataIndex"), self._fields(info, "_StorageInfo")
            name, offsets = self._name(key.get("fqn")), key.get("offset")
            offsets_text = str(offsets and self._sizes(offsets, f"offsets of {name!r}"))
            yield (name, offsets_text), self._chunk_file(name, location)

    def _chunk_file(self, name: str, location: dict[Any, Any]) -> FileSlice:
        file_name = location.get("relative_path")
        start, length = self._sizes((location.get("offset"), location.get("length")), f"place of {name!r}")
        if type(file_name) is not str or set(file_name) & set("/\\:") or not file_name.endswith(SUFFIX):
            raise self._damaged(f"{name!r} is in {str(file_name)[:MAX_NAME]!r}, not in a *{SUFFIX} file of the folder")
        where, file = f"{self._metadata.name}: {name!r}", self._files.get(file_name)
        if location.get("transform_descriptors"):
            step = _GATHER.format(self._metadata.name.removesuffix(METADATA))
            raise ContainerError(f"{where} is compressed by an extension of DCP", step)
        if file is None:
            raise ContainerError(f"{where} is in {file_name!r}, which is missing", "copy the rest of the folder")
        if start + length > file.size:
            raise ContainerError(
                f"{file.name}: truncated: {name!r} takes the bytes to {start + length}, of {file.size}", file.copy_hint
            )
        return FileSlice(file, start, length)

    def _path(self, name: Any, paths: Any) -> Sequence[Any]:
        """Return the keys of a tensor in the nested state dict that was saved."""
        path = (self._name(name),)
        if type(paths) is dict:
            path = paths.get(name, path)
        if type(path) is not tuple or not 0 < len(path) <= MAX_DEPTH or {type(key) for key in path} - {str, int}:
            raise self._damaged(f"impossible keys of {name!r}")
        if ".".join(map(str, path)) != name:
            raise self._damaged(f"{name!r} has the keys of another tensor")
        return path

    def _add(self, contents: Contents, path: Sequence[Any], tensor: TensorInfo) -> None:
        for key in path[:-1]:
            contents = contents.setdefault(key, {})
            if type(contents) is not dict:
                raise self._damaged(f"{'.'.join(map(str, path))!r} is in a tensor")
        if contents.setdefault(path[-1], tensor) is not tensor:
            raise self._damaged(f"two values at {'.'.join(map(str, path))!r}")

    def _tensor(self, name: str, key: str, entry: Any, chunk_files: _ChunkFiles) -> TensorInfo:
        """Describe a tensor under the name `key`; ContainerError unless its chunks fill it."""
        fields = self._fields(entry, "TensorStorageMetadata")
        shape, dtype = self._sizes(fields.get("size"), f"shape of {name!r}"), self._dtype(name, fields)
        tensor = plain_tensor_info(self._metadata, key, dtype, shape, 0)
        if not tensor.nbytes:
            return tensor
        chunks = list(self._chunks(name, tensor, fields.get("chunks"), chunk_files))
        try:
            block = _arrange_chunks(chunks, shape)
        except ValueError as error:
            raise self._damaged(f"{name!r}: its chunks {error}") from None
        first = chunks[0].file
        span = first.offset, first.offset + first.size
        tensor = tensor._replace(storage=tensor.storage._replace(file=first.file, span=span))
        return tensor._replace(assemble=cache(partial(_assemble, tensor, block)))

    def _chunks(self, name: str, tensor: TensorInfo, entries: Any, chunk_files: _ChunkFiles) -> Iterator[_Chunk]:
        """Yield the chunks of a tensor, without the empty ones of ranks that have no rows."""
        if type(entries) is not list:
            raise self._damaged(f"{name!r} has no list of chunks")
        for entry in entries:
            fields = self._fields(entry, "ChunkStorageMetadata")
            offsets, sizes = (self._sizes(fields.get(field), f"chunk of {name!r}") for field in ("offsets", "sizes"))
            if not len(offsets) == len(sizes) == len(tensor.shape):
                raise self._damaged(f"{name!r}: a chunk of {len(sizes)} dimensions, of {len(tensor.shape)}")
            if not math.prod(sizes):
                continue
            file = chunk_files.get((name, str(offsets)))
            if file is None:
                raise self._damaged(f"{name!r}: the chunk at {offsets} has no place in a file")
            if tensor.dtype.nbytes(math.prod(sizes)) > file.size:
                raise self._damaged(f"{name!r}: {file.size} bytes cannot hold a chunk of shape {sizes}")
            yield _Chunk(offsets, sizes, file)

    def _dtype(self, name: str, fields: dict[Any, Any]) -> DType:
        properties: Any = fields.get("properties")
        state = properties.state if _class_name(properties) == "TensorProperties" else None
        dtype = state[0] if type(state) is tuple and state else None
        if type(dtype) is Placeholder:  # such as torch.int4
            return unreadable(dtype.name)
        if type(dtype) is not DType:
            raise self._damaged(f"{name!r} has no element type")
        return dtype


def _class_name(value: Any) -> str:
    return value.name if type(value) is Placeholder and value.arguments is not None else ""


def _is_of_optimizer(path: Sequence[Any]) -> bool:
    keys = path if len(path) > 1 else path[0].split(".")
    return any(str(key).startswith("optim") for key in keys[:2])


def _check_overlaps(chunk_files: Iterable[FileSlice]) -> None:
    """Raise ContainerError if chunks share bytes, so that a small file could expand to a large one."""
    for a, b in pairwise(sorted(chunk_files, key=lambda part: (id(part.file), part.offset, part.size))):
        if a.file is b.file and b.offset < a.offset + a.size:
            _refuse_safetensors(a.file)
            raise damaged(f"{a.file.name}: the chunks at bytes {a.offset} and {b.offset} overlap")


def _refuse_safetensors(file: SourceFile) -> None:
    if safetensors.can_read(file):
        raise ContainerError(
            f"{file.name}: was written with SerializationFormat.SAFETENSORS, which torch's FileSystemReader does not "
            "read",
            "each such file is a safetensors file: if there is one, copy it to model.safetensors and give that",
        )


def _arrange_chunks(chunks: list[_Chunk], shape: tuple[int, ...], dim: int = 0) -> _Block:
    """Nest chunks by the dimensions from `dim` on; ValueError if they do not fill the shape exactly."""
    if dim == len(shape):
        if len(chunks) != 1:
            raise ValueError("overlap")
        return chunks[0]

    def extent(chunk: _Chunk) -> tuple[int, int]:
        return chunk.offsets[dim], chunk.sizes[dim]

    blocks: list[_Block] = []
    end = 0
    for (start, size), slab in groupby(sorted(chunks, key=extent), key=extent):
        if start != end:
            raise ValueError("overlap" if start < end else "leave a gap")
        blocks.append(_arrange_chunks(list(slab), shape, dim + 1))
        end += size
    if end != shape[dim]:
        raise ValueError("leave a gap" if end < shape[dim] else "reach beyond its shape")
    return blocks[0] if len(blocks) == 1 else (dim, blocks)


def _assemble(tensor: TensorInfo, block: _Block) -> LazyTensor:
    """Open the chunks of a block of a tensor, and concatenate them."""
    if isinstance(block, _Chunk):
        return lazy_read(_open_chunk(tensor, block))
    dim, blocks = block
    return concatenated(tuple(_assemble(tensor, part) for part in blocks), dim)


def _open_chunk(tensor: TensorInfo, chunk: _Chunk) -> TensorInfo:
    """Describe the tensor in the file of a chunk, by its offset in the *.distcp file."""
    file = chunk.file
    if not is_zip(file):
        _refuse_safetensors(file.file)
        raise damaged(f"{file.name}: {tensor.key!r} is not as torch.save writes it")
    found = torch_zip.load_tensor(file, tensor.key)
    storage = found.storage
    if (found.dtype, found.shape) != (tensor.dtype, chunk.sizes):
        actual, expected = f"{found.dtype.name} {list(found.shape)}", f"{tensor.dtype.name} {list(chunk.sizes)}"
        raise damaged(f"{file.name}: {tensor.key!r} is {actual}, but {METADATA} says {expected}")
    if found.nbytes > storage.size:
        raise damaged(f"{file.name}: {tensor.key!r} repeats {storage.size} bytes")
    span = file.offset + storage.span[0], file.offset + storage.span[1]
    find_offset = cache(lambda: file.offset + storage.offset)
    return found._replace(storage=storage._replace(file=file.file, span=span, find_offset=find_offset))

"""Reads folders of torch.distributed.checkpoint (DCP): `.metadata`, and tensors in files `__<rank>_<number>.distcp`.

`.metadata` is a pickle. It has the dtype, the shape and the chunks (blocks) of each tensor, and the file, offset and
length of each chunk. The bytes there are a file as torch.save writes it, which holds the chunk alone.

A chunk is opened when its tensor is needed: a large checkpoint has many. Everything else is checked at once.
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
from converter.formats.torch_pickle import MAX_DIMENSIONS, MAX_INT, TorchGlobals
from converter.formats.zip_directory import is_zip
from converter.storage.byte_range import DAMAGED, Storage
from converter.storage.local_file import FileSlice, SourceFile
from converter.tensors.dtypes import DType, unreadable
from converter.tensors.lazy_tensor import LazyTensor, concatenated, lazy_read
from converter.tensors.tensor_info import Contents, FileContents, TensorInfo, contiguous_strides

MAX_METADATA = 32 << 20  # bytes of `.metadata`; a chunk takes about 165
MAX_RATIO = 32  # of the memory of its values, as the pickle reader estimates it, to its size; real ones have 27

_METADATA, _SHARDED = "torch.distributed.checkpoint.metadata", "torch.distributed._shard.sharded_tensor.metadata"
# The classes of `.metadata` by module, and their names in messages. Objects of other classes are ignored.
_GLOBALS = {
    **{
        (_METADATA, name): name
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
            *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
        )
    },
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): "_StorageInfo",
    # Before torch 2.2.
    (_SHARDED, "TensorProperties"): "TensorProperties",
    (_SHARDED, "MEM_FORMAT_ENCODING"): "_MEM_FORMAT_ENCODING",
    # Of StorageMeta.
    **{(module, name): "Path" for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")},
}
_GATHER = (
    "where you trust it, make it one file: python -m torch.distributed.checkpoint.format_utils dcp_to_torch {} w.pth"
)


_Place = tuple[SourceFile, int, int]  # A file, an offset and a length
# The places of chunks by the tensor's name and the chunk's offsets as text: a file can make many tuples of numbers with
# one hash.
_Places = Mapping[tuple[str, str], _Place]


class _Chunk(NamedTuple):
    """A block of a tensor, and where a file as torch.save writes it holds the block."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: SourceFile
    start: int
    length: int


# A chunk, or consecutive blocks along a dimension.
_Block = _Chunk | tuple[int, list["_Block"]]


def load(metadata: SourceFile, files: Mapping[str, SourceFile]) -> FileContents:
    """Describe the tensors of a checkpoint, nested as its state dict was, without the states of optimizers.

    Args:
        metadata: The file `.metadata`.
        files: The other files of its folder by their names.

    Raises:
        ContainerError: `.metadata` is damaged or hostile, or contradicts the files.
    """
    return _Reader(metadata, files).contents()


class _Reader:
    """Checks the values of one `.metadata`."""

    def __init__(self, metadata: SourceFile, files: Mapping[str, SourceFile]) -> None:
        self._metadata, self._files = metadata, files
        self._ignored: list[str] = []

    def contents(self) -> FileContents:
        saved = self._fields(self._unpickled(), "Metadata")
        tensors, stored, paths = (saved.get(name) for name in ("state_dict_metadata", "storage_data", "planner_data"))
        if type(tensors) is not dict or type(stored) is not dict:
            raise self._damaged("no dicts of tensors and of their places")
        places = dict(self._places(stored))
        _check_overlaps(places.values())
        contents: Contents = {}
        num_left_out = 0
        for name, entry in tensors.items():
            if self._class(entry) == "BytesStorageMetadata":
                continue
            path = self._path(name, paths)
            if _is_of_optimizer(path):
                num_left_out += 1
            else:
                self._add(contents, path, self._tensor(name, str(path[-1]), entry, places))
        if not contents and num_left_out:
            raise ContainerError(
                f"{self._metadata.name}: holds states of an optimizer alone", "give the model's folder"
            )
        notes = [f"left out {num_left_out} tensors of optimizer states"] if num_left_out else []
        return FileContents(contents, self._ignored, notes)

    def _unpickled(self) -> Any:
        """The value of the pickle. Objects are placeholders with the names of their classes."""
        size = self._metadata.size
        if size > MAX_METADATA:
            raise self._damaged(f"{size} bytes; the limit is {MAX_METADATA}")
        globals_ = TorchGlobals()
        # New ones for each file: a pickle may set the state of any placeholder.
        globals_.update({key: Placeholder(name) for key, name in _GLOBALS.items()})
        value, _ = unpickle(
            self._metadata.read(0, size), self._metadata.name, globals_, max_memory=max(MAX_MEMORY, MAX_RATIO * size)
        )
        self._ignored = globals_.ignored
        return value

    def _damaged(self, why: str) -> ContainerError:
        return ContainerError(f"{self._metadata.name}: {why}", DAMAGED)

    def _class(self, value: Any) -> str:
        return value.name if type(value) is Placeholder and value.arguments is not None else ""

    def _fields(self, value: Any, name: str) -> dict[Any, Any]:
        """The attributes of an object of the class `name`."""
        if self._class(value) != name or type(value.state) is not dict:
            raise self._damaged(f"expected an object of {name}")
        return value.state

    def _sizes(self, value: Any, what: str) -> tuple[int, ...]:
        sizes: tuple[Any, ...] = value if type(value) is tuple and len(value) <= MAX_DIMENSIONS else (None,)
        if not all(type(size) is int and 0 <= size <= MAX_INT for size in sizes):
            raise self._damaged(f"impossible {what}")
        return sizes

    def _places(self, stored: dict[Any, Any]) -> Iterator[tuple[tuple[str, str], _Place]]:
        for index, info in stored.items():
            key, place = self._fields(index, "MetadataIndex"), self._fields(info, "_StorageInfo")
            name, offsets = key.get("fqn"), key.get("offset")
            if type(name) is not str or len(name) > MAX_NAME:
                raise self._damaged("an impossible name")
            yield (name, str(offsets and self._sizes(offsets, f"offsets of {name!r}"))), self._place(name, place)

    def _place(self, name: str, place: dict[Any, Any]) -> _Place:
        file_name = place.get("relative_path")
        start, length = self._sizes((place.get("offset"), place.get("length")), f"place of {name!r}")
        if type(file_name) is not str or set(file_name) & set("/\\:") or not file_name.endswith(SUFFIX):
            raise self._damaged(f"{name!r} is in {str(file_name)[:MAX_NAME]!r}, not in a *{SUFFIX} file of the folder")
        if place.get("transform_descriptors"):
            step = _GATHER.format(self._metadata.name.removesuffix(METADATA))
            raise ContainerError(f"{self._metadata.name}: {name!r} is compressed by an extension of DCP", step)
        file = self._files.get(file_name)
        if file is None:
            raise ContainerError(
                f"{self._metadata.name}: {name!r} is in {file_name!r}, which is missing", "copy the rest of the folder"
            )
        if start + length > file.size:
            raise ContainerError(
                f"{file.name}: truncated: {name!r} takes the bytes to {start + length}, of {file.size}", file.copy_hint
            )
        return file, start, length

    def _path(self, name: Any, paths: Any) -> Sequence[Any]:
        """The keys of a tensor in the state dict that was saved."""
        if type(name) is not str or len(name) > MAX_NAME:
            raise self._damaged("an impossible name")
        path = paths.get(name, (name,)) if type(paths) is dict else (name,)
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

    def _tensor(self, name: str, key: str, entry: Any, places: _Places) -> TensorInfo:
        """Describe a tensor, and check that its chunks fill it.

        Args:
            name: The tensor's name in `.metadata`.
            key: Its last part, the name in the state dict.
            entry: The tensor's entry in `.metadata`.
            places: The places of all chunks.
        """
        fields = self._fields(entry, "TensorStorageMetadata")
        shape, dtype = self._sizes(fields.get("size"), f"shape of {name!r}"), self._dtype(name, fields)
        nothing = Storage(self._metadata, (0, 0), 0, 0, key)
        tensor = TensorInfo(key, dtype, shape, nothing, 0, contiguous_strides(shape))
        if not (dtype.bits and math.prod(shape)):
            return tensor
        chunks = list(self._chunks(name, tensor, fields.get("chunks"), places))
        try:
            whole = _fitted(chunks, shape)
        except ValueError as error:
            raise self._damaged(f"{name!r}: its chunks {error}") from None
        first = chunks[0]
        storage = Storage(first.file, (first.start, first.start + first.length), tensor.nbytes, tensor.nbytes, key)
        return tensor._replace(storage=storage, assemble=cache(partial(_assembled, tensor, whole)))

    def _chunks(self, name: str, tensor: TensorInfo, blocks: Any, places: _Places) -> Iterator[_Chunk]:
        """The chunks of a tensor, without empty ones: those of ranks to which no row was left."""
        if type(blocks) is not list:
            raise self._damaged(f"{name!r} has no list of chunks")
        for block in blocks:
            fields = self._fields(block, "ChunkStorageMetadata")
            offsets, sizes = (self._sizes(fields.get(each), f"chunk of {name!r}") for each in ("offsets", "sizes"))
            if not len(offsets) == len(sizes) == len(tensor.shape):
                raise self._damaged(f"{name!r}: a chunk of {len(sizes)} dimensions, of {len(tensor.shape)}")
            if not math.prod(sizes):
                continue
            place = places.get((name, str(offsets)))
            if place is None:
                raise self._damaged(f"{name!r}: the chunk at {offsets} has no place in a file")
            if tensor.dtype.nbytes(math.prod(sizes)) > place[2]:
                raise self._damaged(f"{name!r}: {place[2]} bytes cannot hold a chunk of shape {sizes}")
            yield _Chunk(offsets, sizes, *place)

    def _dtype(self, name: str, fields: dict[Any, Any]) -> DType:
        properties: Any = fields.get("properties")
        state = properties.state if self._class(properties) == "TensorProperties" else None
        dtype = state[0] if type(state) is tuple and state else None
        if type(dtype) is Placeholder:  # such as torch.int4
            return unreadable(dtype.name)
        if type(dtype) is not DType:
            raise self._damaged(f"{name!r} has no element type")
        return dtype


def _is_of_optimizer(path: Sequence[Any]) -> bool:
    keys = path if len(path) > 1 else path[0].split(".")
    return any(str(key).startswith("optim") for key in keys[:2])


def _check_overlaps(places: Iterable[_Place]) -> None:
    """Check that no two chunks share bytes: a small file would expand to a large one."""
    for (file, start, length), (other, next_start, _) in pairwise(
        sorted(places, key=lambda place: (id(place[0]), *place[1:]))
    ):
        if file is other and next_start < start + length:
            if safetensors.can_read(file):
                raise _is_safetensors(file)
            raise ContainerError(f"{file.name}: the chunks at bytes {start} and {next_start} overlap", DAMAGED)


def _is_safetensors(file: SourceFile) -> ContainerError:
    return ContainerError(
        f"{file.name}: was written with SerializationFormat.SAFETENSORS, which torch's FileSystemReader does not read",
        "each such file is a safetensors file: if there is one, copy it to model.safetensors and give that",
    )


def _fitted(chunks: list[_Chunk], shape: tuple[int, ...], dim: int = 0) -> _Block:
    """Arrange the chunks that fill a block, from the dimension `dim` on; ValueError if they do not fill it."""
    if dim == len(shape):
        if len(chunks) != 1:
            raise ValueError("overlap")
        return chunks[0]
    blocks: list[_Block] = []
    end = 0
    slabs = groupby(
        sorted(chunks, key=lambda chunk: (chunk.offsets[dim], chunk.sizes[dim])),
        key=lambda chunk: (chunk.offsets[dim], chunk.sizes[dim]),
    )
    for (start, size), slab in slabs:
        if start != end:
            raise ValueError("overlap" if start < end else "leave a gap")
        blocks.append(_fitted(list(slab), shape, dim + 1))
        end += size
    if end != shape[dim]:
        raise ValueError("leave a gap" if end < shape[dim] else "reach beyond its shape")
    return blocks[0] if len(blocks) == 1 else (dim, blocks)


def _assembled(tensor: TensorInfo, block: _Block) -> LazyTensor:
    """The tensor, or a block of it, from its chunks, whose files are opened."""
    if isinstance(block, _Chunk):
        return lazy_read(_opened(tensor, block))
    dim, blocks = block
    return concatenated(tuple(_assembled(tensor, each) for each in blocks), dim)


def _opened(tensor: TensorInfo, chunk: _Chunk) -> TensorInfo:
    """The tensor in the file of a chunk."""
    file = FileSlice(chunk.file, chunk.start, chunk.length)
    if not is_zip(file):
        if safetensors.can_read(chunk.file):
            raise _is_safetensors(chunk.file)
        raise ContainerError(f"{file.name}: {tensor.key!r} is not as torch.save writes it", DAMAGED)
    found = torch_zip.load_tensor(file, tensor.key)
    if (found.dtype, found.shape) != (tensor.dtype, chunk.sizes):
        is_, said = f"{found.dtype.name} {list(found.shape)}", f"{tensor.dtype.name} {list(chunk.sizes)}"
        raise ContainerError(f"{file.name}: {tensor.key!r} is {is_}, but {METADATA} says {said}", DAMAGED)
    if found.nbytes > found.storage.size:
        raise ContainerError(f"{file.name}: {tensor.key!r} repeats {found.storage.size} bytes", DAMAGED)
    low, high = found.storage.span
    storage = found.storage._replace(
        file=chunk.file,
        span=(chunk.start + low, chunk.start + high),
        find=cache(lambda: chunk.start + found.storage.offset),
    )
    return found._replace(storage=storage)

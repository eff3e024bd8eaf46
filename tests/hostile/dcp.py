"""Folders of torch.distributed.checkpoint: hostile, contradictory or damaged ones, and unusual legal ones."""

from __future__ import annotations

import functools
import os
import pickle
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.metadata import MetadataIndex as MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save

from hostile.case import Accepted, Build, Case, Refused, marker, sam, saved

KEY = "image_encoder.pos_embed"
FILE, METADATA = "__0_0.distcp", ".metadata"

Change = Callable[[Any], object]


def write(folder: Path, value: dict[str, Any], **options: Any) -> Path:
    """Write a folder by one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(value, storage_writer=FileSystemWriter(folder, sync_files=False, **options), no_dist=True)
    return folder


@functools.cache
def _files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        return {path.name: path.read_bytes() for path in write(Path(folder), sam()).iterdir()}


def good(folder: Path) -> Path:
    """A folder of a tiny SAM."""
    for name, data in _files().items():
        (folder / name).write_bytes(data)
    return folder


def rewrite(source: Path, target: Path, change: Change = lambda metadata: None, protocol: int = 4) -> None:
    """Copy a folder, with a changed `.metadata`."""
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    metadata = pickle.loads((source / METADATA).read_bytes())
    change(metadata)
    (target / METADATA).write_bytes(pickle.dumps(metadata, protocol))


def described(change: Change) -> Build:
    """A good folder with a changed `.metadata`."""

    def build(folder: Path) -> Path:
        rewrite(good(folder), folder, change)
        return folder

    return build


def changed(change: Callable[[Path], object]) -> Build:
    """A good folder with other changed files."""

    def build(folder: Path) -> Path:
        change(good(folder))
        return folder

    return build


def replaced(name: str, make: Callable[[Path], object]) -> Build:
    """A good folder with something else in place of a file."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return changed(change)


def entry(**values: Any) -> Build:
    """Another entry of KEY."""
    return described(lambda metadata: vars(metadata.state_dict_metadata[KEY]).update(values))


def size(*sizes: int) -> Any:
    return torch.Size(sizes)


def place(**values: Any) -> Build:
    """Another place of KEY."""

    def change(metadata: Any) -> None:
        vars(metadata.storage_data[MetadataIndex(KEY, size(0, 0, 0, 0))]).update(values)

    return described(change)


def block(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(size(*offsets), size(*sizes))


def chunks(*blocks: tuple[tuple[int, ...], tuple[int, ...]]) -> Build:
    """Other chunks of KEY, each with a place of its own that is large enough."""

    def change(metadata: Any) -> None:
        metadata.state_dict_metadata[KEY].chunks = [
            ChunkStorageMetadata(size(*at), size(*sizes)) for at, sizes in blocks
        ]
        whole = metadata.storage_data.pop(MetadataIndex(KEY, size(0, 0, 0, 0)))
        step = whole.length // len(blocks)
        for i, (at, _) in enumerate(blocks):
            info = replace(whole, offset=whole.offset + i * step, length=step)
            metadata.storage_data[MetadataIndex(KEY, size(*at))] = info

    return described(change)


class Call:
    """Calls a function when Python loads it."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.arguments


def runs(put: Callable[[Any, Call], object]) -> Build:
    """`.metadata` in which `put` puts a call that creates a file."""

    def build(folder: Path) -> Path:
        call = Call(os.system, f"touch {marker(folder)}")
        rewrite(good(folder), folder, lambda metadata: put(metadata, call))
        return folder

    return build


def in_chunk(make: Callable[[Path], bytes]) -> Build:
    """Other bytes in place of the file of KEY's chunk."""

    def build(folder: Path) -> Path:
        data = make(folder)

        def change(metadata: Any) -> None:
            info = metadata.storage_data[MetadataIndex(KEY, size(0, 0, 0, 0))]
            info.offset, info.length = (folder / FILE).stat().st_size, len(data)
            (folder / FILE).write_bytes(_files()[FILE] + data)

        rewrite(good(folder), folder, change)
        return folder

    return build


def _nested(depth: int) -> Any:
    value: Any = ()
    for _ in range(depth):
        value = (value,)
    return value


def _planned(path: Any, metadata: Any) -> None:
    metadata.planner_data[KEY] = path


def _put(data: bytes, path: Path) -> None:
    path.write_bytes(data)


def _cyclic(metadata: Any) -> None:
    metadata.state_dict_metadata[KEY] = metadata.state_dict_metadata


def _same_place(metadata: Any) -> None:
    """Many tensors of one chunk's bytes."""
    entry, at = metadata.state_dict_metadata[KEY], MetadataIndex(KEY, size(0, 0, 0, 0))
    for i in range(100):
        metadata.state_dict_metadata[f"x{i}"] = entry
        metadata.storage_data[MetadataIndex(f"x{i}", at.offset)] = metadata.storage_data[at]


def _in_tensor(metadata: Any) -> None:
    """A tensor under the name of another one."""
    name = f"{KEY}.x"
    metadata.state_dict_metadata[name] = metadata.state_dict_metadata.pop("image_encoder.neck.0.weight")
    metadata.planner_data[name] = (KEY, "x")


def refused() -> Iterator[tuple[str, Build, tuple[str, ...]]]:
    damaged = (f"{METADATA}: ",)
    for where, put in {
        "the plan": lambda metadata, call: setattr(metadata, "planner_data", call),
        "a tensor": lambda metadata, call: metadata.state_dict_metadata.update({KEY: call}),
        "a size": lambda metadata, call: setattr(metadata.state_dict_metadata[KEY], "size", call),
        "a place": lambda metadata, call: metadata.storage_data.update({call: call}),
        "a field that nothing reads": lambda metadata, call: setattr(metadata, "x", [call]),
    }.items():
        yield f"a call in {where}", runs(put), ("posix.system, ", "nothing of it was executed")
    yield (
        "a call in a chunk",
        in_chunk(lambda f: saved([sam()[KEY], Call(os.system, f"touch {marker(f)}")])),
        ("posix.system",),
    )
    gadget = Call(eval, "1")
    yield "eval", described(lambda metadata: setattr(metadata, "version", gadget)), ("builtins.eval",)

    # Sizes.
    peta = size(1 << 20, 1 << 30)
    yield "petabytes", entry(size=peta, chunks=[block((0, 0), peta)]), (*damaged, KEY, "has no place")
    yield "petabytes in a chunk", chunks(((0, 0, 0, 0), (1, 1 << 20, 1 << 30, 32))), (KEY, "bytes cannot hold a chunk")
    for name, sizes in {
        "negative": (-1, 4),
        "too large": (1 << 63, 4),
        "of text": ("1", 4),
        "of 65 dimensions": (1,) * 65,
    }.items():
        yield f"a size that is {name}", entry(size=sizes), (*damaged, "impossible shape", KEY)
    yield "a size that is a list", entry(size=[1, 2]), (*damaged, "impossible shape")
    yield (
        "another element type",
        entry(properties=replace(_properties(), dtype=torch.float16)),
        (FILE, KEY, "is float32", "says float16"),
    )
    yield (
        "a larger element type",
        entry(properties=replace(_properties(), dtype=torch.complex128)),
        (KEY, "cannot hold"),
    )
    yield "no element type", entry(properties=None), (KEY, "no element type")

    # Chunks of KEY, which is [1, n, n, c].
    _, n, _, c = sam()[KEY].shape
    top, bottom = ((0, 0, 0, 0), (1, 1, n, c)), ((0, 1, 0, 0), (1, n - 1, n, c))
    yield "no chunks", entry(chunks=[]), (KEY, "its chunks leave a gap")
    yield "no list of chunks", entry(chunks=7), (KEY, "no list of chunks")
    yield "a gap at the end", chunks(top), (KEY, "leave a gap")
    yield "a gap at the start", chunks(bottom), (KEY, "leave a gap")
    yield "a hole", chunks(top, ((0, 1, 0, 0), (1, n - 1, 1, c))), (KEY, "leave a gap")
    yield "chunks over each other", chunks(((0, 0, 0, 0), (1, 2, n, c)), bottom), (KEY, "overlap")
    yield (
        "a chunk twice",
        entry(chunks=[block((0, 0, 0, 0), (1, n, n, c))] * 2),
        (KEY, "overlap"),
    )
    yield "a chunk outside", chunks(top, ((0, 1, 0, 0), (1, n, n, c))), (KEY, "reach beyond its shape")
    yield "a chunk of other dimensions", chunks(((0, 0), (n, n))), (KEY, "a chunk of 2 dimensions, of 4")
    yield "a chunk at other offsets", entry(chunks=[block((0, 1, 0, 0), (1, n, n, c))]), (KEY, "no place")

    # Files.
    for name in (
        "../x.distcp",
        "/etc/x.distcp",
        "a/b.distcp",
        "a\\b.distcp",
        "C:x.distcp",
        "/etc/passwd",
        METADATA,
        "",
    ):
        yield f"the path {name}", place(relative_path=name), (KEY, repr(name), "not in a *.distcp file")
    yield "a path that is a number", place(relative_path=3), (KEY, "not in a *.distcp file")
    yield "a path of control characters", place(relative_path="\x1b[2J\n.distcp"), (KEY, "'\\x1b[2J\\n.distcp'")
    yield "a missing file", place(relative_path="__1_0.distcp"), (KEY, "'__1_0.distcp'", "is missing")
    yield "all files missing", changed(lambda f: (f / FILE).unlink()), (repr(FILE), "is missing")
    yield "a short file", changed(lambda f: os.truncate(f / FILE, 9999)), (FILE, "truncated")
    yield "an empty file", changed(lambda f: os.truncate(f / FILE, 0)), (FILE, "truncated")
    yield "a file of zeros", changed(lambda f: (f / FILE).write_bytes(bytes(len(_files()[FILE])))), (FILE, "torch.save")
    yield "a pipe", replaced(FILE, os.mkfifo), (FILE, "is a pipe")
    yield (
        "a device",
        replaced(FILE, lambda path: path.symlink_to("/dev/zero")),
        (FILE, "is a device"),
    )
    yield "a place outside", place(offset=1 << 40), (FILE, "truncated", KEY)
    yield "a place of exabytes", place(length=(1 << 63) - 1), (FILE, "truncated", KEY)
    yield "a negative place", place(offset=-1), (KEY, "impossible place")
    yield "a place of no bytes", place(length=0), (KEY, "0 bytes cannot hold")
    yield "a shifted place", place(offset=1), (FILE, "overlap")
    yield "many tensors of the same bytes", described(_same_place), (FILE, "overlap")
    yield "no places", described(lambda metadata: metadata.storage_data.clear()), ("has no place",)
    yield "places that are no dict", described(lambda m: setattr(m, "storage_data", [])), ("no dicts",)
    yield "a compressed chunk", place(transform_descriptors=["stream.zstd/1"]), (KEY, "compressed", "dcp_to_torch")

    # The files of chunks.
    yield "a chunk of another shape", in_chunk(lambda f: saved(torch.zeros(1, c, n, n))), (FILE, KEY, METADATA)
    yield (
        "a chunk that is repeated",
        in_chunk(lambda f: saved(torch.zeros(1).expand(1, n, n, c))),
        (KEY, "repeats"),
    )
    yield "a chunk that is a dict", in_chunk(lambda f: saved({KEY: sam()[KEY]})), (KEY, "no tensor")
    yield "a chunk that is sparse", in_chunk(lambda f: saved(sam()[KEY].to_sparse())), (KEY, "sparse")
    yield "a legacy chunk", in_chunk(lambda f: saved(sam()[KEY], zip=False)), (KEY, "torch.save")
    unnamed = saved(sam()[KEY]).replace(b"/data.pkl", b"/dat\0.pkl")
    yield "a chunk without data.pkl", in_chunk(lambda f: unnamed), (FILE, "no member data.pkl")
    yield "a chunk in safetensors", in_chunk(lambda f: safetensors.torch.save({KEY: sam()[KEY]})), (KEY, "torch.save")
    yield "a folder of safetensors", _of_safetensors, (FILE, "SerializationFormat.SAFETENSORS", "model.safetensors")

    # Names and nesting.
    plan = {
        "the path of another tensor": ("image_encoder", "x"),
        "an empty path": (),
        "a path of 100,000 keys": ("a",) * 100_000,
        "a path of tuples": (_nested(900),),
        "a path that is text": KEY,
    }
    for name, path in plan.items():
        yield name, described(functools.partial(_planned, path)), (KEY, "keys of")
    yield "a tensor in a tensor", described(_in_tensor), (KEY,)
    yield "a cycle", described(_cyclic), ("expected an object of TensorStorageMetadata",)
    yield "a long name", described(lambda m: m.state_dict_metadata.update({"x" * 20_000: 1})), ("an impossible name",)
    yield "a name that is a number", described(lambda m: m.state_dict_metadata.update({7: 1})), ("an impossible name",)
    steers = "\x1b[2J\n::error::"
    yield "a name that steers terminals", described(lambda m: m.state_dict_metadata.update({steers: 1})), damaged
    yield "an optimizer alone", functools.partial(write, value={"optim": {"x": torch.ones(2)}}), ("an optimizer alone",)

    # `.metadata` as a whole.
    for name, data in {
        "nothing": b"",
        "text": b"not a pickle",
        "a number": pickle.dumps(3),
        "a dict": pickle.dumps({KEY: 1}),
        "half": _files()[METADATA][:2000],
        "lists in lists": b"(" * 100_000,
        "a million lists": b"\x80\x02(" + b"]" * 1_000_000 + b"t.",
    }.items():
        yield f"{METADATA} of {name}", replaced(METADATA, functools.partial(_put, data)), (METADATA,)
    yield f"{METADATA} of a gigabyte", changed(lambda f: os.truncate(f / METADATA, 1 << 30)), (METADATA, "the limit is")
    yield f"no {METADATA}", changed(lambda f: (f / METADATA).unlink()), ("lacks .metadata", "was not finished")
    yield f"a folder for {METADATA}", replaced(METADATA, Path.mkdir), ("lacks",)
    ranks = changed(lambda f: (f / METADATA).rename(f / f"__0{METADATA}"))
    yield "the metadata of each rank", ranks, ("use_collectives",)


def _properties() -> Any:
    return pickle.loads(_files()[METADATA]).state_dict_metadata[KEY].properties


def _of_safetensors(folder: Path) -> Path:
    state = {name: tensor.contiguous() for name, tensor in sam().items()}
    return write(folder, state, serialization_format=SerializationFormat.SAFETENSORS)


def _with_objects(metadata: Any) -> None:
    metadata.extra = Call(deque, (1, 2))


LEGAL: dict[str, tuple[Build, tuple[str, ...]]] = {
    "good": (good, ()),
    "one file a tensor": (functools.partial(write, value=sam(), single_file_per_rank=False), ()),
    "two threads": (functools.partial(write, value=sam(), thread_count=2), ()),
    "without a plan": (described(lambda metadata: setattr(metadata, "planner_data", None)), ()),
    "another file": (changed(lambda f: (f / "__9_9.distcp").write_bytes(b"x")), ()),
    "a folder that is nested": (
        functools.partial(write, value={"app": {"model": sam()}, "step": 1, "t": [1, "x"]}),
        (),
    ),
    "an optimizer": (
        functools.partial(write, value={"model": sam(), "optim": {"state": {"x": {"exp_avg": torch.ones(3)}}}}),
        ("left out 1 tensors of optimizer states",),
    ),
    "objects of other classes": (described(_with_objects), ("not imported or run: collections.deque",)),
}

CASES = [
    *(Case(f"dcp: {name}", build, Accepted(sam, words)) for name, (build, words) in LEGAL.items()),
    *(Case(f"dcp: {name}", build, Refused(words)) for name, build, words in refused()),
]

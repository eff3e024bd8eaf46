"""Fuzz targets: functions that read an input as the program does, including the data of every accepted tensor.

A target may raise DsocrError only. Targets do not import torch, which takes seconds: readers do not need it.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

from memory_file import Memory

from converter.api import inspect
from converter.checkpoint.open import Checkpoint, open_checkpoint
from converter.checkpoint.state_dict import state_dicts, unwrapped_names, without_common_prefixes
from converter.errors import DsocrError
from converter.formats import (
    gguf,
    pickle_reader,
    safetensors,
    torch_contents,
    torch_dcp,
    torch_legacy,
    torch_pickle,
    torch_zip,
    torchscript,
    zip_directory,
)
from converter.formats import registry as formats_registry
from converter.formats.torch_pickle import StorageRef
from converter.layouts import registry
from converter.layouts.detect import select_state_dicts
from converter.layouts.registry import load_mapping_file
from converter.options import ConvertOptions
from converter.output.pretrained import LAYOUTS
from converter.output.pretrained_config import config_files
from converter.plan.plan import Plan, make_plan
from converter.plan.planner import resolve
from converter.storage.byte_range import Storage
from converter.storage.stream import Copier
from converter.tensors.dtypes import BY_NAME
from converter.tensors.lazy_tensor import byte_ranges, lazy_read, stored_parts
from converter.tensors.tensor_info import Contents, TensorInfo, contiguous_strides
from fuzzing import mutators
from fuzzing.mutators import Mutator

# Bytes of tensor data that are read of one input.
MAX_DATA = 4 << 20

# The shards next to an index.
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


class Target(NamedTuple):
    """A target.

    Attributes:
        run: Reads an input: the bytes or, with `file`, the path of a file that contains them.
        mutate: Derives an input from another one and keeps its structure valid.
        file: Name of the file; empty to pass bytes.
    """

    run: Callable[[Any], object]
    mutate: Mutator = mutators.plain
    file: str = ""


def prepare(folder: Path) -> None:
    """Cache what the program loads in every run, and write the files that inputs may refer to into `folder`."""
    formats_registry.plugins = lambda: iter(())
    for name in registry.layout_names():
        registry.load(name)
    _known()
    for name in SHARDS:
        (folder / name).write_bytes(mutators.safetensors_file({name[:11]: ("F32", [2])}))


# ---- contents that a reader accepted


def use(contents: Contents) -> None:
    """Read every tensor, find state dicts and remove common prefixes, as the commands do."""
    copier = Copier(lambda full: memoryview(full.obj), lambda count: None)
    left = MAX_DATA
    for tensor in _tensors(contents):
        check(tensor)
        left -= tensor.storage.length + tensor.storage.size
        if left >= 0:
            _read(tensor, copier)
    for found in state_dicts(contents):
        inspect.group_layers(found.tensors, {})
        for _ in without_common_prefixes(unwrapped_names(found.tensors, "input"), "input"):
            pass


def _tensors(contents: Contents) -> Iterator[TensorInfo]:
    for value in contents.values():
        if isinstance(value, TensorInfo):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value)


def check(tensor: TensorInfo) -> None:
    """Check what the rest of the program relies on."""
    assert type(tensor.key) is str and len(tensor.shape) == len(tensor.strides)
    assert min((tensor.byte_offset, *tensor.shape, *tensor.strides)) >= 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    if 0 not in tensor.shape:
        assert tensor.byte_offset + (last + 1) * tensor.dtype.itemsize <= tensor.storage.size


def _read(tensor: TensorInfo, copier: Copier) -> None:
    byte_ranges(lazy_read(tensor))
    for part in stored_parts(tensor):
        check(part)
        segments = byte_ranges(lazy_read(part))
        if segments is None:
            assert len(part.storage.read()) == part.storage.size
        else:
            copier.copy(segments)


# ---- the readers


def _loaded(loader: formats_registry.Loader) -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        file = Memory(data)
        if loader.can_read(file):
            use(loader.load(file))

    return run


def container(data: bytes) -> None:
    """A file of any format."""
    _, contents = formats_registry.open_file(Memory(data))
    use(contents)


def dcp(data: bytes) -> None:
    """A DCP folder, as `mutators.dcp_parts` splits the bytes."""
    metadata, chunks = mutators.dcp_parts(data)
    use(torch_dcp.load(Memory(metadata), {f"__{rank}_0.distcp": Memory(chunks) for rank in range(2)}))


def pickle(data: bytes) -> None:
    """A pickle of a state dict, with all storages present."""
    file = Memory(b"")

    def storage(ref: StorageRef) -> Storage:
        return Storage(file, (0, ref.nbytes), ref.nbytes, ref.nbytes, ref.key)

    value, end = pickle_reader.unpickle(data, "input", torch_pickle.TorchGlobals(), torch_pickle.storage_ref)
    assert 0 < end <= len(data)
    for tensor in _tensors(torch_contents.contents_of(file, value, storage)):
        check(tensor)


def zip_members(data: bytes) -> None:
    """A zip archive, of which every member is read."""
    file = Memory(data)
    if not zip_directory.is_zip(file):
        return
    left = MAX_DATA
    for storage in zip_directory.read_directory(file).values():
        left -= storage.length + storage.size
        if left >= 0:
            with suppress(DsocrError):
                assert len(storage.read()) == storage.size


# ---- mappings, plans, indexes, records


@functools.cache
def _known() -> dict[str, list[dict[str, TensorInfo]]]:
    """Tensors to apply mappings to: two layers of each real checkpoint, by family."""
    found: dict[str, list[dict[str, TensorInfo]]] = {family: [] for family in registry.families()}
    for name, text in inventories().items():
        found[next((family for family in registry.families() if family in name), "sam")].append(
            dict(_described(json.loads(text)))
        )
    return found


def inventories() -> dict[str, str]:
    """Two layers of each real checkpoint as inputs of the target `plan`."""
    from inventories import inventories

    def few(key: str) -> bool:
        return all(not part.isdigit() or int(part) < 2 for part in key.split("."))

    return {
        name: json.dumps({key: entry for key, entry in inventory.items() if few(key)}, indent=0)
        for name, inventory in inventories().items()
    }


def mapping(path: Path) -> None:
    """A mapping file, applied to tensors of its family."""
    found = load_mapping_file(path)
    hub = registry.canonical(found.family)
    for prefix in found.prefixes:
        for tensors in _known()[found.family]:
            with suppress(DsocrError):
                values = {name: lazy_read(tensor) for name, tensor in tensors.items()}
                _use_plan(make_plan(found, prefix, hub, values, "input"))


def plan(data: bytes) -> None:
    """Names, dtypes and shapes as JSON: detected, and planned with one of several options."""
    try:
        contents: Contents = dict(_described(json.loads(data)))
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return
    opened = Checkpoint(name="input", files=(Memory(b""),), containers=("safetensors",), contents=contents)
    with suppress(DsocrError):
        candidates = select_state_dicts(opened, None)
        inspect._inspect(opened, candidates, candidates[0], {}).to_json()
    options = _OPTIONS[len(data) % len(_OPTIONS)]
    found = resolve(opened, options, None)
    _use_plan(found.plan)
    if options.to in LAYOUTS:
        config_files(found.plan, options.full_model, {})


_OPTIONS = [
    *(ConvertOptions(family, dtype=dtype) for family in registry.families() for dtype in ("keep", "float16")),
    ConvertOptions("clip", image_size=336),
    *(ConvertOptions(family, to=name) for family in registry.families() for name in registry.names_of_family(family)),
    *(ConvertOptions(family, to=f"{family}-hf", full_model=True) for family in registry.families()),
    ConvertOptions("sam", to="sam-meta"),
]


def _described(document: Any) -> Iterator[tuple[str, TensorInfo]]:
    """Tensors of these names, dtypes and shapes; ValueError where a container reader would refuse them."""
    file = Memory(b"")
    for key, (dtype, shape) in document.items():
        if not all(type(size) is int and size >= 0 for size in shape) or len(shape) > 64:
            raise ValueError
        nbytes = math.prod(shape) * BY_NAME[dtype].itemsize
        # Larger than any disk.
        if nbytes >= 1 << 50:
            raise ValueError
        storage = Storage(file, (0, nbytes), nbytes, nbytes, key)
        yield key, TensorInfo(key, BY_NAME[dtype], tuple(shape), storage, 0, contiguous_strides(tuple(shape)))


def _use_plan(plan: Plan) -> None:
    assert plan.nbytes >= 0
    for value in plan.outputs.values():
        byte_ranges(value)


def index(path: Path) -> None:
    """The index of a sharded checkpoint, and its shards."""
    with closing(open_checkpoint(path)) as opened:
        use(opened.contents)


def record_file(path: Path) -> None:
    """A conversion record as `dsocr-verify --record` reads it."""
    # Imports torch.
    from converter.verification.record_check import read_record

    _ = read_record(path).is_canonical


TARGETS: dict[str, Target] = {
    "safetensors": Target(_loaded(safetensors), mutators.safetensors),
    "gguf": Target(_loaded(gguf), mutators.gguf),
    "torch-zip": Target(_loaded(torch_zip), mutators.archive),
    "torch-legacy": Target(_loaded(torch_legacy), mutators.pickle),
    "torchscript": Target(_loaded(torchscript), mutators.archive),
    "dcp": Target(dcp, mutators.dcp),
    "container": Target(container),
    "pickle": Target(pickle, mutators.pickle),
    "zip": Target(zip_members, mutators.archive),
    "mapping": Target(mapping, mutators.lines, "mapping.yaml"),
    "plan": Target(plan, mutators.json_document),
    "index": Target(index, mutators.json_document, "model.safetensors.index.json"),
    "record": Target(record_file, mutators.json_document, "record.json"),
}

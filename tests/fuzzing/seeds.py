"""Writes the seeds, the first inputs of fuzzing.

Seeds are tiny checkpoints that torch and safetensors write in every format, the built-in mappings, the tensor names of
real checkpoints, and the hostile corpus.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from hostile import ggufs

import converter
from converter.layouts import registry
from fuzzing import targets
from fuzzing.mutators import dcp_input, members_of, packed

MAX_INPUT = 64 << 10  # bytes

Seeds = dict[str, list[bytes]]


def states() -> list[dict[Any, Any]]:
    """Small state dicts with all dtypes and kinds of strides."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    types = [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool]
    shared = torch.arange(12.0)
    return [
        {"weight": base.clone(), "bias": torch.ones(3)},
        {"model": OrderedDict(a=base, b=base.t(), c=base[1:3, ::2]), "epoch": 3, "lr": 0.1, "name": "x", "none": None},
        {f"{dtype}".split(".")[1]: torch.zeros(3).to(dtype) for dtype in types},
        {"a": shared[:5], "b": shared[5:], "whole": shared, "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.0)},
        {"p": torch.nn.Parameter(base.clone()), "wide": torch.ones(1).expand(2, 3), 7: torch.ones(2), "s": {1, 2}},
        {"module.x.weight": torch.ones(2, 2), "module._orig_mod.y": torch.ones(2), "text": b"bytes", "t": (1, [2.5])},
        _few(_models().sam_meta()),
    ]


def _models() -> Any:
    # Lazy: it imports the libraries that define the layouts.
    return import_module("models")


def _few(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a model with each dimension cut to two."""
    state = model.state_dict()
    return {name: tensor[tuple(slice(2) for _ in tensor.shape)].clone() for name, tensor in state.items()}


def saved(value: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


class _Module(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(3, 2)
        self.norm = torch.nn.BatchNorm1d(2)
        self.register_buffer("extra", torch.ones(2, dtype=torch.float16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(self.inner(x)) * self.extra
        return result


def scripted() -> list[bytes]:
    found = []
    jit: Any = torch.jit  # its functions have no types
    for module in (jit.script(_Module().eval()), jit.trace(_Module().eval(), torch.ones(1, 3))):
        buffer = io.BytesIO()
        jit.save(module, buffer)
        found.append(buffer.getvalue())
    return found


def seeds() -> Seeds:
    """Inputs by target."""
    zips = [saved(state) for state in states()]
    legacy = [saved(state, _use_new_zipfile_serialization=False) for state in states()]
    legacy += [
        saved(states()[1], _use_new_zipfile_serialization=False, pickle_protocol=protocol) for protocol in (0, 4)
    ]
    plain = [
        {key: value.contiguous().clone() for key, value in state.items() if isinstance(value, torch.Tensor)}
        for state in states()
    ]
    tables = [safetensors.torch.save({str(key): value for key, value in state.items()}) for state in plain]
    tables.append(safetensors.torch.save({"x": torch.ones(2)}, {"format": "pt"}))
    scripts = scripted()
    deflated = [packed([(name, data, 8) for name, data, _ in members_of(file)]) for file in (*zips[:3], *scripts)]
    return {
        "safetensors": tables,
        "gguf": _ggufs([plain[0], plain[-1]]),
        "torch-zip": zips + [file for file in deflated if b"constants.pkl" not in file],
        "torch-legacy": legacy,
        "torchscript": scripts + [file for file in deflated if b"constants.pkl" in file],
        "dcp": [_dcp(state) for state in states()],
        "container": [tables[0], zips[0], legacy[0], scripts[0], b"version https://git-lfs", b"<html>", b"\x1f\x8b"],
        "pickle": [data for file in zips for name, data, _ in members_of(file) if name.endswith("data.pkl")],
        "zip": [*zips[:2], *deflated, packed([("a/b", b"data", 0)])],
        "mapping": [registry.yaml_text(name).encode() for name in registry.layout_names()],
        "plan": [text.encode() for text in targets.inventories().values()],
        "index": [json.dumps(document).encode() for document in _indexes()],
        "record": _records(),
    }


def _dcp(state: dict[Any, Any]) -> bytes:
    """A folder of torch.distributed.checkpoint, in which two tensors of two rows are the parts of another one."""
    from hostile import dcp

    def joined(metadata: Any) -> None:
        entry = metadata.state_dict_metadata["x"]
        entry.chunks.append(dcp.block((2, 0), (2, 3)))
        entry.size = dcp.size(4, 3)
        index = dcp.MetadataIndex("rest", dcp.size(0, 0))
        metadata.storage_data[dcp.MetadataIndex("x", dcp.size(2, 0))] = metadata.storage_data.pop(index)
        del metadata.state_dict_metadata["rest"]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        source = {str(key): value for key, value in state.items()}
        dcp.write(
            path, {"model": source, "x": torch.ones(2, 3), "rest": torch.ones(2, 3), "optim": {"y": torch.ones(1)}}
        )
        dcp.rewrite(path, path, joined)
        return dcp_input((path / dcp.METADATA).read_bytes(), (path / dcp.FILE).read_bytes())


def _ggufs(states: list[dict[Any, torch.Tensor]]) -> list[bytes]:
    files = [ggufs.written(ggufs.described(state), ggufs.every_value()) for state in states]
    return [*files, ggufs.written([ggufs.Described(b"x", (64, 2), 8, bytes(136))], version=2)]


def _indexes() -> list[object]:
    return [
        {"metadata": {"total_size": 16}, "weight_map": {shard[:11]: shard for shard in targets.SHARDS}},
        {"weight_map": {"model-00001": targets.SHARDS[0]}},
        {"weight_map": {"x": "../x.safetensors"}},
    ]


def _records() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        safetensors.torch.save_file(_models().clip_hf_vision().state_dict(), path / "x.safetensors")
        converter.convert(path / "x.safetensors", "clip", out=path / "out.safetensors", record=path / "record.json")
        return [(path / "record.json").read_bytes()]


def hostile() -> Iterator[bytes]:
    """The files of the hostile corpus. Large files are included: a pickle inside of one may be small."""
    for path in sorted((Path(__file__).parent.parent / "hostile").glob("*.py")):
        for case in getattr(import_module(f"hostile.{path.stem}"), "CASES", ()):
            with tempfile.TemporaryDirectory() as folder:
                inside = Path(folder, "in")
                inside.mkdir()
                case.build(inside)
                for file in sorted(inside.rglob("*")):
                    if file.is_file() and not file.is_symlink() and file.stat().st_size <= 16 * MAX_INPUT:
                        yield file.read_bytes()


# The targets that a file of the corpus is a seed of.
_KINDS: tuple[tuple[Callable[[bytes], bool], tuple[str, ...]], ...] = (
    (lambda data: data[:1] == b"\x80" and b"torch.distributed.checkpoint" in data, ("dcp", "container")),
    (lambda data: data[8:9] == b"{", ("safetensors", "container")),
    (lambda data: data[:4] == b"GGUF", ("gguf", "container")),
    (lambda data: data[:2] == b"PK" and b"constants.pkl" in data, ("torchscript", "zip")),
    (lambda data: data[:2] == b"PK", ("torch-zip", "zip")),
    (lambda data: data[:1] in (b"\x80", b"L"), ("torch-legacy", "container")),
    (lambda data: b"weight_map" in data, ("index",)),
    (lambda data: b"detect" in data or b"layout" in data, ("mapping",)),
    (lambda data: True, ("container",)),
)


def _pickles(data: bytes) -> list[bytes]:
    """The pickles in a zip archive, if Python can read it."""
    with contextlib.suppress(Exception):
        return [held for name, held, _ in members_of(data) if name.endswith("data.pkl")]
    return []


def write(folder: Path, corpus: bool = True) -> None:
    """Write the seeds of each target to FOLDER/<target>/<digest>, with or without the hostile corpus."""
    with warnings.catch_warnings():
        # torch deprecates TorchScript.
        warnings.simplefilter("ignore")
        found, files = seeds(), list(hostile()) if corpus else []
    for data in files:
        names = next(names for fits, names in _KINDS if fits(data))
        for name in names:
            # Without the file of chunks, which is large in the corpus.
            found[name].append(dcp_input(data, b"") if name == "dcp" else data)
        found["pickle"] += _pickles(data)
    for name, inputs in found.items():
        own = folder / name
        own.mkdir(parents=True, exist_ok=True)
        for data in inputs:
            if len(data) <= MAX_INPUT:
                (own / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
        print(f"{name}: {len(list(own.iterdir()))} inputs")

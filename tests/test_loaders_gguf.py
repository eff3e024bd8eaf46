"""The reader of GGUF, compared with the package gguf, and tried on hostile files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
from hostile import ggufs, tensorfiles
from hostile.case import sam
from loaders_oracle import opened, raw, to_torch
from memory_file import Memory

import converter
from converter.errors import ContainerError, DsocrError
from converter.formats import gguf as loader


@pytest.fixture(scope="module")
def library() -> Any:
    return pytest.importorskip("gguf")


def test_types_are_those_of_the_library(library: Any) -> None:
    types = library.GGMLQuantizationType
    sizes = {number: size for number, size in library.GGML_QUANT_SIZES.items() if number in loader._QUANTISED}
    assert {types(n).name: sizes[n] for n in sizes} == {
        n: (size, nbytes) for n, size, nbytes in loader._QUANTISED.values()
    }
    plain = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
    assert {
        kind: plain.get(kind.name, kind.name.replace("I", "int")) for kind in types if kind not in sizes
    } == loader._PLAIN


def test_agrees_with_the_library(library: Any, tmp_path: Path) -> None:
    path, kinds = tmp_path / "x.gguf", library.GGMLQuantizationType
    writer = library.GGUFWriter(path, "clip")
    writer.add_array("tokens", ["a", "b"])
    writer.add_custom_alignment(64)
    numbers = numpy.arange(64, dtype=numpy.float32).reshape(1, 2, 32)
    for kind in (numpy.float32, numpy.float16, numpy.float64, numpy.int8, numpy.int16, numpy.int32, numpy.int64):
        writer.add_tensor(kind.__name__, numbers.astype(kind))
    for kind in (kinds.BF16, kinds.Q8_0, kinds.Q4_0):
        writer.add_tensor(kind.name, library.quants.quantize(numbers, kind), raw_dtype=kind)
    writer.add_tensor("odd", numpy.ones(3, numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = opened(path, "GGUF")
    theirs = {tensor.name: tensor for tensor in library.GGUFReader(path).tensors}
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].shape == tuple(reversed(tensor.shape.tolist()))
        assert ours[name].nbytes == tensor.n_bytes
        assert ours[name].storage.read() == tensor.data.tobytes()
    assert raw(to_torch(ours["BF16"])) == theirs["BF16"].data.tobytes()
    assert {name: ours[name].dtype.name for name in ("BF16", "Q8_0", "int64")} == {
        "BF16": "bfloat16", "Q8_0": "Q8_0", "int64": "int64",
    }  # fmt: skip


@pytest.mark.parametrize("name", ggufs.LEGAL)
def test_legal_files_are_converted(name: str, tmp_path: Path) -> None:
    (tmp_path / "in.gguf").write_bytes(ggufs.LEGAL[name]())
    converter.convert(tmp_path / "in.gguf", "sam", out=tmp_path / "out.safetensors")
    safetensors.torch.save_file(sam(), tmp_path / "like.safetensors")
    converter.convert(tmp_path / "like.safetensors", "sam", out=tmp_path / "wanted.safetensors")
    data = [safetensors.torch.load_file(tmp_path / f"{file}.safetensors") for file in ("out", "wanted")]
    assert {n: raw(t) for n, t in data[0].items()} == {n: raw(t) for n, t in data[1].items()}


@pytest.mark.parametrize("name", ggufs.REFUSED)
def test_hostile_files_are_refused(name: str, tmp_path: Path) -> None:
    make, words = ggufs.REFUSED[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(make())
    with pytest.raises(DsocrError) as caught:
        converter.convert(path, "sam", out=tmp_path / "out.safetensors")
    assert caught.value.exit_code == 3 and caught.value.hint
    for word in (str(path), *words):
        assert word in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


def test_every_truncation_is_refused() -> None:
    data = ggufs.written([ggufs.Described(b"a", (3,), 0, bytes(12)), ggufs.Described(b"b", (8,), 0, bytes(32))])
    assert list(loader.load(Memory(data))) == ["a", "b"]
    for end in range(4, len(data)):
        with pytest.raises(ContainerError, match="truncated"):
            loader.load(Memory(data[:end]))


def test_inspect_lists_quantised_tensors(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(ggufs.quantised("mm.weight")())
    inspection = converter.inspect(tmp_path / "x.gguf")
    group = next(group for group in inspection.groups if group.name == "mm.weight")
    assert (group.dtypes, group.shapes, group.nbytes) == (["Q8_0"], [[2, 64]], 136)
    assert inspection.dtypes["Q8_0"] == 1 and inspection.containers == ["GGUF"]
    # The encoder does not need it.
    assert inspection.layouts[0].record is not None


def test_verification_reads_with_the_library(library: Any, tmp_path: Path) -> None:
    source, out = tmp_path / "x.gguf", tmp_path / "out.safetensors"
    source.write_bytes(ggufs.written(ggufs.described(tensorfiles.mixed())))
    converter.convert(source, "sam", out=out)
    assert converter.verify(out, source, fast=True).ok
    data = bytearray(source.read_bytes())
    data[loader.load(Memory(bytes(data)))[ggufs.KEY].storage.offset] ^= 1
    source.write_bytes(data)
    assert not converter.verify(out, source, fast=True).ok


def test_the_hint_for_quantised_weights_works(library: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(ggufs.quantised("mm.weight")())
    (tensor,) = [tensor for tensor in library.GGUFReader(path).tensors if tensor.name == "mm.weight"]
    assert library.quants.dequantize(tensor.data, tensor.tensor_type).shape == (2, 64)

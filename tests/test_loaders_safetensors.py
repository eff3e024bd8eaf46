from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hostile import tensorfiles
from hostile.case import Accepted, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders_oracle import DTYPES, assert_same, opened
from safetensors import SafetensorError

from converter.errors import ContainerError
from converter.formats import safetensors as loader
from converter.storage.local_file import LocalFile


def written(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_agrees_with_the_library(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(7.0), "empty": torch.empty(0, 3), "a.b.weight": torch.randn(3, 1, 2)}
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    ours, theirs = opened(path, "safetensors"), safetensors.torch.load_file(path)
    assert_same({key: ours[key] for key in sorted(ours)}, {key: theirs[key] for key in sorted(theirs)})
    assert all(tensor.is_raw_contiguous for tensor in ours.values())


def test_padded_header_and_no_tensors(tmp_path: Path) -> None:
    assert opened(written(tmp_path / "x", b"{}      "), "safetensors") == {}


BAD: dict[str, tuple[Any, bytes, str]] = {
    "overlap": ({"a": entry(), "b": entry(offsets=(0, 4))}, bytes(4), "overlaps"),
    "partial overlap": ({"a": entry(shape=[2], offsets=(0, 8)), "b": entry(offsets=(4, 8))}, bytes(8), "overlaps"),
    "hole": ({"a": entry(), "b": entry(offsets=(8, 12))}, bytes(12), "gap"),
    "late start": ({"a": entry(offsets=(4, 8))}, bytes(8), "gap"),
    "truncated": ({"a": entry()}, bytes(3), "truncated"),
    "left over": ({"a": entry()}, bytes(5), "extra bytes"),
    "size": ({"a": entry(shape=[2])}, bytes(4), "does not take 4 bytes"),
    "backwards": ({"a": entry(offsets=(4, 0))}, bytes(4), "does not take"),
    "negative": ({"a": entry(shape=[-1, -1])}, bytes(4), "integers"),
    "huge": ({"a": entry(shape=[2**62, 2**62])}, bytes(4), "does not take"),
    "bool": ({"a": entry(shape=[True])}, bytes(4), "integers"),
    "float": ({"a": entry(shape=[1.0])}, bytes(4), "integers"),
    "three offsets": ({"a": entry(offsets=(0, 4, 4))}, bytes(4), "3 data_offsets"),
    "dimensions": ({"a": entry(shape=[1] * 65)}, bytes(4), "65 dimensions"),
    "dtype": ({"a": entry("F7", offsets=(0, 8))}, bytes(8), "dtype 'F7'"),
    "dtype type": ({"a": entry(dtype=[])}, bytes(4), "dtype"),  # type: ignore[arg-type]
    "fields": ({"a": {"dtype": "F32"}}, b"", "is not described"),
    "entry": ({"a": 3}, b"", "is not described"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "doubled": (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":3}', bytes(4), "duplicate name 'a'"),
    "not json": (b"{]", b"", "cannot be read"),
    "not utf-8": (b'{"\xff": 1}', b"", "cannot be read"),
    "deep": (b'{"a":' + b"[" * 100_000, b"", "cannot be read"),
    "digits": (b'{"a":' + b"1" * 10_000 + b"}", b"", "cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_headers(name: str, tmp_path: Path) -> None:
    header, data, message = BAD[name]
    path = written(tmp_path / "x", header, data)
    with pytest.raises(ContainerError, match=message):
        opened(path, "safetensors")
    if name not in ("dimensions", "doubled"):  # the library knows no limit, and takes the last one
        with pytest.raises(SafetensorError):
            safetensors.torch.load_file(path)


@pytest.mark.parametrize(("length", "message"), [((32 << 20) + 1, "the limit is 33554432"), (32 << 20, "truncated")])
def test_header_length(length: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match=message):
        opened(written(tmp_path / "x", b"{}", b"", length), "safetensors")


def test_every_truncation(tmp_path: Path) -> None:
    path = tmp_path / "x"
    safetensors.torch.save_file({"a": torch.ones(2), "b": torch.ones(3)}, path)
    data = path.read_bytes()
    for end in range(len(data)):
        path.write_bytes(data[:end])
        with pytest.raises(ContainerError):
            opened(path, "safetensors")


@settings(max_examples=80, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 255)), min_size=1, max_size=3))
def test_mutated_files(changes: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory) -> None:
    data = bytearray(safetensors.torch.save({"a": torch.ones(2), "b": torch.ones(3)}))
    for at, value in changes:
        data[at % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "mutated"
    path.write_bytes(data)
    try:
        ours = loader.load(LocalFile(path))
    except ContainerError:
        return
    assert sorted(ours) == sorted(safetensors.torch.load_file(path))


@pytest.mark.parametrize("case", tensorfiles.CASES, ids=lambda case: case.name)
def test_hostile_files_are_accepted_like_the_library_accepts_them(case: Case, tmp_path: Path) -> None:
    """Accepts the files that the library accepts, except for `LENIENT` and `STRICT`."""
    path = case.build(tmp_path)
    try:
        safetensors.torch.load_file(str(path))
        accepted = True
    except (SafetensorError, KeyError, TypeError):  # types and sizes that torch lacks
        accepted = False
    read = isinstance(case.expected, Accepted) or case.expected.words[0].startswith(tensorfiles.UNKNOWN)
    assert accepted == ((read or case.name in tensorfiles.LENIENT) and case.name not in tensorfiles.STRICT)

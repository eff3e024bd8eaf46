from __future__ import annotations

import gzip
import importlib.metadata
import io
import json
import pickle
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from loaders_oracle import opened

from converter.errors import ContainerError
from converter.formats.registry import GROUP, open_file
from converter.storage.local_file import LocalFile


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return buffer.getvalue()


def tarred(name: str, format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        info = tarfile.TarInfo(name)
        info.mtime = 1485049680.5  # In PAX, a fraction takes a header of its own.
        archive.addfile(info)
    return buffer.getvalue()


def exported() -> bytes:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), buffer)
    return buffer.getvalue()


def numpy_file() -> bytes:
    buffer = io.BytesIO()
    numpy.save(buffer, numpy.ones(2))
    return buffer.getvalue()


UNKNOWN = {
    "empty": (b"", "an empty file"),
    "zeros": (bytes(5000), "zeros only"),
    "html": (b"\n<!DOCTYPE html><html>", "a web page"),
    "html without doctype": (b"<HTML><head>", "a web page"),
    "xml": (b"<?xml version='1.0'?><Error>", "XML"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "git lfs pull"),
    "gzip": (gzip.compress(b"x"), "gzip"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(50), "7z"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5"),
    "numpy": (numpy_file(), "numpy"),
    "npz": (zipped("a.npy", "b/c.npy"), "numpy.load"),
    "torch.export": (exported(), "torch.export.load"),
    "torch.export of torch 2.5": (zipped("serialized_exported_program.json", "version"), "torch.export.load"),
    "TorchScript of torch 1.0": (zipped("x/version", "x/model.json", "x/tensors/0"), "TorchScript of torch 1.0 to 1.3"),
    "Keras": (zipped("metadata.json", "model.weights.h5"), "Keras"),
    "Flax": (b"\x82\xabtext_model\x81" + bytes(50), "Flax"),
    "large Flax": (b"\xde\x01\0\xd9\x26vision" + bytes(50), "Flax"),
    "TensorFlow Lite": (b"\x1c\0\0\0TFL3" + bytes(50), "TensorFlow Lite"),
    "TensorFlow": (b"\x08\x01\x12\x90\x02" + bytes(50), "SavedModel"),
    "TensorRT": (b"ftrt" + bytes(50), "TensorRT"),
    "RKNN": (b"RKNN" + bytes(50), "RKNN"),
    "ncnn": (b"7767517\n75 83\n", "ncnn"),
    "OpenVINO": (b'<?xml version="1.0"?>\n<net name="m" version="11">', "OpenVINO"),
    "an image": (b"\x89PNG\r\n\x1a\n", "an image"),
    "Parquet": (b"PAR1" + bytes(50), "data set"),
    "ExecuTorch": (b"\x30\0\0\0ET12" + bytes(50), "ExecuTorch"),
    "ONNX": (b"\x08\x08\x12\x07pytorch" + bytes(50), "ONNX"),
    "ONNX without a producer": (b"\x08\x0a\x3a\x90\x02" + bytes(50), "ONNX"),
    "ggml": ((0x67676D6C).to_bytes(4, "little") + bytes(50), "ggml"),
    **{f"pickle of protocol {n}": (pickle.dumps({"a": 1}, n), "pickle.load") for n in range(6)},
    **{
        f"pickle of arrays in protocol {number}": (
            pickle.dumps({"model": {"a": numpy.ones(2)}}, number),
            r"numpy arrays.*\n.*torch.save\(\{k: torch.as_tensor",
        )
        for number in range(6)
    },
    "pickle of an object in protocol 0": (pickle.dumps(io.StringIO, 0), "not one that torch.save wrote"),
    "json": (json.dumps({"weight_map": {}}).encode(), "JSON"),
    "json list": (b"[1]", "JSON"),
    "zip": (zipped("a/b.txt"), "not one that torch.save"),
    "tar": (tarred("model/a.txt"), "a tar archive"),
    "old torch": (tarred("sys_info"), "before 0.1.10"),
    "old torch in PAX": (tarred("sys_info", tarfile.PAX_FORMAT), "before 0.1.10"),
    "tar in PAX": (tarred("model/a.txt", tarfile.PAX_FORMAT), "a tar archive"),
    "short": (b"ab\x01", "unknown format: it begins with 61 62 01"),
    "text": (b"hello, world, this is text\n", "text, not weights: 'hello, world"),
    "noise": (bytes(range(1, 250)), "unknown format"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_files_are_named(name: str, tmp_path: Path) -> None:
    data, message = UNKNOWN[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ContainerError, match=message) as caught:
        open_file(LocalFile(path))
    assert str(caught.value).startswith(str(path))
    assert "\n" in str(caught.value)


def test_content_decides_and_not_the_name(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(1)}
    safetensors.torch.save_file(tensors, tmp_path / "x.pth")
    torch.save(tensors, tmp_path / "x.safetensors")
    torch.save(tensors, tmp_path / "y.safetensors", _use_new_zipfile_serialization=False)
    assert opened(tmp_path / "x.pth", "safetensors")
    assert opened(tmp_path / "x.safetensors", "torch zip")
    assert opened(tmp_path / "y.safetensors", "torch legacy")


def install_plugin(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    entry = importlib.metadata.EntryPoint("mine", module, GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry])


def test_plugins_are_tried_after_the_built_in_loaders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module: Any = types.ModuleType("my_loader")
    module.CONTAINER, module.can_read, module.load = "mine", lambda file: True, lambda file: {"a": None}
    monkeypatch.setitem(sys.modules, "my_loader", module)
    install_plugin(monkeypatch, "my_loader")
    (tmp_path / "x").write_bytes(b"abc")
    assert open_file(LocalFile(tmp_path / "x")) == ("mine", {"a": None})
    torch.save({}, tmp_path / "y")
    assert open_file(LocalFile(tmp_path / "y")) == ("torch zip", {})


def test_a_broken_plugin_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_plugin(monkeypatch, "no_such_package.loader")
    (tmp_path / "x").write_bytes(b"abc")
    with pytest.raises(ContainerError, match=r"'mine' \(no_such_package.loader\) cannot be imported"):
        open_file(LocalFile(tmp_path / "x"))
    torch.save({}, tmp_path / "y")
    assert open_file(LocalFile(tmp_path / "y")) == ("torch zip", {})


def test_a_checkout_reads_checkpoints_without_being_installed(tmp_path: Path) -> None:
    """Built-in loaders need no metadata of an installed distribution."""
    torch.save({}, tmp_path / "x")
    code = (
        "import importlib.metadata, sys; from pathlib import Path\n"
        "importlib.metadata.MetadataPathFinder.find_distributions = lambda *_: iter(())\n"
        "from converter.formats.registry import open_file; from converter.storage.local_file import LocalFile\n"
        "assert open_file(LocalFile(Path(sys.argv[1]))) == ('torch zip', {})"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "x"], check=True)


def test_loaders_import_no_numeric_library() -> None:
    code = (
        "import sys, converter.formats.registry; found = {'torch', 'numpy', 'pickle'} & set(sys.modules);"
        "sys.exit(str(found) if found else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

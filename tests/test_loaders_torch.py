from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import enum
import io
import pickle
import struct
import types
import warnings
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders_oracle import DTYPES, assert_same, opened, rewrite, to_torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from converter.errors import ContainerError
from converter.tensors.tensor_info import FileContents, TensorInfo

FORMATS = ["zip", "legacy"]
CONTAINERS = {"zip": "torch zip", "legacy": "torch legacy"}


def saved(path: Path, value: Any, form: str = "zip", **options: Any) -> Path:
    """Save in memory: the folder in the zip is then called `archive`."""
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=form == "zip", **options)
    path.write_bytes(buffer.getvalue())
    return path


def agree(path: Path, form: str) -> Any:
    ours = opened(path, CONTAINERS[form])
    assert_same(ours, torch.load(path, weights_only=True))
    return ours


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Conv1d(4, 2, 1)))


def values() -> dict[str, Any]:
    base = torch.arange(24, dtype=torch.float32)
    shared = torch.randn(4)
    parameter = nn.Parameter(torch.randn(2))
    parameter.note = "kept as an attribute"  # type: ignore[attr-defined]
    module = model()
    optimizer = torch.optim.Adam(module.parameters())
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return {
        "plain": {"a": torch.randn(2, 3), "b.c": torch.ones(1)},
        "scalar": {"a": torch.tensor(3.5), "n": torch.tensor(2)},
        "empty": {"a": torch.empty(0), "b": torch.empty(2, 0, 3), "c": base[24:]},
        "strided": {
            "a": base.reshape(4, 6).t(),
            "b": base[::2],
            "c": base[3:7].expand(2, 4),
            "d": base.view(2, 12)[:, 1],
        },
        "views": {"a": base[:8], "b": base[8:16].view(2, 4), "c": base, "d": base[1:]},
        "ones": {"a": torch.randn(5, 1, 3).transpose(0, 1)},
        "tied": {"a": shared, "b": shared, "c": {"d": shared}},
        "parameters": {"a": nn.Parameter(torch.randn(2)), "b": parameter},
        "metadata": module.state_dict(),
        "training": {
            "model": module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "epoch": 3,
            "loss": 0.5,
            "name": "x",
            "nothing": None,
            "size": torch.Size([1, 2]),
            "device": torch.device("cpu"),
            "dtype": torch.float16,
            "betas": (0.9, 0.999),
            "seen": {1, 2},
            "big": 2**70,
            "milestones": collections.Counter([1, 2]),
        },
        "ordered": collections.OrderedDict(b=torch.ones(1), a=torch.zeros(1)),
        "nothing": {},
    }


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", values())
def test_agrees_with_torch(form: str, name: str, tmp_path: Path) -> None:
    ours = opened(saved(tmp_path / "x", values()[name], form), CONTAINERS[form])
    theirs = torch.load(tmp_path / "x", weights_only=True)
    assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS)
def test_dtypes(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    value = {
        "a": torch.arange(6).reshape(2, 3).to(dtype),
        "b": torch.arange(6).to(dtype)[1:4],
        "c": torch.ones(()).to(dtype),
    }
    path = saved(tmp_path / "x", value, form)
    if form == "legacy" and dtype.is_floating_point is False and "uint" in str(dtype) and dtype != torch.uint8:
        # torch cannot read the files that it writes of these dtypes.
        assert_same(opened(path, "torch legacy"), value)
    elif form == "legacy" and "float8" in str(dtype):
        assert_same(opened(path, "torch legacy"), value)
    else:
        agree(path, form)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("form", FORMATS)
def test_pickle_protocols(form: str, protocol: int, tmp_path: Path) -> None:
    path = saved(tmp_path / "x", {"model": model().state_dict(), "step": 1}, form, pickle_protocol=protocol)
    assert_same(opened(path, CONTAINERS[form]), torch.load(path, weights_only=False))


def test_the_folder_in_a_zip_has_any_name(tmp_path: Path) -> None:
    torch.save(values()["plain"], tmp_path / "sam_vit_b.pth")
    agree(tmp_path / "sam_vit_b.pth", "zip")


def test_views_share_one_storage(tmp_path: Path) -> None:
    ours = opened(saved(tmp_path / "x", values()["views"]), "torch zip")
    assert len({id(tensor.storage) for tensor in ours.values()}) == 1


def test_large_object_pickle_in_legacy(tmp_path: Path) -> None:
    value = {f"key.{'x' * 200}.{i}": torch.ones(1) * i for i in range(1500)}
    agree(saved(tmp_path / "x", value, "legacy"), "legacy")


def repacked(source: Path, method: int, change: Any = None) -> Path:
    """Rewrite the archive with Python's zipfile."""
    members = {info.filename: data for info, data in read_members(source)}
    if change:
        change(members)
    with zipfile.ZipFile(source, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return source


def read_members(source: Path) -> list[tuple[zipfile.ZipInfo, bytes]]:
    with zipfile.ZipFile(source) as archive:
        return [(info, archive.read(info)) for info in archive.infolist()]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_repacked_archives(method: int, tmp_path: Path) -> None:
    path = repacked(saved(tmp_path / "x", values()["metadata"]), method)
    ours = agree(path, "zip")
    assert all(tensor.is_raw_contiguous == (method == zipfile.ZIP_STORED) for tensor in ours.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16, torch.uint8])
def test_big_endian(dtype: torch.dtype, tmp_path: Path) -> None:
    value = torch.arange(6).reshape(2, 3).to(dtype)

    def swap(members: dict[str, bytes]) -> None:
        members["archive/byteorder"] = b"big"
        data, size = members["archive/data/0"], dtype.itemsize
        members["archive/data/0"] = b"".join(data[i : i + size][::-1] for i in range(0, len(data), size))

    path = repacked(saved(tmp_path / "x", {"a": value}), zipfile.ZIP_STORED, swap)
    assert torch.equal(torch.load(path, weights_only=True)["a"], value)
    ours = agree(path, "zip")
    assert torch.equal(to_torch(ours["a"]), value)


def test_torch_before_2_1_wrote_no_byteorder(tmp_path: Path) -> None:
    path = repacked(saved(tmp_path / "x", {"a": torch.ones(2)}), 0, lambda members: members.pop("archive/byteorder"))
    agree(path, "zip")


def test_legacy_ignores_the_machines_byte_order(tmp_path: Path) -> None:
    path = saved(tmp_path / "x", {"a": torch.arange(4)}, "legacy")
    big = rewrite(path, lambda data: data.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"))
    agree(big, "legacy")


def legacy_with_view(view: Any) -> bytes:
    """A file of torch before 0.4, in which a persistent id may have a view of the storage."""

    class Id:
        def __init__(self, pid: Any) -> None:
            self.pid = pid

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return obj.pid if isinstance(obj, Id) else None

    class Record:
        def __reduce__(self) -> Any:
            pid = Id(("storage", torch.FloatStorage, "7", "cpu", 6, view))
            return torch._utils._rebuild_tensor_v2, (pid, 1, (2,), (1,), False, collections.OrderedDict())

    buffer = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(value, buffer, 2)
    Pickler(buffer, 2).dump({"a": Record()})
    pickle.dump(["7"], buffer, 2)
    buffer.write(struct.pack("<q6f", 6, *range(6)))
    return buffer.getvalue()


@pytest.mark.parametrize("view", [None, ("8", 0, 6), ("8", 2, 4)])
def test_legacy_views(view: Any, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(legacy_with_view(view))
    agree(path, "legacy")


# ---- damage


def reads_all(path: Path, container: str) -> None:
    for value in opened(path, container).values():
        if isinstance(value, TensorInfo):
            value.storage.read()


def test_flipped_bits_are_detected(tmp_path: Path) -> None:
    path = saved(tmp_path / "x", {"a": torch.arange(100.0), "b": torch.ones(3)})
    good = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
    for name in ("archive/data.pkl", "archive/data/0", "archive/data/1"):
        info = members[name]
        data = info.header_offset + 30 + sum(struct.unpack_from("<2H", good, info.header_offset + 26))
        for at in (data, data + info.file_size // 2, data + info.file_size - 1):
            bad = bytearray(good)
            bad[at] ^= 0x10
            path.write_bytes(bad)
            with pytest.raises(ContainerError, match="CRC-32"):
                reads_all(path, "torch zip")


@pytest.mark.parametrize("form", FORMATS)
def test_every_truncation(form: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "x", {"a": torch.arange(20.0), "b": torch.ones(3)}, form)
    data = path.read_bytes()
    for end in range(len(data)):
        path.write_bytes(data[:end])
        with pytest.raises(ContainerError):
            opened(path, CONTAINERS[form])


@pytest.mark.parametrize("form", FORMATS)
def test_truncation_is_reported(form: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "x", {"a": torch.arange(2000.0)}, form)
    rewrite(path, lambda data: data[:-400])
    with pytest.raises(ContainerError, match=r"truncated(.|\n)*again"):
        opened(path, CONTAINERS[form])


def drop(name: str) -> Any:
    return lambda members: members.pop(name)


def put(name: str, data: bytes) -> Any:
    return lambda members: members.update({name: data})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("archive/data/0"), "no member 'archive/data/0'"),
        (put("archive/data/0", bytes(4)), "4 bytes, but data.pkl says 8"),
        (put("archive/data/0", bytes(12)), "12 bytes, but data.pkl says 8"),
        (put("archive/byteorder", b"middle"), "neither little nor big"),
        (put("archive/byteorder", b"x" * 99), "the limit is 16"),
        (put("archive/data.pkl", pickle.dumps([1], 2)), "holds a list without named tensors, not a dict"),
        (put("archive/data.pkl", b""), "truncated"),
        (put("archive/data.pkl", bytes(17 << 20)), "the limit is"),
    ],
)
def test_bad_archives(change: Any, message: str, tmp_path: Path) -> None:
    path = repacked(saved(tmp_path / "x", {"a": torch.ones(2)}), zipfile.ZIP_DEFLATED, change)
    with pytest.raises(ContainerError, match=message):
        opened(path, "torch zip")


def pickled(arguments: tuple[Any, ...], key: str = "0", numel: int = 6) -> bytes:
    """A data.pkl with one tensor: a storage of six floats, rebuilt with `arguments`."""

    class Id:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, key, "cpu", numel) if isinstance(obj, Id) else None

    class Record:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Id(), *arguments, False, collections.OrderedDict())

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"a": Record()})
    return buffer.getvalue()


@pytest.mark.parametrize(
    "arguments",
    [
        *((0, (7,), (1,)), (5, (2,), (1,)), (0, (2, 2), (5, 1)), (-1, (2,), (1,)), (0, (-2,), (1,)), (3, (2,), (-1,))),
        *(
            (0, (2,), (1, 1)),
            (0, (2.0,), (1,)),
            (0, [2], (1,)),
            ("0", (2,), (1,)),
            (0, (True,), (1,)),
            (0, (1,) * 65, (1,) * 65),
        ),
        (0, (2**62, 2**62), (2**62, 1)),
    ],
)
def test_impossible_tensors(arguments: Any, tmp_path: Path) -> None:
    path = saved(tmp_path / "x", {"a": torch.zeros(6)})
    agree(repacked(path, 0, put("archive/data.pkl", pickled((1, (2,), (2,))))), "zip")
    repacked(path, 0, put("archive/data.pkl", pickled(arguments)))
    with pytest.raises(ContainerError):
        opened(path, "torch zip")


@pytest.mark.parametrize("key", ["../data.pkl", "0\0", "/etc/passwd", "1"])
def test_storage_names_stay_in_the_archive(key: str, tmp_path: Path) -> None:
    path = repacked(
        saved(tmp_path / "x", {"a": torch.zeros(6)}), 0, put("archive/data.pkl", pickled((0, (2,), (1,)), key))
    )
    with pytest.raises(ContainerError, match="no member"):
        opened(path, "torch zip")


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)


def sparse_rows() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.eye(2).to_sparse_csr()


class Color(enum.Enum):
    RED = 1


class Options(dict[str, Any]):
    """A class of configurations, such as yacs and easydict have."""


class Tagged(torch.Tensor):
    """A subclass of another package."""


def convert_to_tensor(array: Any) -> Any:
    """TensorFlow's function of this name makes tensors of pickles."""


class TensorFlowTensor:
    def __reduce__(self) -> Any:
        return convert_to_tensor, (numpy.ones(4),)


class JaxArray:
    def __reduce__(self) -> Any:
        return _reconstruct_array, (*numpy.zeros((2, 3)).__reduce__(), {"weak_type": False})


def _reconstruct_array(*_: Any) -> Any:
    """jax's function of this name makes its arrays."""


FOREIGN: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace(lr=1),
    "types.SimpleNamespace": types.SimpleNamespace(lr=[1]),
    "numpy._core.multiarray.scalar": numpy.float64(1),
    "pathlib.PurePosixPath": PurePosixPath("x"),
    "collections.defaultdict": collections.defaultdict(list, a=[1]),
    "collections.deque": collections.deque([1], 3),
    "datetime.datetime": datetime.datetime(2024, 1, 1),
    "Color": Color.RED,
    "Options": Options(a=1),
    "torch.optim.adam.Adam": torch.optim.Adam,
    "torch.nn.functional.relu": nn.functional.relu,
    "torch.optim.sgd.SGD": torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1),
    "torch.nn.modules.activation.ReLU": [nn.ReLU()],
    "torch.FloatTensor": torch.FloatTensor,
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("form", FORMATS)
def test_foreign_objects_are_ignored_and_named(form: str, protocol: int, tmp_path: Path) -> None:
    value = {
        "model": {"a": torch.ones(1)},
        "other": list(FOREIGN.values()),
        "keys": {Color.RED: 1, (3, 3): 2, nn.Linear: 3},
    }
    path = saved(tmp_path / "x", value, form, pickle_protocol=protocol)
    contents = opened(path, CONTAINERS[form])
    assert isinstance(contents, FileContents)
    assert_same(contents["model"], value["model"])
    for name in FOREIGN:
        assert any(ignored.endswith(name) for ignored in contents.ignored), name
    assert contents["other"] is None and contents["keys"] is None


@pytest.mark.parametrize("form", FORMATS)
def test_plain_values_are_no_foreign_objects(form: str, tmp_path: Path) -> None:
    plain = [1j, bytearray(b"x"), range(3), slice(1, 2), {1}, frozenset({2}), torch.complex64, torch.strided, b"x"]
    path = saved(tmp_path / "x", {"model": {"a": torch.ones(1)}, "plain": plain}, form)
    contents = opened(path, CONTAINERS[form])
    assert isinstance(contents, FileContents) and contents.ignored == ()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("value", "kind", "shape"),
    [
        (torch.zeros(2, 3).to_sparse(), "sparse", (2, 3)),
        (sparse_rows(), "sparse", (2, 2)),
        (torch.zeros(2, device="meta"), "meta", (2,)),
        (quantized(), "quantized", (2,)),
        (torch.zeros(2)._neg_view(), "conjugated or negated view", (2,)),
        (torch.zeros(2).as_subclass(Tagged), f"tensor of {__name__}.Tagged", (2,)),
        (numpy.zeros((2, 3)), "numpy array", (2, 3)),
        (torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged), "nested", ()),
        (
            TwoTensor(torch.ones(2), torch.ones(2)),
            "wrapper tensor of torch.testing._internal.two_tensor.TwoTensor",
            (2,),
        ),
        (JaxArray(), "numpy array", (2, 3)),
        (TensorFlowTensor(), f"object of {__name__}.convert_to_tensor", (4,)),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_cannot_be_read_are_named(form: str, value: Any, kind: str, shape: Any, tmp_path: Path) -> None:
    path = saved(tmp_path / "x", {"a": torch.ones(1), "odd": value}, form)
    odd = opened(path, CONTAINERS[form])["odd"]
    assert (odd.key, odd.dtype.name, odd.shape, odd.nbytes) == ("odd", kind, shape, 0)
    assert not odd.dtype.is_float


@pytest.mark.parametrize("form", FORMATS)
def test_large_state_dicts_of_arrays_are_named(form: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "x", {"model": {"a": numpy.zeros(17 << 20, "u1")}}, form)
    with pytest.raises(ContainerError, match=r"16777216.*\n.*it holds numpy arrays.*torch.load.*torch.as_tensor"):
        opened(path, CONTAINERS[form])


@pytest.mark.parametrize("form", FORMATS)
def test_tensors_with_attributes_are_plain(form: str, tmp_path: Path) -> None:
    value = {"a": torch.randn(2, 3), "b": nn.Parameter(torch.randn(2)), "c": nn.Buffer(torch.ones(2))}
    for tensor in value.values():
        tensor.tag = "frozen"
    assert_same(opened(saved(tmp_path / "x", value, form), CONTAINERS[form]), value)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU())
        self.scale = nn.Parameter(torch.randn(2))
        self.register_buffer("unsaved", torch.ones(1), persistent=False)
        self.tied = self.layers[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMATS)
def test_whole_modules_are_read_as_state_dicts(form: str, tmp_path: Path) -> None:
    net = Net()
    expected = net.state_dict()
    alone = opened(saved(tmp_path / "x", net, form), CONTAINERS[form])
    inside = opened(saved(tmp_path / "y", {"epoch": 1, "model": net, "ema": None}, form), CONTAINERS[form])["model"]
    for found in (alone, inside):
        assert found.keys() == expected.keys()
        assert_same({name: found[name] for name in expected}, dict(expected))


@pytest.mark.filterwarnings("ignore")
def test_quantized_layers_of_a_module_are_no_plain_tensors(tmp_path: Path) -> None:
    net = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(2, 3)), {nn.Linear})
    assert opened(saved(tmp_path / "x", net), "torch zip")["0._packed_params._packed_params"].dtype.name == "quantized"


def test_lists_of_state_dicts_have_indices(tmp_path: Path) -> None:
    value = [{"a": torch.ones(1)}, 3, {"a": torch.zeros(1)}]
    contents = opened(saved(tmp_path / "x", {"folds": value, "losses": [1.0] * 300_000}), "torch zip")
    assert list(contents["folds"]) == [0, 2] and contents["losses"] is None
    assert_same(contents["folds"][2], value[2])


def test_a_dict_that_contains_itself(tmp_path: Path) -> None:
    value: dict[str, Any] = {"a": torch.ones(1)}
    value["self"] = value
    assert opened(saved(tmp_path / "x", value), "torch zip")["self"]["self"]["a"].shape == (1,)


def test_a_bomb_of_shared_dicts(tmp_path: Path) -> None:
    value: dict[str, Any] = {"a": torch.ones(1)}
    for _ in range(8):
        value = {str(index): value for index in range(10)}
    with pytest.raises(ContainerError, match="entries"):
        opened(saved(tmp_path / "x", value), "torch zip")


def test_archives_of_newer_versions_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "x", {"a": torch.ones(1)})
    with pytest.raises(ContainerError, match="archive version 11"):
        opened(repacked(path, zipfile.ZIP_STORED, put("archive/version", b"11\n")), "torch zip")


def test_files_without_checksums(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path / "x", {"a": torch.ones(1)})
    finally:
        torch.serialization.set_crc32_options(True)
    contents = opened(path, "torch zip")
    assert isinstance(contents, FileContents) and "no checksums" in contents.notes[0]
    assert_same(contents, {"a": torch.ones(1)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.replace(b"M\xe9\x03.\x80", b"M\xea\x03.\x80", 1), "version other than 1001"),
        (lambda data: data[:-16] + struct.pack("<q", 3) + data[-8:], "3 elements, but"),
        (lambda data: data[:-16] + struct.pack("<q", -1) + data[-8:], "-1 elements, but"),
        (lambda data: data.replace(b"]q\x00X", b")q\x00X", 1), "items for a tuple"),
    ],
)
def test_bad_legacy_files(change: Any, message: str, tmp_path: Path) -> None:
    path = rewrite(saved(tmp_path / "x", {"a": torch.ones(2)}, "legacy"), change)
    with pytest.raises(ContainerError, match=message):
        opened(path, "torch legacy")


def test_legacy_storage_list_must_match_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for keys in ([], ["7", "7"], ["8"], [7], [[]], {}, None):
        path.write_bytes(legacy_with_view(None).replace(pickle.dumps(["7"], 2), pickle.dumps(keys, 2)))
        with pytest.raises(ContainerError, match="storage list"):
            opened(path, "torch legacy")


CHANGES = st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(changes=CHANGES)
@pytest.mark.parametrize("form", FORMATS)
def test_mutated_files(form: str, changes: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory) -> None:
    def mutate(data: bytes) -> bytes:
        mutated = bytearray(data)
        for at, value in changes:
            mutated[at % len(mutated)] = value
        return bytes(mutated)

    path = saved(tmp_path_factory.getbasetemp() / "mutated", {"model": values()["strided"], "n": {"a": 1}}, form)
    if form == "zip":
        repacked(path, 0, lambda members: members.update({"archive/data.pkl": mutate(members["archive/data.pkl"])}))
    else:
        rewrite(path, mutate)
    with contextlib.suppress(ContainerError):
        reads_all(path, CONTAINERS[form])


@pytest.mark.parametrize("form", FORMATS)
def test_a_single_tensor_is_reported(form: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", torch.ones(2), form)
    with pytest.raises(ContainerError, match="holds a tensor, not a dict of tensors"):
        opened(path, CONTAINERS[form])

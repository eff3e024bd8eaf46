from __future__ import annotations

import contextlib
import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converter.errors import ContainerError
from converter.formats import zip_directory
from converter.storage.local_file import LocalFile


def packed(members: dict[str, bytes], method: int = zipfile.ZIP_STORED, comment: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.comment = comment
    return buffer.getvalue()


def read(path: Path, data: bytes) -> dict[str, bytes]:
    path.write_bytes(data)
    return {name: storage.read() for name, storage in zip_directory.read_directory(LocalFile(path)).items()}


MEMBERS = {"a/data.pkl": b"pickle", "a/data/0": b"x" * 500, "a/é": b"", "a/": b""}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("comment", [b"", b"a comment", b"PK\x05\x06", b"x" * 65535])
def test_members(method: int, comment: bytes, tmp_path: Path) -> None:
    assert read(tmp_path / "x", packed(MEMBERS, method, comment)) == MEMBERS


def test_stored_members_are_read_in_place(tmp_path: Path) -> None:
    data = packed(MEMBERS)
    path = tmp_path / "x"
    read(path, data)
    storage = zip_directory.read_directory(LocalFile(path))["a/data/0"]
    assert data[storage.offset : storage.offset + storage.length] == MEMBERS["a/data/0"]


def test_zip64(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, archive.open("a/b", "w", force_zip64=True) as member:
        member.write(b"data")
    assert read(tmp_path / "x", buffer.getvalue()) == {"a/b": b"data"}
    assert read(tmp_path / "x", zip64(packed({"a/b": b"data"}))) == {"a/b": b"data"}


def zip64(data: bytes, **wrong: int) -> bytes:
    """The archive of one member with all its fields in zip64 records."""
    end = data.rfind(b"PK\x05\x06")
    _, _, _, _, count, _, offset, _ = struct.unpack_from("<4s4H2LH", data, end)
    entry = bytearray(data[offset:end])
    length, size = struct.unpack_from("<2L", entry, 20)
    name = struct.unpack_from("<H", entry, 28)[0]
    entry[20:28], entry[42:46], entry[30:32] = b"\xff" * 8, b"\xff" * 4, struct.pack("<H", 28)
    entry[46 + name : 46 + name] = struct.pack("<2H3Q", 1, 24, wrong.get("size", size), length, wrong.get("header", 0))
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(entry), offset)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, wrong.get("record", offset + len(entry)), 1)
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, wrong.get("length", 0xFFFFFFFF), 0xFFFFFFFF, 0)
    return data[:offset] + bytes(entry) + record + locator + tail


@pytest.mark.parametrize(
    "wrong", [{"size": 2**63}, {"header": 2**40}, {"record": 0}, {"record": 2**60}, {"length": 7}, {"header": 5}]
)
def test_inconsistent_zip64_records(wrong: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ContainerError):
        read(tmp_path / "x", zip64(packed({"a/b": b"data"}), **wrong))


def patched(at: int, layout: str, *values: Any, start: bytes = b"PK\x01\x02") -> bytes:
    """A valid archive with a changed field in its first central, local or end record."""
    data = bytearray(packed({"a/b": b"data", "a/c": b"more"}))
    struct.pack_into(layout, data, data.find(start) + at, *values)
    return bytes(data)


LOCAL, END = b"PK\x03\x04", b"PK\x05\x06"
BAD: dict[str, tuple[bytes, str]] = {
    "encrypted": (patched(8, "<H", 1), "encrypted"),
    "encrypted locally": (patched(6, "<H", 1, start=LOCAL), "disagree"),
    "method": (patched(10, "<H", 12), "method 12"),
    "method locally": (patched(8, "<H", 8, start=LOCAL), "disagree"),
    "name locally": (patched(30, "<3s", b"a/x", start=LOCAL), "disagree"),
    "name length locally": (patched(26, "<H", 2, start=LOCAL), "disagree"),
    "local extra": (patched(28, "<H", 60000, start=LOCAL), "overlaps"),
    "local signature": (patched(0, "<4s", b"PKxx", start=LOCAL), "disagree"),
    "name not text": (patched(46, "<3s", b"\xff\xff\xff"), "UTF-8"),
    "doubled": (patched(46, "<3s", b"a/c"), "duplicate member"),
    "long": (patched(20, "<2L", 1000, 1000), "overlaps"),
    "sizes": (patched(20, "<2L", 4, 1000), "cannot hold"),
    "offset": (patched(42, "<L", 40), "overlaps"),
    "offset outside": (patched(42, "<L", 2**31), "overlaps"),
    "name length": (patched(28, "<H", 60000), "truncated"),
    "zip64 absent": (patched(20, "<L", 0xFFFFFFFF), "a size is missing"),
    "count": (patched(8, "<2H", 1, 1, start=END), "extra bytes"),
    "more": (patched(8, "<2H", 3, 3, start=END), "members in"),
    "disks": (patched(4, "<H", 1, start=END), "multi-part archive"),
    "length": (patched(12, "<L", 5, start=END), "ends at"),
    "place": (patched(16, "<L", 5, start=END), "ends at"),
    "prefix": (b"x" * 10 + packed({"a": b""}), "ends at"),
    "no end": (packed({"a": b""})[:-22], "truncated"),
    "bomb": (
        packed({"a": bytes(100)}, zipfile.ZIP_DEFLATED).replace(struct.pack("<L", 100), struct.pack("<L", 2**31)),
        "cannot hold",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_archives(name: str, tmp_path: Path) -> None:
    data, message = BAD[name]
    with pytest.raises(ContainerError, match=message):
        read(tmp_path / "x", data)


def test_the_directory_is_parsed_once_per_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(packed(MEMBERS))
    file = LocalFile(path)
    zip_directory.read_directory(file)
    monkeypatch.setattr(zip_directory, "_members", None)
    assert len(zip_directory.read_directory(file)) == len(MEMBERS)
    before = len(zip_directory._parsed)
    del file
    assert len(zip_directory._parsed) == before - 1


@settings(max_examples=100, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=3), wide=st.booleans()
)
def test_mutated_archives(changes: list[tuple[int, int]], wide: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    data = bytearray(zip64(packed({"a/b": b"data"})) if wide else packed(MEMBERS, zipfile.ZIP_DEFLATED))
    for at, value in changes:
        data[-1 - at % len(data)] = value
    with contextlib.suppress(ContainerError):
        read(tmp_path_factory.getbasetemp() / "mutated", bytes(data))

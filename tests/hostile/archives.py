"""Zip archives that are damaged, inconsistent, or written by other programs, and files of other formats."""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import lzma
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy

from hostile.case import Accepted, Build, Case, Refused, sam, saved

STORED, DEFLATED = 0, 8
ENCRYPTED, SIZES_FOLLOW, STRONGLY, UTF8, MASKED = 1, 8, 0x40, 0x800, 0x2000
FULL = 0xFFFFFFFF
STORAGE, PICKLE = "archive/data/0", "archive/data.pkl"


class Member(NamedTuple):
    """A member and the fields of its headers; `local` and `central` replace fields in one of the two."""

    name: bytes
    data: bytes
    size: int
    crc: int
    method: int = STORED
    flags: int = 0
    extra: bytes = b""
    after: bytes = b""
    local: Mapping[str, Any] = MappingProxyType({})
    central: Mapping[str, Any] = MappingProxyType({})

    def fields(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return {"length": len(self.data), **self._asdict(), **other}


def member(name: str, data: bytes, method: int = STORED) -> Member:
    packed = data
    if method == DEFLATED:
        engine = zlib.compressobj(wbits=-15)
        packed = engine.compress(data) + engine.flush()
    return Member(name.encode(), packed, len(data), zlib.crc32(data), method)


@functools.cache
def _checkpoint() -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(saved(sam()))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def checkpoint(*deflated: str) -> dict[str, Member]:
    """The members of a tiny SAM of torch.save; those whose names start with `deflated` are compressed."""
    return {
        name: member(name, data, DEFLATED if name.startswith(deflated) else STORED)
        for name, data in _checkpoint().items()
    }


def changed(name: str = STORAGE, *deflated: str, **fields: Any) -> list[Member]:
    """The members of a tiny SAM, one with changed `fields`."""
    members = checkpoint(*deflated)
    members[name] = members[name]._replace(**fields)
    return list(members.values())


def local_header(one: Member) -> bytes:
    f = one.fields(one.local)
    sums = f["crc"], f["length"], f["size"], len(f["name"]), len(f["extra"])
    return struct.pack("<4s5H3L2H", b"PK\3\4", 20, f["flags"], f["method"], 0, 0, *sums) + f["name"] + f["extra"]


def central_header(one: Member, at: int) -> bytes:
    f = one.fields({"at": at, **one.central})
    sums = f["crc"], f["length"], f["size"], len(f["name"]), len(f["extra"])
    head = struct.pack("<4s6H3L2H", b"PK\1\2", 45, 20, f["flags"], f["method"], 0, 0, *sums)
    return head + struct.pack("<3H2L", 0, 0, 0, 0, f["at"]) + f["name"] + f["extra"]


def ends(count: int, length: int, offset: int, comment: bytes = b"", disk: int = 0) -> bytes:
    return struct.pack("<4s4H2LH", b"PK\5\6", disk, disk, count, count, length, offset, len(comment)) + comment


def ends_wide(count: int, length: int, offset: int, narrow: tuple[int, int, int] = (0xFFFF, FULL, FULL)) -> bytes:
    """The zip64 end record, its locator, and the end record that refers to it."""
    wide = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, offset)
    return wide + struct.pack("<4sLQL", b"PK\6\7", 0, offset + length, 1) + ends(*narrow)


def pack(
    members: list[Member], end: Callable[[int, int, int], bytes] = ends, gap: bytes = b"", before: bytes = b""
) -> bytes:
    """An archive, with `gap` after each member."""
    data, directory = bytearray(before), bytearray()
    for one in members:
        directory += central_header(one, len(data))
        data += local_header(one) + one.data + one.after + gap
    return bytes(data + directory + end(len(members), len(directory), len(data)))


def widened(one: Member, which: str) -> Member:
    """A member with its sizes in zip64 fields of the `local` header, the `central` one, or `both`."""
    length, size = len(one.data), one.size
    wide = {"length": FULL, "size": FULL, "extra": struct.pack("<2H2Q", 1, 16, size, length)}
    return one._replace(**{side: wide for side in ("local", "central") if which in (side, "both")})


# ---- archives of other programs


def put(data: bytes | Callable[[], bytes], name: str = "sam.pth") -> Build:
    def build(folder: Path) -> Path:
        (folder / name).write_bytes(data if isinstance(data, bytes) else data())
        return folder / name

    return build


def _described() -> list[Member]:
    """Sizes and CRC after each member, as programs write that cannot seek."""
    local = {"crc": 0, "length": 0, "size": 0}
    return [
        one._replace(
            flags=SIZES_FOLLOW, local=local, after=struct.pack("<4s3L", b"PK\7\x08", one.crc, len(one.data), one.size)
        )
        for one in checkpoint().values()
    ]


def _odd_names() -> list[Member]:
    names = (
        "../canary",
        "/etc/canary",
        "..\\canary",
        "C:\\canary",
        "a\0b",
        "\x1b]0;canary\7",
        "a\nb",
        "\u202e",
        "x" * 60000,
    )
    return [*checkpoint().values(), *(member(name, b"canary") for name in names)]


def _renamed_storage(present: bool) -> list[Member]:
    """A storage named like a file outside of the archive."""
    key = b"../../../../canary"
    members = checkpoint()
    text = _checkpoint()[PICKLE].replace(b"X\1\0\0\x000", b"X" + struct.pack("<L", len(key)) + key)
    members[PICKLE] = member(PICKLE, text)
    if present:
        members[STORAGE] = members[STORAGE]._replace(name=b"archive/data/" + key)
    return list(members.values())


def _far(folder: Path) -> Path:
    """A sparse member of 5 GiB before the others."""
    path, hole = folder / "sam.pth", 5 << 30
    first, *rest = checkpoint().values()
    big = member("archive/hole", b"")._replace(size=hole)
    wide = {"length": FULL, "size": FULL, "extra": struct.pack("<2H2Q", 1, 16, hole, hole)}
    big = big._replace(local=wide, central=wide)
    directory = bytearray()
    with path.open("wb") as file:
        for one in (first, big, *rest):
            at = file.tell()
            extra = one.central.get("extra", b"")
            if at > FULL:
                one = one._replace(central={"at": FULL, "extra": struct.pack("<2HQ", 1, 8, at)})
            directory += central_header(one, at)
            file.write(local_header(one) + one.data)
            if extra:
                file.seek(hole, os.SEEK_CUR)
        at = file.tell()
        file.write(directory + ends_wide(len(rest) + 2, len(directory), at))
    return path


LEGAL: dict[str, Callable[[], bytes]] = {
    "packed anew": lambda: pack(list(checkpoint().values())),
    "its pickle deflated": lambda: pack(list(checkpoint(PICKLE).values())),
    "sums behind the data": lambda: pack(_described()),
    "flagged as UTF-8": lambda: pack([one._replace(flags=UTF8) for one in checkpoint().values()]),
    "a comment": lambda: pack(list(checkpoint().values()), functools.partial(ends, comment=b"a comment")),
    "a comment that begins like an end": lambda: pack(
        list(checkpoint().values()), functools.partial(ends, comment=b"PK\5\6 and more than an end record has")
    ),
    "zip64 in local headers": lambda: pack([widened(one, "local") for one in checkpoint().values()]),
    "zip64 in the directory": lambda: pack([widened(one, "central") for one in checkpoint().values()]),
    "zip64 at the end": lambda: pack(list(checkpoint().values()), ends_wide),
    "zip64 everywhere": lambda: pack([widened(one, "both") for one in checkpoint().values()], ends_wide),
    "names that lead elsewhere, of what nothing reads": lambda: pack(_odd_names()),
    "a storage called as a file outside": lambda: pack(_renamed_storage(present=True)),
    "folders among the members": lambda: pack(
        [*checkpoint().values(), member("archive/", b""), member("archive/data/", b"")]
    ),
    "unknown fields": lambda: pack([one._replace(extra=b"zz\4\0test") for one in checkpoint().values()]),
    "gaps between members": lambda: pack(list(checkpoint().values()), gap=b"PK\3\4" + bytes(100)),
    "another order": lambda: pack([*list(checkpoint().values())[::-1]]),
    "an archive within, which nothing reads": lambda: pack(
        [*checkpoint().values(), member("archive/inner.zip", pack([member("a", bytes(10**7), DEFLATED)]), DEFLATED)]
    ),
    "a hundred thousand members": lambda: pack(
        [*checkpoint().values(), *(member(f"archive/x/{i}", b"") for i in range(99_000))],
        lambda count, length, offset: ends_wide(count, length, offset),
    ),
}


# ---- inconsistent or damaged archives


def flipped(name: str, *deflated: str) -> list[Member]:
    data = bytearray(checkpoint(*deflated)[name].data)
    data[len(data) // 2] ^= 4
    return changed(name, *deflated, data=bytes(data))


def _bomb(size: int) -> bytes:
    """Deflated zeros, without allocating them."""
    engine = zlib.compressobj(9, wbits=-15)
    segment = 64 << 20
    packed = engine.compress(bytes(segment)) + engine.flush(zlib.Z_FULL_FLUSH)
    return packed * (size // segment) + b"\3\0"


def _quoted_overlap() -> list[Member]:
    """Overlapping members: each is a stored block with the next one's header, and inflates to all that follow."""
    kernel = member("archive/z", bytes(1 << 20), DEFLATED)
    quoted = local_header(kernel)
    block = struct.pack("<B2H", 0, len(quoted), 0xFFFF ^ len(quoted)) + quoted + kernel.data
    outer = Member(b"archive/y", block, kernel.size + len(quoted), 0, DEFLATED)
    # The last entry of the directory starts inside the data of the one before it.
    at = sum(len(local_header(one)) + len(one.data) for one in checkpoint().values())
    inside = at + len(local_header(outer)) + 5
    return [*checkpoint().values(), outer, kernel._replace(central={"at": inside})]


def cut(by: int | float) -> bytes:
    data = saved(sam())
    return data[: int(len(data) * by) if isinstance(by, float) else by]


def encrypted(flag: int, side: str) -> list[Member]:
    return changed(**{"flags": flag} if side == "both" else {side: {"flags": flag}})


CUTS: dict[str, int | float] = {
    "30 bytes": 30,
    "its half": 0.5,
    "all but a byte": -1,
    "all but its end": -22,
    "all but half its directory": -5000,
}
DISAGREE, WRONG_CRC, CANNOT_HOLD = "disagree", "do not match the file's own CRC-32", "cannot hold"
REFUSED: dict[str, tuple[Callable[[], bytes], tuple[str, ...]]] = {
    "a bit of a tensor": (lambda: pack(flipped(STORAGE)), (STORAGE, WRONG_CRC)),
    "a bit of the pickle": (lambda: pack(flipped(PICKLE)), (PICKLE, WRONG_CRC)),
    "a bit of what is deflated": (lambda: pack(flipped(PICKLE, PICKLE)), (PICKLE,)),
    "a sum wrong in the directory": (lambda: pack(changed(central={"crc": 1})), (STORAGE, DISAGREE)),
    "a sum wrong locally": (lambda: pack(changed(local={"crc": 1})), (STORAGE, DISAGREE)),
    "a sum wrong twice": (lambda: pack(changed(crc=1)), (STORAGE, WRONG_CRC)),
    "a size wrong locally": (lambda: pack(changed(local={"size": 1})), (STORAGE, DISAGREE)),
    "a length wrong locally": (lambda: pack(changed(local={"length": 1})), (STORAGE, DISAGREE)),
    "a name that differs locally": (lambda: pack(changed(local={"name": b"archive/data/1"})), (STORAGE, DISAGREE)),
    "a method that differs locally": (lambda: pack(changed(local={"method": DEFLATED})), (STORAGE, DISAGREE)),
    "no local header": (
        lambda: pack(list(checkpoint().values())[::-1]).replace(b"PK\3\4", b"PK\3\5").replace(b"PK\3\5", b"PK\3\4", 1),
        ("disagree",),
    ),
    "a comment that is an end": (
        lambda: pack(changed(), functools.partial(ends, comment=ends(0, 0, 0))),
        ("directory ends at byte 0",),
    ),
    "encrypted": (lambda: pack(encrypted(ENCRYPTED, "both")), (STORAGE, "encrypted")),
    "encrypted locally": (lambda: pack(encrypted(ENCRYPTED, "local")), (STORAGE, DISAGREE)),
    "strongly encrypted": (lambda: pack(encrypted(STRONGLY | ENCRYPTED, "both")), (STORAGE, "encrypted")),
    "a masked directory": (lambda: pack(encrypted(MASKED, "both")), (STORAGE, "encrypted")),
    **{
        f"packed with {name}": (lambda method=method: pack(changed(method=method)), (STORAGE, f"method {method}"))
        for name, method in (("bzip2", 12), ("lzma", 14), ("Zstandard", 93), ("Deflate64", 9))
    },
    "a small member that claims a gigabyte": (
        lambda: pack(changed(STORAGE, STORAGE, size=1 << 30)),
        (STORAGE, CANNOT_HOLD),
    ),
    "a small member that claims 10 TB in zip64": (
        lambda: pack(changed(STORAGE, STORAGE, central={"size": FULL, "extra": struct.pack("<2HQ", 1, 8, 10**13)})),
        (STORAGE, CANNOT_HOLD),
    ),
    "10 GB of zeros": (
        lambda: pack(
            changed(
                data=_bomb(10 << 30),
                method=DEFLATED,
                local={"size": FULL, "extra": struct.pack("<2H2Q", 1, 16, 10 << 30, 1)},
                central={"size": FULL, "extra": struct.pack("<2HQ", 1, 8, 10 << 30)},
            )
        ),
        (STORAGE, "inflate to 10737418240"),
    ),
    "a pickle of 60 MB of zeros": (
        lambda: pack([*changed(PICKLE, data=_bomb(64 << 20), size=64 << 20, crc=0, method=DEFLATED)]),
        (PICKLE, "67108864 bytes; the limit"),
    ),
    "more than is claimed": (
        lambda: pack(changed(PICKLE, PICKLE, size=len(_checkpoint()[PICKLE]) - 1)),
        (PICKLE, "decompresses to more"),
    ),
    "less than is claimed": (
        lambda: pack(changed(PICKLE, PICKLE, size=len(_checkpoint()[PICKLE]) + 1)),
        (PICKLE, "decompresses to less"),
    ),
    "a storage missing": (
        lambda: pack([one for name, one in checkpoint().items() if name != STORAGE]),
        (f"no member '{STORAGE}'",),
    ),
    "a storage short": (lambda: pack([*changed(data=bytes(4), size=4)]), (STORAGE, "4 bytes, but data.pkl says")),
    "a storage twice": (lambda: pack([*changed(), member(STORAGE, b"x")]), ("duplicate member", f"'{STORAGE}'")),
    "a storage outside": (
        lambda: pack(_renamed_storage(present=False)),
        ("no member 'archive/data/../../../../canary'",),
    ),
    "no pickle": (
        lambda: pack([one for name, one in checkpoint().items() if name != PICKLE]),
        ("not one that torch.save",),
    ),
    "byteorder": (
        lambda: pack(
            [one for n, one in checkpoint().items() if "byteorder" not in n] + [member("archive/byteorder", b"\x1b[2J")]
        ),
        ("byteorder", "'\\x1b[2J'"),
    ),
    "a member's name no UTF-8": (
        lambda: pack([*changed(), member("x", b"")._replace(name=b"\xff\x1b[2J")]),
        ("\\xff\\x1b[2J",),
    ),
    "a member's name that steers terminals": (
        lambda: pack([*changed(), member("\x1b[2J\n::error::\u202e", b"")._replace(flags=ENCRYPTED)]),
        ("'\\x1b[2J\\n::error::\\u202e'", "encrypted"),
    ),
    "a member's name of 60 kB": (
        lambda: pack([*changed(), member("x" * 60000, b"")._replace(flags=ENCRYPTED)]),
        ("encrypted",),
    ),
    **{f"cut to {what}": (lambda by=by: cut(by), ("truncated",)) for what, by in CUTS.items()},
    "something before it": (lambda: b"#!/bin/sh\n" + saved(sam()), ("unknown format: it begins with 23 21",)),
    "an archive before it": (lambda: pack([member("a", b"")]) + pack(changed()), ("directory ends at byte",)),
    "something after it": (lambda: saved(sam()) + b"junk", ("data after its end",)),
    "a second end": (lambda: saved(sam()) + ends(0, 0, 0), ("directory ends at byte 0",)),
    "ends that disagree": (
        lambda: pack(changed(), lambda count, length, at: ends_wide(count, length, at, (1, FULL, FULL))),
        ("two end records disagree",),
    ),
    "a zip64 end that is not there": (
        lambda: pack(changed(), lambda count, length, at: ends_wide(count, length, at).replace(b"PK\6\6", b"PK\6\5")),
        ("zip64 end record is missing",),
    ),
    "a zip64 size that is not there": (lambda: pack(changed(central={"size": FULL})), ("a size is missing",)),
    "several disks": (lambda: pack(changed(), functools.partial(ends, disk=1)), ("multi-part archive",)),
    "two members at one place": (
        lambda: pack([*changed(), member("archive/version2", b"")._replace(central={"at": 0})]),
        ("overlaps the next member",),
    ),
    "a bomb of quoted headers": (lambda: pack(_quoted_overlap()), ("'archive/y' overlaps",)),
    "a million members claimed": (
        lambda: pack(changed(), lambda count, length, at: ends_wide(10**6, length, at)),
        ("a directory of 1000000 members",),
    ),
    "more members than are read": (
        lambda: pack([*changed(), *(member(f"{i:0100}", b"") for i in range(60_000))], ends_wide),
        ("a directory of 60",),
    ),
    "no members": (lambda: ends(0, 0, 0), ("a zip archive, but not one that torch.save",)),
    "the checkpoint within": (
        lambda: pack([member("a b/sam.pth", saved(sam())), member("__MACOSX/a b/sam.pth", b"")]),
        ("not one that torch.save", "unzip -p FILE 'a b/sam.pth' > sam.pth"),
    ),
    "two checkpoints within": (
        lambda: pack([member("a.pth", saved(sam())), member("b.safetensors", b"")]),
        ("not one that torch.save", "unzip FILE, and give one of a.pth, b.safetensors"),
    ),
    "a checkpoint within, under the name of an option": (
        lambda: pack([member("-d/sam.pth", saved(sam()))]),
        ("not one that torch.save", "unpack it: unzip FILE"),
    ),
    "a root of two folders": (
        lambda: pack([member(f"sam/{name}", data) for name, data in _checkpoint().items()]),
        ("unpacked and zipped again", "zip -0 -r weights.pth FOLDER"),
    ),
    "CoreML": (lambda: pack([member("x.mlpackage/Manifest.json", b"{}")]), ("a CoreML model",)),
}


# ---- files of other formats


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("sam.pth")
        info.size = len(saved(sam()))
        archive.addfile(info, io.BytesIO(saved(sam())))
    return buffer.getvalue()


def _npz() -> bytes:
    buffer = io.BytesIO()
    numpy.savez(buffer, a=numpy.ones(3))
    return buffer.getvalue()


def _npy() -> bytes:
    buffer = io.BytesIO()
    numpy.save(buffer, numpy.ones(3))
    return buffer.getvalue()


OTHER: dict[str, tuple[Callable[[], bytes], str]] = {
    "7z": (lambda: b"7z\xbc\xaf\x27\x1c\0\4" + bytes(100), "a 7z archive"),
    "tar": (_tar, "a tar archive"),
    "gzip": (lambda: gzip.compress(saved(sam())), "a gzip archive"),
    "bzip2": (lambda: bz2.compress(saved(sam())), "a bzip2 archive"),
    "xz": (lambda: lzma.compress(saved(sam())), "an xz archive"),
    "Zstandard": (lambda: b"\x28\xb5\x2f\xfd\4\0" + bytes(100), "a Zstandard archive"),
    "rar": (lambda: b"Rar!\x1a\7\1\0" + bytes(100), "a RAR archive"),
    "npz": (_npz, "an .npz archive of numpy arrays"),
    "numpy": (_npy, "a numpy array"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file"),
    "PNG": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(100), "an image"),
    "an error page": (lambda: b"\xef\xbb\xbf\r\n<!DOCTYPE html><title>404</title>", "a web page"),
    "a storage service's error": (lambda: b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML"),
    "a hub's error": (lambda: b'{"error":"Repository not found"}', "JSON text"),
    "a line of text": (lambda: b"Entry not found\n", "text, not weights: 'Entry not found'"),
    "text that steers terminals": (lambda: b"\x1b[2J\n::error::", "unknown format"),
    "a Git LFS pointer": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 3\n",
        "git lfs pull",
    ),
    "nothing": (lambda: b"", "an empty file"),
}


def _sparse(folder: Path) -> Path:
    with (folder / "sam.pth").open("wb") as file:
        file.truncate(1 << 40)
    return folder / "sam.pth"


def _special(make: Callable[[Path], object]) -> Build:
    def build(folder: Path) -> Path:
        make(folder / "sam.pth")
        return folder / "sam.pth"

    return build


ENCODER_PREFIX: dict[str, tuple[Build, tuple[str, ...]]] = {
    "a terabyte of zeros": (_sparse, ("zeros only",)),
    "a folder": (_special(Path.mkdir), ("sam.pth", "contains no checkpoint")),
    "a pipe": (_special(os.mkfifo), ("sam.pth: is a pipe",)),
    "/dev/zero": (lambda folder: Path("/dev/zero"), ("/dev/zero: is a device",)),
    "a link to /dev/zero": (_special(lambda path: path.symlink_to("/dev/zero")), ("sam.pth: is a device",)),
    "a link to itself": (_special(lambda path: path.symlink_to(path)), ("no such file",)),
}

CASES = [
    *(Case(f"zip: {name}", put(data), Accepted(sam)) for name, data in LEGAL.items()),
    Case("zip: members beyond 4 GiB", _far, Accepted(sam)),
    *(
        Case(
            f"zip: deflated, {name}",
            put(lambda which=which: pack(list(checkpoint(*which).values()))),
            Accepted(sam, computed=True),
        )
        for name, which in (("one tensor", (STORAGE,)), ("all", ("archive/",)))
    ),
    *(
        Case(f"zip: called {name}", put(lambda: saved(sam()), name), Accepted(sam))
        for name in ("sam", "sam.safetensors", "sam.jpg", "sam.pth.zip", "-sam.pth")
    ),
    *(Case(f"zip: {name}", put(data), Refused(words)) for name, (data, words) in REFUSED.items()),
    *(Case(f"file: {name}", put(data), Refused(("sam.pth", word))) for name, (data, word) in OTHER.items()),
    *(Case(f"file: {name}", build, Refused(words)) for name, (build, words) in ENCODER_PREFIX.items()),
]

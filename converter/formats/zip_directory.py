"""A zip archive's directory, so that a stored member can be read in place.

Python's zipfile gives no member's data offset, opens each by name with a lock, and costs more than all else in a
conversion. The format is PKWARE's APPNOTE.TXT 6.3.10; torch writes members stored, with zip64 records at the end.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

from converter.errors import ContainerError, printable
from converter.storage.byte_range import Storage
from converter.storage.local_file import SourceFile

MAX_DIRECTORY = 8 << 20  # bytes: 100,000 members; the directories of real checkpoints take less than one MiB
# Deflate cannot do better than 1032 to 1; a member that claims more would have us reserve memory for nothing. Nor does
# a large one that is not made to fill memory do better than weights, of which zeros are a small part.
MAX_RATIO, LARGE, MAX_RATIO_LARGE = 1032, 256 << 20, 20

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")

_STORED, _DEFLATED = 0, 8
_ENCRYPTED = 0x2041  # flags: encrypted, strongly encrypted, directory masked
_SIZES_FOLLOW = 0x8  # flag of a local header that was written before its data, and of what is known then only
_MAX_COMMENT = 0xFFFF


class _Member(NamedTuple):
    """One entry of the directory; `end` is where the next member or the directory begins."""

    raw_name: bytes
    method: int
    crc32: int
    length: int
    size: int
    header: int
    end: int


class Directory(Mapping[str, Storage]):
    """A zip file's members by name.

    A member's local header is read when its bytes are, not before: over a network each is a request.
    """

    def __init__(self, file: SourceFile, members: dict[str, _Member]) -> None:
        self._file, self._members = file, members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __getitem__(self, name: str) -> Storage:
        member = self._members[name]
        # The next member bounds it, and the longest header it could have.
        longest = _LOCAL.size + len(member.raw_name) + 0xFFFF + member.length
        return Storage(
            self._file,
            (member.header, min(member.end, member.header + longest)),
            member.length,
            member.size,
            printable(name),
            member.crc32,
            deflated=member.method == _DEFLATED,
            find=cache(partial(_data_offset, self._file, name, member)),
        )

    @property
    def root(self) -> str:
        """The folder that holds all, as torch takes it: that of the first member."""
        return next(iter(self._members), "").partition("/")[0]


def is_zip(file: SourceFile) -> bool:
    return file.size > 4 and file.read(0, 4) == b"PK\x03\x04"


# Holds no Storage: that would keep its own key alive.
_parsed: WeakKeyDictionary[SourceFile, dict[str, _Member]] = WeakKeyDictionary()


def read_directory(file: SourceFile) -> Directory:
    """The directory of a zip file, parsed once a file."""
    members = _parsed.get(file)
    if members is None:
        members = _parsed[file] = _members(file, *_locate(file))
    return Directory(file, members)


def read_small(storage: Storage, limit: int) -> bytes:
    """A member's bytes, checked; ContainerError where it claims more than `limit`."""
    if storage.size > limit:
        raise ContainerError(
            f"{storage.file.name}: {storage.name}: {storage.size} bytes, and at most {limit} are read",
            "no checkpoint needs that: do not trust this file",
        )
    return storage.read()


def _damaged(file: SourceFile, why: str) -> ContainerError:
    return ContainerError(f"{file.name}: a damaged zip archive: {why}", "download or copy the file again")


# ---- finding the directory: offset, length, number of members


def _locate(file: SourceFile) -> tuple[int, int, int]:
    at, tail = _end_record(file)
    _, disk, first_disk, count_here, count, length, offset, _ = _END.unpack_from(tail)
    end = at
    start64 = at - _LOCATOR.size
    locator = file.read(start64, _LOCATOR.size) if start64 >= 0 else b""
    if locator[:4] == b"PK\x06\x07":
        end, wide = _end64_record(file, locator, start64)
        _agree(file, (count_here, count, length, offset), wide)
        count_here, count, length, offset = wide
    if disk not in (0, 0xFFFF) or first_disk not in (0, 0xFFFF) or count_here != count:
        raise _damaged(file, "part of a set of several")
    if offset + length != end:
        raise _damaged(file, f"its directory ends at byte {offset + length}, not at {end}")
    if length > MAX_DIRECTORY or count * _CENTRAL.size > length:
        raise _damaged(file, f"a directory of {count} members in {length} bytes")
    return offset, length, count


def _end_record(file: SourceFile) -> tuple[int, bytes]:
    """Where the end record lies, and its bytes: the last thing in the file but for a comment."""
    # Without a comment, as torch writes it, it is found at once.
    for window in (_END.size, _END.size + _MAX_COMMENT):
        start = max(0, file.size - window)
        tail = file.read(start, file.size - start)
        found = tail.rfind(b"PK\x05\x06")
        while found >= 0:
            record = tail[found:]
            if len(record) >= _END.size and int.from_bytes(record[20:22], "little") == len(record) - _END.size:
                return start + found, record
            found = tail.rfind(b"PK\x05\x06", 0, found)
    raise ContainerError(
        f"{file.name}: truncated, or with something after its end: a zip archive (as torch.save writes) without the "
        "directory that ends it",
        "the download or copy was not finished: download or copy it again",
    )


def _end64_record(file: SourceFile, locator: bytes, end: int) -> tuple[int, tuple[int, int, int, int]]:
    _, _, at, _ = _LOCATOR.unpack(locator)
    if at + _END64.size > end:
        raise _damaged(file, "no zip64 record where one should be")
    signature, _, _, _, _, _, *wide = _END64.unpack(file.read(at, _END64.size))
    if signature != b"PK\x06\x06":
        raise _damaged(file, "no zip64 record where one should be")
    count_here, count, length, offset = wide
    return at, (count_here, count, length, offset)


def _agree(file: SourceFile, narrow: tuple[int, ...], wide: tuple[int, ...]) -> None:
    """The two end records must say the same: else two programs would see two archives in one file."""
    for bits, ours, theirs in zip((16, 16, 32, 32), narrow, wide, strict=True):
        if ours not in (theirs, (1 << bits) - 1):
            raise _damaged(file, "its two end records disagree")


# ---- the members


def _members(file: SourceFile, offset: int, length: int, count: int) -> dict[str, _Member]:
    data, at, members = file.read(offset, length), 0, {}
    for _ in range(count):
        member, at = _central(file, data, at)
        name = _text(file, member.raw_name)
        if name in members:
            raise _damaged(file, f"two members are called {name!r}")
        members[name] = member
    if at != length:
        raise _damaged(file, f"{length - at} bytes of its directory are left over")
    return _without_overlap(file, members, offset)


def _central(file: SourceFile, data: bytes, at: int) -> tuple[_Member, int]:
    """The member whose entry is at `at`, and where the next entry begins."""
    start = at + _CENTRAL.size
    if start > len(data):
        raise _damaged(file, "its directory is cut short")
    entry = _CENTRAL.unpack_from(data, at)
    (signature, _, _, flags, method, _, _, crc32, length, size, name_length, extra_length, comment_length) = entry[:13]
    header = entry[16]
    middle = start + name_length
    end = middle + extra_length + comment_length
    if signature != b"PK\x01\x02" or end > len(data):
        raise _damaged(file, "its directory is cut short")
    name = data[start:middle]
    if 0xFFFFFFFF in (length, size, header):
        size, length, header = _zip64(file, data[middle : middle + extra_length], size, length, header)
    _check_member(file, name, flags, method, length, size)
    return _Member(name, method, crc32, length, size, header, 0), end


def _check_member(file: SourceFile, name: bytes, flags: int, method: int, length: int, size: int) -> None:
    where = f"{file.name}: {_text(file, name)!r}"
    if flags & _ENCRYPTED:
        raise ContainerError(f"{where}: encrypted", "unpack it with its password and pack it again without one")
    if method not in (_STORED, _DEFLATED):
        raise ContainerError(
            f"{where}: zip compression method {method}", "unpack it and pack it again with `zip -0 -r`"
        )
    if (method == _STORED and length != size) or size > (length + 1) * MAX_RATIO:
        raise _damaged(file, f"{_text(file, name)!r}: {length} bytes cannot hold {size}")
    if size > LARGE and size > length * MAX_RATIO_LARGE:
        raise ContainerError(
            f"{where}: {length} bytes that unfold to {size}: made to fill memory",
            "do not trust this file; if it is your own, unpack it and pack it again with `zip -0 -r`",
        )


def _zip64(file: SourceFile, extra: bytes, *fields: int) -> list[int]:
    """`fields` (size, length, header offset), each that is full replaced by its 64-bit value from the extra field."""
    wide = _extra(extra, 1)
    if len(wide) < 8 * fields.count(0xFFFFFFFF):
        raise _damaged(file, "a size is missing from its directory")
    values = iter(struct.unpack_from(f"<{len(wide) // 8}Q", wide))
    return [next(values) if field == 0xFFFFFFFF else field for field in fields]


def _extra(extra: bytes, wanted: int) -> bytes:
    """The extra field of id `wanted`, or nothing."""
    at = 0
    while at + 4 <= len(extra):
        id_, length = struct.unpack_from("<2H", extra, at)
        if id_ == wanted:
            return extra[at + 4 : at + 4 + length]
        at += 4 + length
    return b""


def _text(file: SourceFile, name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise _damaged(file, f"a member's name, {name[:100]!r}, is not UTF-8") from None


def _without_overlap(file: SourceFile, members: dict[str, _Member], end: int) -> dict[str, _Member]:
    """`members` with their ends; two that shared bytes would let a small file unfold into a large one."""
    ends = {}
    for name, member in sorted(members.items(), key=lambda item: item[1].header, reverse=True):
        if member.header + _LOCAL.size + len(member.raw_name) + member.length > end:
            raise _damaged(file, f"{name!r} overlaps what follows it")
        ends[name], end = end, member.header
    return {name: member._replace(end=ends[name]) for name, member in members.items()}


def _data_offset(file: SourceFile, name: str, member: _Member) -> int:
    """Where the member's data begins: after its local header, whose extra field has a length of its own."""
    header = file.read(member.header, _LOCAL.size + len(member.raw_name))
    signature, _, flags, method, _, _, *sums, name_length, extra_length = _LOCAL.unpack_from(header)
    same = name_length == len(member.raw_name) and header[_LOCAL.size :] == member.raw_name
    for ours, theirs in zip(sums, (member.crc32, member.length, member.size), strict=True):
        # Full where the number is in a zip64 field.
        same &= ours in (theirs, 0xFFFFFFFF) or bool(flags & _SIZES_FOLLOW and not ours)
    if signature != b"PK\x03\x04" or not same or method != member.method or flags & _ENCRYPTED:
        raise _damaged(file, f"{name!r}: the directory and the member's own header disagree")
    offset: int = member.header + len(header) + extra_length
    if offset + member.length > member.end:
        raise _damaged(file, f"{name!r} overlaps what follows it")
    return offset

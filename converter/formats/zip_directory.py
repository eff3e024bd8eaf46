"""Reads the directory of a zip archive, so that stored members can be read in place.

Python's zipfile does not give the offset of a member's data, and accepts archives that other programs read differently:
overlapping or duplicate members, end records or headers that disagree. Here these are errors. The format is PKWARE's
APPNOTE.TXT 6.3.10. torch stores members without compression and ends the archive with zip64 records.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

from converter.errors import ContainerError, printable
from converter.storage.byte_range import Storage, damaged
from converter.storage.local_file import SourceFile

MAX_DIRECTORY = 8 << 20  # bytes, for 100,000 members; directories of real checkpoints take less than one MiB
MAX_RATIO = 1032  # of inflated to deflated size: the most that deflate can reach
# Large members of weights do not compress well; those that do are made to fill memory.
LARGE, MAX_RATIO_LARGE = 256 << 20, 20

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")

_STORED, _DEFLATED = 0, 8
_ZIP64 = 1  # id of the extra field with 64-bit sizes
_ENCRYPTED = 0x2041  # flags: encrypted, strongly encrypted, directory masked
_SIZES_FOLLOW = 0x8  # flag of a local header that was written before its sizes and CRC were known
_MAX_COMMENT = 0xFFFF


class _Member(NamedTuple):
    """One entry of the directory. `end` is the offset of the next member or of the directory."""

    raw_name: bytes
    method: int
    crc32: int
    length: int
    size: int
    header: int
    end: int


class Directory(Mapping[str, Storage]):
    """The members of a zip archive by name.

    The local header of a member is read together with its data: on a hub each read is a request.
    """

    def __init__(self, file: SourceFile, members: dict[str, _Member]) -> None:
        self._file, self._members = file, members
        # torch.serialization.set_crc32_options(False) makes torch write zeros for all members.
        self.has_checksums = any(member.crc32 for member in members.values())

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, name: str) -> Storage:
        member = self._members[name]
        # Local header with the longest possible extra field, and the data.
        longest = _LOCAL.size + len(member.raw_name) + 0xFFFF + member.length
        return Storage(
            self._file,
            (member.header, min(member.end, member.header + longest)),
            member.length,
            member.size,
            printable(name),
            member.crc32 if self.has_checksums else None,
            deflated=member.method == _DEFLATED,
            find_offset=cache(partial(_data_offset, self._file, name, member)),
        )

    @property
    def root(self) -> str:
        """The top-level folder. As in torch, that of the first member."""
        return next(iter(self._members), "").partition("/")[0]


def is_zip(file: SourceFile) -> bool:
    return file.size > 4 and file.read(0, 4) == b"PK\x03\x04"


# Values must not refer to the file: it would never be freed.
_parsed: WeakKeyDictionary[SourceFile, dict[str, _Member]] = WeakKeyDictionary()


def read_directory(file: SourceFile) -> Directory:
    """Parse the directory of a zip archive, once per file."""
    members = _parsed.get(file)
    if members is None:
        members = _parsed[file] = _members(file, *_locate(file))
    return Directory(file, members)


def read_small(storage: Storage, limit: int, hint: str = "no checkpoint needs that: do not trust this file") -> bytes:
    """Read a member and check its CRC-32; ContainerError if it is damaged, or has more than `limit` bytes.

    Args:
        storage: The member.
        limit: The largest size in bytes.
        hint: The next step where the member is larger.
    """
    if storage.size > limit:
        raise ContainerError(f"{storage.file.name}: {storage.name}: {storage.size} bytes; the limit is {limit}", hint)
    return storage.read()


def _damaged(file: SourceFile, why: str) -> ContainerError:
    return damaged(f"{file.name}: a damaged zip archive: {why}")


# ---- locating the directory


def _locate(file: SourceFile) -> tuple[int, int, int]:
    """Offset and length of the directory, and the number of members."""
    end, record = _end_record(file)
    _, disk, first_disk, *narrow, _ = _END.unpack_from(record)
    start64 = end - _LOCATOR.size
    locator = file.read(start64, _LOCATOR.size) if start64 >= 0 else b""
    if locator[:4] == b"PK\x06\x07":
        end, wide = _end64_record(file, locator, start64)
        # Two programs could see two archives in one file if the end records disagreed.
        for bits, value, value64 in zip((16, 16, 32, 32), narrow, wide, strict=True):
            if value not in (value64, (1 << bits) - 1):
                raise _damaged(file, "its two end records disagree")
        narrow = wide
    count_here, count, length, offset = narrow
    if disk not in (0, 0xFFFF) or first_disk not in (0, 0xFFFF) or count_here != count:
        raise _damaged(file, "one part of a multi-part archive")
    if offset + length != end:
        raise _damaged(file, f"the directory ends at byte {offset + length}, not at {end}")
    if length > MAX_DIRECTORY or count * _CENTRAL.size > length:
        raise _damaged(file, f"a directory of {count} members in {length} bytes")
    return offset, length, count


def _end_record(file: SourceFile) -> tuple[int, bytes]:
    """Offset and bytes of the end record, which only a comment may follow."""
    # First without a comment, as torch writes it.
    for window in (_END.size, _END.size + _MAX_COMMENT):
        start = max(0, file.size - window)
        tail = file.read(start, file.size - start)
        pos = tail.rfind(b"PK\x05\x06")
        while pos >= 0:
            record = tail[pos:]
            if len(record) >= _END.size and int.from_bytes(record[20:22], "little") == len(record) - _END.size:
                return start + pos, record
            pos = tail.rfind(b"PK\x05\x06", 0, pos)
    raise ContainerError(
        f"{file.name}: truncated, or with data after its end: a zip archive (as torch.save writes) without a directory "
        "at its end",
        "the download or copy was not finished: download or copy it again",
    )


def _end64_record(file: SourceFile, locator: bytes, end: int) -> tuple[int, list[int]]:
    """Offset of the zip64 end record, and its counts, length and offset of the directory."""
    _, _, pos, _ = _LOCATOR.unpack(locator)
    record = file.read(pos, _END64.size) if pos + _END64.size <= end else bytes(_END64.size)
    signature, *fields = _END64.unpack(record)
    if signature != b"PK\x06\x06":
        raise _damaged(file, "its zip64 end record is missing")
    return pos, fields[5:]


# ---- the members


def _members(file: SourceFile, offset: int, length: int, count: int) -> dict[str, _Member]:
    data, pos, members = file.read(offset, length), 0, {}
    for _ in range(count):
        member, pos = _central(file, data, pos)
        name = _text(file, member.raw_name)
        if name in members:
            raise _damaged(file, f"duplicate member {name!r}")
        members[name] = member
    if pos != length:
        raise _damaged(file, f"{length - pos} extra bytes in the directory")
    return _without_overlap(file, members, offset)


def _central(file: SourceFile, data: bytes, pos: int) -> tuple[_Member, int]:
    """Parse the entry at `pos` of the directory; returns the member and the position of the next entry."""
    start = pos + _CENTRAL.size
    if start > len(data):
        raise _damaged(file, "its directory is truncated")
    entry = _CENTRAL.unpack_from(data, pos)
    signature, _, _, flags, method, _, _, crc32, length, size, name_length, extra_length, comment_length = entry[:13]
    header = entry[16]
    middle = start + name_length
    end = middle + extra_length + comment_length
    if signature != b"PK\x01\x02" or end > len(data):
        raise _damaged(file, "its directory is truncated")
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
            f"{where}: {length} bytes that inflate to {size}: made to fill memory",
            "do not trust this file; if it is your own, unpack it and pack it again with `zip -0 -r`",
        )


def _zip64(file: SourceFile, extra: bytes, *fields: int) -> list[int]:
    """The fields (size, length, header offset) with 64-bit values from the extra field where a field is 0xFFFFFFFF."""
    pos, wide = 0, b""
    while pos + 4 <= len(extra):
        id_, length = struct.unpack_from("<2H", extra, pos)
        if id_ == _ZIP64:
            wide = extra[pos + 4 : pos + 4 + length]
            break
        pos += 4 + length
    if len(wide) < 8 * fields.count(0xFFFFFFFF):
        raise _damaged(file, "a size is missing from its directory")
    values = iter(struct.unpack_from(f"<{len(wide) // 8}Q", wide))
    return [next(values) if field == 0xFFFFFFFF else field for field in fields]


def _text(file: SourceFile, name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise _damaged(file, f"a member's name, {name[:100]!r}, is not UTF-8") from None


def _without_overlap(file: SourceFile, members: dict[str, _Member], end: int) -> dict[str, _Member]:
    """Set the ends of members. Members that overlapped would let a small file expand to a large one."""
    ends = {}
    for name, member in sorted(members.items(), key=lambda item: item[1].header, reverse=True):
        if member.header + _LOCAL.size + len(member.raw_name) + member.length > end:
            raise _damaged(file, f"{name!r} overlaps the next member")
        ends[name], end = end, member.header
    return {name: member._replace(end=ends[name]) for name, member in members.items()}


def _data_offset(file: SourceFile, name: str, member: _Member) -> int:
    """Offset of the member's data, which follows its local header. Checks that header against the directory."""
    header = file.read(member.header, _LOCAL.size + len(member.raw_name))
    signature, _, flags, method, _, _, *sums, name_length, extra_length = _LOCAL.unpack_from(header)
    same = name_length == len(member.raw_name) and header[_LOCAL.size :] == member.raw_name
    for local, central in zip(sums, (member.crc32, member.length, member.size), strict=True):
        # 0xFFFFFFFF where the value is in a zip64 field.
        same &= local in (central, 0xFFFFFFFF) or bool(flags & _SIZES_FOLLOW and not local)
    if signature != b"PK\x03\x04" or not same or method != member.method or flags & _ENCRYPTED:
        raise _damaged(file, f"{name!r}: the directory and the member's own header disagree")
    offset: int = member.header + len(header) + extra_length
    if offset + member.length > member.end:
        raise _damaged(file, f"{name!r} overlaps the next member")
    return offset

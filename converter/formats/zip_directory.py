"""Reads the directory of a zip archive, so that stored members can be read in place.

Python's zipfile does not give the offset of a member's data, and accepts archives that programs read differently: with
overlapping or duplicate members, or contradictory records. Here these are errors. The format is PKWARE's
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

MAX_DIRECTORY_SIZE = 8 << 20  # enough for 100,000 members; directories of real checkpoints take less than one MiB
MAX_RATIO = 1032  # of decompressed to compressed size: the limit of deflate
# Large members of weights do not compress well. One that does is meant to fill the memory.
LARGE_SIZE, MAX_RATIO_IF_LARGE = 256 << 20, 20

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_DIRECTORY_ENTRY = struct.Struct("<4s6H3L5H2L")
_END_RECORD = struct.Struct("<4s4H2LH")
_ZIP64_LOCATOR = struct.Struct("<4sLQL")
_ZIP64_END_RECORD = struct.Struct("<4sQ2H2L4Q")

_STORED, _DEFLATED = 0, 8
_ZIP64_ID = 1  # of the extra field with 64-bit sizes
_ENCRYPTED_FLAGS = 0x2041  # encrypted, strongly encrypted, directory masked
_SIZES_FOLLOW_FLAG = 0x8  # of a local header that was written before sizes and CRC were known
_MAX_COMMENT_SIZE = 0xFFFF


class _Member(NamedTuple):
    """An entry of the directory."""

    raw_name: bytes
    method: int
    crc32: int
    compressed_size: int
    size: int  # after decompression
    header_offset: int
    end: int  # the offset of the next member, or of the directory


class Directory(Mapping[str, Storage]):
    """The members of a zip archive by name.

    The local header of a member is fetched together with its data, as each read from a hub is a request.
    """

    def __init__(self, file: SourceFile, members: dict[str, _Member]) -> None:
        self._file, self._members = file, members
        # After torch.serialization.set_crc32_options(False), torch writes zeros for all members.
        self.has_checksums = any(member.crc32 for member in members.values())

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, name: str) -> Storage:
        member = self._members[name]
        # The local header with the longest possible extra field, and the data.
        longest = _LOCAL_HEADER.size + len(member.raw_name) + 0xFFFF + member.compressed_size
        return Storage(
            self._file,
            (member.header_offset, min(member.end, member.header_offset + longest)),
            member.compressed_size,
            member.size,
            printable(name),
            member.crc32 if self.has_checksums else None,
            deflated=member.method == _DEFLATED,
            find_offset=cache(partial(_data_offset, self._file, name, member)),
        )

    @property
    def root(self) -> str:
        """The top-level folder of the first member, as in torch."""
        return next(iter(self._members), "").partition("/")[0]


def is_zip(file: SourceFile) -> bool:
    return file.size > 4 and file.read(0, 4) == b"PK\x03\x04"


# A value must not refer to its file, which would then never be freed.
_parsed: WeakKeyDictionary[SourceFile, dict[str, _Member]] = WeakKeyDictionary()


def read_directory(file: SourceFile) -> Directory:
    """Parse the directory of a zip archive, once per file."""
    members = _parsed.get(file)
    if members is None:
        members = _parsed[file] = _members(file, *_find_directory(file))
    return Directory(file, members)


def read_small(storage: Storage, limit: int, hint: str = "no checkpoint needs that: do not trust this file") -> bytes:
    """Read a whole member; ContainerError if it is damaged, or has more than `limit` bytes.

    Args:
        storage: The member.
        limit: The largest size in bytes.
        hint: The next step for a larger member.
    """
    if storage.size > limit:
        raise ContainerError(f"{storage.file.name}: {storage.name}: {storage.size} bytes; the limit is {limit}", hint)
    return storage.read()


def _damaged(file: SourceFile, why: str) -> ContainerError:
    return damaged(f"{file.name}: a damaged zip archive: {why}")


def _find_directory(file: SourceFile) -> tuple[int, int, int]:
    """Return the offset and the length of the directory, and the number of members."""
    end, record = _find_end_record(file)
    _, disk, first_disk, *narrow, _ = _END_RECORD.unpack_from(record)
    locator_offset = end - _ZIP64_LOCATOR.size
    locator = file.read(locator_offset, _ZIP64_LOCATOR.size) if locator_offset >= 0 else b""
    if locator[:4] == b"PK\x06\x07":
        end, wide = _read_zip64_end_record(file, locator, locator_offset)
        # If the end records disagreed, two programs could read two different archives from one file.
        for bits, value, value64 in zip((16, 16, 32, 32), narrow, wide, strict=True):
            if value not in (value64, (1 << bits) - 1):
                raise _damaged(file, "its two end records disagree")
        narrow = wide
    count_here, count, length, offset = narrow
    if disk not in (0, 0xFFFF) or first_disk not in (0, 0xFFFF) or count_here != count:
        raise _damaged(file, "one part of a multi-part archive")
    if offset + length != end:
        raise _damaged(file, f"the directory ends at byte {offset + length}, not at {end}")
    if length > MAX_DIRECTORY_SIZE or count * _DIRECTORY_ENTRY.size > length:
        raise _damaged(file, f"a directory of {count} members in {length} bytes")
    return offset, length, count


def _find_end_record(file: SourceFile) -> tuple[int, bytes]:
    """Return the offset and the bytes of the end record, which only a comment may follow."""
    # Without a comment first, as torch writes it.
    for window in (_END_RECORD.size, _END_RECORD.size + _MAX_COMMENT_SIZE):
        start = max(0, file.size - window)
        tail = file.read(start, file.size - start)
        pos = tail.rfind(b"PK\x05\x06")
        while pos >= 0:
            record = tail[pos:]
            comment_size = len(record) - _END_RECORD.size
            if comment_size >= 0 and comment_size == int.from_bytes(record[20:22], "little"):
                return start + pos, record
            pos = tail.rfind(b"PK\x05\x06", 0, pos)
    raise ContainerError(
        f"{file.name}: truncated, or with data after its end: a zip archive (as torch.save writes) without a directory "
        "at its end",
        "the download or copy was not finished: download or copy it again",
    )


def _read_zip64_end_record(file: SourceFile, locator: bytes, end: int) -> tuple[int, list[int]]:
    """Return the offset of the zip64 end record, and from it the counts, the length and the offset of the directory."""
    _, _, pos, _ = _ZIP64_LOCATOR.unpack(locator)
    size = _ZIP64_END_RECORD.size
    record = file.read(pos, size) if pos + size <= end else bytes(size)
    signature, *fields = _ZIP64_END_RECORD.unpack(record)
    if signature != b"PK\x06\x06":
        raise _damaged(file, "its zip64 end record is missing")
    return pos, fields[5:]


def _members(file: SourceFile, offset: int, length: int, count: int) -> dict[str, _Member]:
    data, pos, members = file.read(offset, length), 0, {}
    for _ in range(count):
        member, pos = _parse_entry(file, data, pos)
        name = _decode_name(file, member.raw_name)
        if name in members:
            raise _damaged(file, f"duplicate member {name!r}")
        members[name] = member
    if pos != length:
        raise _damaged(file, f"{length - pos} extra bytes in the directory")
    return _without_overlap(file, members, offset)


def _parse_entry(file: SourceFile, data: bytes, pos: int) -> tuple[_Member, int]:
    """Parse the entry at `pos` of the directory; return the member and the position of the next entry."""
    start = pos + _DIRECTORY_ENTRY.size
    if start > len(data):
        raise _damaged(file, "its directory is truncated")
    entry = _DIRECTORY_ENTRY.unpack_from(data, pos)
    signature, _, _, flags, method, _, _, crc32, packed, size, name_length, extra_length, comment_length = entry[:13]
    header_offset = entry[16]
    extra_start = start + name_length
    end = extra_start + extra_length + comment_length
    if signature != b"PK\x01\x02" or end > len(data):
        raise _damaged(file, "its directory is truncated")
    name = data[start:extra_start]
    if 0xFFFFFFFF in (packed, size, header_offset):
        extra = data[extra_start : extra_start + extra_length]
        size, packed, header_offset = _zip64_fields(file, extra, size, packed, header_offset)
    _check_member(file, name, flags, method, packed, size)
    return _Member(name, method, crc32, packed, size, header_offset, 0), end


def _check_member(file: SourceFile, name: bytes, flags: int, method: int, length: int, size: int) -> None:
    where = f"{file.name}: {_decode_name(file, name)!r}"
    if flags & _ENCRYPTED_FLAGS:
        raise ContainerError(f"{where}: encrypted", "unpack it with its password and pack it again without one")
    if method not in (_STORED, _DEFLATED):
        raise ContainerError(
            f"{where}: zip compression method {method}", "unpack it and pack it again with `zip -0 -r`"
        )
    if (method == _STORED and length != size) or size > (length + 1) * MAX_RATIO:
        raise _damaged(file, f"{_decode_name(file, name)!r}: {length} bytes cannot hold {size}")
    if size > LARGE_SIZE and size > length * MAX_RATIO_IF_LARGE:
        raise ContainerError(
            f"{where}: {length} bytes that inflate to {size}: made to fill memory",
            "do not trust this file; if it is your own, unpack it and pack it again with `zip -0 -r`",
        )


def _zip64_fields(file: SourceFile, extra: bytes, *fields: int) -> list[int]:
    """Replace fields (size, compressed size, header offset) of 0xFFFFFFFF by the 64-bit values in the extra field."""
    pos, wide = 0, b""
    while pos + 4 <= len(extra):
        id_, length = struct.unpack_from("<2H", extra, pos)
        if id_ == _ZIP64_ID:
            wide = extra[pos + 4 : pos + 4 + length]
            break
        pos += 4 + length
    if len(wide) < 8 * fields.count(0xFFFFFFFF):
        raise _damaged(file, "a size is missing from its directory")
    values = iter(struct.unpack_from(f"<{len(wide) // 8}Q", wide))
    return [next(values) if field == 0xFFFFFFFF else field for field in fields]


def _decode_name(file: SourceFile, name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise _damaged(file, f"a member's name, {name[:100]!r}, is not UTF-8") from None


def _without_overlap(file: SourceFile, members: dict[str, _Member], end: int) -> dict[str, _Member]:
    """Set the ends of members; ContainerError if members overlap, so that a small file could expand to a large one."""
    ends = {}
    for name, member in sorted(members.items(), key=lambda item: item[1].header_offset, reverse=True):
        if member.header_offset + _LOCAL_HEADER.size + len(member.raw_name) + member.compressed_size > end:
            raise _damaged(file, f"{name!r} overlaps the next member")
        ends[name], end = end, member.header_offset
    return {name: member._replace(end=ends[name]) for name, member in members.items()}


def _data_offset(file: SourceFile, name: str, member: _Member) -> int:
    """Return the offset of a member's data; ContainerError if its local header contradicts the directory."""
    header = file.read(member.header_offset, _LOCAL_HEADER.size + len(member.raw_name))
    signature, _, flags, method, _, _, *sums, name_length, extra_length = _LOCAL_HEADER.unpack_from(header)
    is_same = name_length == len(member.raw_name) and header[_LOCAL_HEADER.size :] == member.raw_name
    for local, central in zip(sums, (member.crc32, member.compressed_size, member.size), strict=True):
        # 0xFFFFFFFF means that the value is in a zip64 field.
        is_same &= local in (central, 0xFFFFFFFF) or bool(flags & _SIZES_FOLLOW_FLAG and not local)
    if signature != b"PK\x03\x04" or not is_same or method != member.method or flags & _ENCRYPTED_FLAGS:
        raise _damaged(file, f"{name!r}: the directory and the member's own header disagree")
    offset: int = member.header_offset + len(header) + extra_length
    if offset + member.compressed_size > member.end:
        raise _damaged(file, f"{name!r} overlaps the next member")
    return offset

"""Mutations that keep an input's structure valid (CRCs, lengths, brackets, opcodes) to get past the first checks.

Each takes an input, the most bytes that another may have, a source of chance, and the fuzzer's own mutation of bytes.
An input that has lost its form is left to that one. So is one in four that has not: what is malformed is tried too.
"""

from __future__ import annotations

import io
import json
import math
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from random import Random
from typing import Any

from converter.tensors.dtypes import BY_CODE

Mutate = Callable[[bytes, int], bytes]
Mutator = Callable[[bytes, int, Random, Mutate], bytes]

# Critical integers: signs, bounds of types, more digits than Python prints.
NUMBERS = [0, 1, 2, 3, 7, 8, 63, 64, 65, 255, 256, 65535, 65536]
NUMBERS += [sign * (1 << bits) + off for bits in (31, 32, 40, 62, 63, 64, 80) for sign in (1, -1) for off in (-1, 0, 1)]
WORDS = [
    "",
    ".",
    "..",
    "/",
    "a/b",
    "module.",
    "module.module.",
    "_orig_mod.",
    "x." * 30,
    "\ud800",
    "\x1b[31m",
    "é",
    "0",
    "-1",
    "10" * 9,
]


def plain(data: bytes, most: int, chance: Random, mutate: Mutate) -> bytes:
    return mutate(data, most)


def _formed(mutator: Mutator) -> Mutator:
    """`mutator` for inputs with its structure, and the fuzzer's own mutation for others."""

    def wrapped(data: bytes, most: int, chance: Random, mutate: Mutate) -> bytes:
        if chance.random() < 0.25:
            return mutate(data, most)
        try:
            result = mutator(data, most, chance, mutate)
        except Exception:  # parsers may raise anything for a malformed input
            return mutate(data, most)
        return result if len(result) <= most else mutate(data, most)

    return wrapped


# ---- JSON


@_formed
def json_document(data: bytes, most: int, chance: Random, mutate: Mutate) -> bytes:
    document = json.loads(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        document = changed(document, chance)
    return json.dumps(document).encode()


def changed(document: Any, chance: Random) -> Any:
    """A JSON document with one change somewhere in it."""
    places = list(_places(document))
    if not places or chance.random() < 0.02:
        return _value(chance)
    holder, key = chance.choice(places)
    what = chance.randrange(6)
    if what == 0:
        del holder[key]
    elif what == 1:
        other_holder, other = chance.choice(places)
        holder[key], other_holder[other] = other_holder[other], holder[key]
    elif what == 2 and isinstance(holder, dict):
        holder[_word(key, chance)] = holder.pop(key) if chance.random() < 0.5 else holder[key]
    elif what == 3 and isinstance(holder, list):
        holder.insert(chance.randint(0, len(holder)), holder[key])
    else:
        holder[key] = _alike(holder[key], chance) if chance.random() < 0.8 else _value(chance)
    return document


def _places(document: Any) -> Iterable[tuple[Any, Any]]:
    keys = document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in keys:
        yield document, key
        yield from _places(document[key])


def _alike(value: Any, chance: Random) -> Any:
    """Another value of the same type, mostly."""
    if type(value) is int:
        return value + chance.choice((-1, 1, value)) if chance.random() < 0.3 else chance.choice(NUMBERS)
    if isinstance(value, str):
        return chance.choice(list(BY_CODE)) if value in BY_CODE else _word(value, chance)
    return _value(chance)


def _word(text: str, chance: Random) -> str:
    at = chance.randint(0, len(text))
    word = chance.choice(WORDS)
    return chance.choice((word, word + text, text + word, text[:at] + word + text[at:], text[:at]))


def _value(chance: Random) -> Any:
    return chance.choice([None, True, 1.5, 1e999, "F32", [], {}, [[]], [1, 2], {"dtype": "F32"}, *NUMBERS[:5], 10**400])


# ---- safetensors


def safetensors_file(tensors: Mapping[str, tuple[str, list[int]]]) -> bytes:
    """A file of tensors, given as name -> (dtype code, shape), with bytes 0, 1, 2, ..."""
    header, end = {}, 0
    for name, (code, shape) in tensors.items():
        begin, end = end, end + BY_CODE[code].nbytes(math.prod(shape))
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
    return _with_header(header, bytes(i & 255 for i in range(end)))


def _with_header(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@_formed
def safetensors(data: bytes, most: int, chance: Random, mutate: Mutate) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    for _ in range(chance.randint(1, 3)):
        header = changed(header, chance)
    if chance.random() < 0.5:
        body = _laid_out(header, body, most)
    return _with_header(header, body)


def _laid_out(header: dict[str, Any], body: bytes, most: int) -> bytes:
    """Set the offsets of a header from its shapes, and add data of that size."""
    end = 0
    for name, entry in header.items():
        if name != "__metadata__":
            if not all(type(size) is int for size in entry["shape"]):
                raise ValueError
            begin, end = end, end + BY_CODE[entry["dtype"]].nbytes(math.prod(entry["shape"]))
            entry["data_offsets"] = [begin, end]
    if not 0 <= end <= most:
        raise ValueError
    return (body + bytes(end))[:end]


# ---- GGUF


@_formed
def gguf(data: bytes, most: int, chance: Random, mutate: Mutate) -> bytes:
    """The file with changed keys or descriptions of tensors, and valid counts."""
    version, (keys, tensors), end = data[4:8], _gguf_entries(data), -len(data) % 32
    for _ in range(chance.choice((1, 1, 2))):
        entries = chance.choice([each for each in (keys, tensors) if each])
        at, what = chance.randrange(len(entries)), chance.randrange(5)
        if what == 0:
            del entries[at]
        elif what == 1:
            entries.insert(chance.randint(0, len(entries)), chance.choice(entries))
        elif what == 2:
            entries[at] = mutate(entries[at], len(entries[at]) + 8)
        else:
            code = chance.choice("IQ")
            number = struct.pack(f"<{code}", chance.choice(NUMBERS) % (1 << 8 * struct.calcsize(code)))
            pos = chance.randrange(len(entries[at]))
            entries[at] = entries[at][:pos] + number + entries[at][pos + len(number) :]
    head = b"GGUF" + version + struct.pack("<QQ", len(tensors), len(keys)) + b"".join([*keys, *tensors])
    return head + bytes(-len(head) % 32) + data[_gguf_end(data) :] + bytes(end)


def _gguf_entries(data: bytes) -> tuple[list[bytes], list[bytes]]:
    """The keys with their values, and the descriptions of tensors."""
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    num_tensors, num_keys = struct.unpack_from("<QQ", data, 8)
    pos, found = 24, ([], [])  # type: tuple[int, tuple[list[bytes], list[bytes]]]

    def text(at: int) -> int:
        return at + 8 + int.from_bytes(data[at : at + 8], "little")

    for is_tensor in [False] * min(num_keys, most := len(data)) + [True] * min(num_tensors, most):
        end = text(pos)
        kind = int.from_bytes(data[end : end + 4], "little")
        end += 4
        if is_tensor:
            end += 8 * kind + 12
        elif kind == 9:
            kind, count = struct.unpack_from("<IQ", data, end)
            end += 12
            for _ in range(min(count, most)):
                end = text(end) if kind == 8 else end + sizes[kind]
        else:
            end = text(end) if kind == 8 else end + sizes[kind]
        if end > most:
            raise ValueError
        found[is_tensor].append(data[pos:end])
        pos = end
    return found


def _gguf_end(data: bytes) -> int:
    """The offset of the tensors' data, with the usual alignment."""
    length = 24 + sum(len(entry) for entries in _gguf_entries(data) for entry in entries)
    return length + -length % 32


# ---- pickles, also consecutive ones of the legacy format


# Opcodes with arguments that the reader supports; each may be anywhere.
_OPCODES = [
    *(bytes([code]) for code in b"().0125NRabdelostu}]\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x93\x94Q"),
    *(b"h" + bytes([i]) for i in range(4)),
    *(b"q" + bytes([i]) for i in range(4)),
    *(b"\x8a" + bytes([n]) + b"\xff" * (n - 1) + b"\x7f" for n in (1, 4, 8, 9, 255)),
    b"\x8b\0\4\0\0" + b"\xff" * 1023 + b"\x7f",
    b"J\xff\xff\xff\xff",
    b"K\0",
    b"K\1",
    b"M\xff\xff",
    b"X\5\0\0\0xx.yy",
    b"U\1x",
    b"C\1x",
    b"Vx\n",
    b"G" + struct.pack(">d", math.nan),
    *(f"c{module}\n{name}\n".encode() for module, name in (
        ("os", "system"),
        ("builtins", "eval"),
        ("collections", "OrderedDict"),
        ("collections", "Counter"),
        ("torch", "Size"),
        ("torch", "device"),
        ("torch", "FloatStorage"),
        ("torch", "HalfStorage"),
        ("torch", "float8_e5m2"),
        ("torch.storage", "UntypedStorage"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_tensor_v3"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch._utils", "_rebuild_sparse_tensor"),
        ("_codecs", "encode"),
        ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
        ("__torch__.m", "M"),
    )),
]  # fmt: skip


@_formed
def pickle(data: bytes, most: int, chance: Random, mutate: Mutate) -> bytes:
    parts = _parts(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.randrange(len(parts))
        what = chance.randrange(6)
        if what == 0:
            del parts[at]
        elif what == 1:
            parts.insert(at, chance.choice(_OPCODES))
        elif what == 2:
            parts.insert(at, chance.choice(parts))
        elif what == 3:
            length = chance.randint(1, 12)
            parts[at:at] = parts[at : at + length] * chance.choice((1, 1, 1, 50))
        elif what == 4:
            other = chance.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        else:
            parts[at] = (
                _number(chance)
                if parts[at][:1] in (b"K", b"M", b"J", b"\x8a", b"I", b"L")
                else (parts[at][:1] + mutate(parts[at][1:] or b"\0", len(parts[at]) + 8))
            )
    return b"".join(parts)


def _parts(data: bytes) -> list[bytes]:
    """The opcodes with arguments of all pickles at the start of `data`, and the rest of the data."""
    parts: list[bytes] = []
    at = 0
    while at < len(data):
        try:
            found = [at + pos for _, _, pos in pickletools.genops(data[at:]) if pos is not None]
        except Exception:  # pickletools may raise anything for malformed bytes
            break
        end = data.index(b".", found[-1]) + 1
        parts += [data[a:b] for a, b in zip(found, [*found[1:], end], strict=True)]
        at = end
    return [*parts, data[at:]]


def _number(chance: Random) -> bytes:
    number = chance.choice(NUMBERS)
    if 0 <= number < 256:
        return bytes([ord("K"), number])
    text = number.to_bytes(12, "little", signed=True)
    return b"\x8a" + bytes([len(text)]) + text


# ---- zip archives


@_formed
def archive(data: bytes, most: int, chance: Random, mutate: Mutate) -> bytes:
    """The archive with one or two changed members and valid lengths and checksums."""
    members = members_of(data)
    for _ in range(chance.randint(1, 2)):
        at = _member(members, chance)
        name, held, method = members[at]
        what = chance.randrange(12)
        if what == 0:
            del members[at]
        elif what == 1:
            members[at] = (chance.choice(members)[0], held, method)
        elif what == 2:
            members[at] = (name, held, zipfile.ZIP_DEFLATED if method == zipfile.ZIP_STORED else zipfile.ZIP_STORED)
        elif what == 3:
            members.insert(chance.randint(0, len(members)), (_word(name, chance), held, method))
        elif name.endswith(".pkl"):
            members[at] = (name, pickle(held, most, chance, mutate), method)
        elif name.endswith(".py"):
            members[at] = (name, lines(held, most, chance, mutate), method)
        else:
            members[at] = (name, mutate(held or b"\0", len(held) + 8), method)
    return packed(members)


def members_of(data: bytes) -> list[tuple[str, bytes, int]]:
    """The members of a zip archive: name, bytes, method."""
    with zipfile.ZipFile(io.BytesIO(data)) as source:
        return [(info.filename, source.read(info), info.compress_type) for info in source.infolist()]


def _member(members: list[tuple[str, bytes, int]], chance: Random) -> int:
    """The member to change: mostly a pickle or code, since other members are not parsed."""
    parsed = [i for i, (name, _, _) in enumerate(members) if name.endswith((".pkl", ".py", "byteorder"))]
    return chance.choice(parsed) if parsed and chance.random() < 0.8 else chance.randrange(len(members))


def packed(members: Iterable[tuple[str, bytes, int]]) -> bytes:
    """A zip archive of members: name, bytes, method."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        for name, held, method in members:
            # A constant date, so that inputs are reproducible.
            info = zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0))
            info.compress_type = method
            target.writestr(info, held)
    return buffer.getvalue()


# ---- folders of torch.distributed.checkpoint


def dcp_parts(data: bytes) -> tuple[bytes, bytes]:
    """`.metadata`, whose length is in the first four bytes, and the file of chunks."""
    end = 4 + int.from_bytes(data[:4], "little")
    return data[4:end], data[end:]


def dcp_input(metadata: bytes, chunks: bytes) -> bytes:
    return len(metadata).to_bytes(4, "little") + metadata + chunks


@_formed
def dcp(data: bytes, most: int, chance: Random, mutate: Mutate) -> bytes:
    metadata, chunks = dcp_parts(data)
    if chance.random() < 0.9:
        return dcp_input(pickle(metadata, most, chance, mutate), chunks)
    return dcp_input(metadata, mutate(chunks or b"\0", len(chunks) + 8))


# ---- text


@_formed
def lines(data: bytes, most: int, chance: Random, mutate: Mutate) -> bytes:
    """YAML or code with changed lines or words."""
    rows = data.decode().split("\n")
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.randrange(len(rows))
        what = chance.randrange(5)
        if what == 0:
            del rows[at]
        elif what == 1:
            rows.insert(at, chance.choice(rows))
        elif what == 2:
            rows[at] = chance.choice(("  ", "- ", "", "? ", ": ", "{", "[")) + rows[at]
        elif what == 3:
            words = re.split(r"(\W+)", chance.choice(rows))
            mine = re.split(r"(\W+)", rows[at])
            mine[chance.randrange(len(mine))] = chance.choice(words)
            rows[at] = "".join(mine)
        else:
            mine = re.split(r"([\w-]+)", rows[at])
            mine[chance.randrange(len(mine))] = chance.choice((*WORDS, *map(str, NUMBERS), *_TOKENS))
            rows[at] = "".join(mine)
    return "\n".join(rows).encode(errors="replace")


_TOKENS = (
    *("{layer}", "{layer+1}", "{layer-1}", "{rest}", "{proj}", "int", "name", "path", "optional", "on_read", "fuse"),
    *(
        "split",
        "keep",
        "drop",
        "rename",
        "parts",
        "into",
        "to",
        "then",
        "dim",
        "because",
        "prefix",
        "other_rules",
        "!!x",
        "&a",
    ),
    *(
        "*a",
        "<<",
        "|",
        ">",
        "'",
        '"',
        "squeeze",
        "unsqueeze",
        "reshape",
        "permute",
        "deinterleave",
        "reorder",
    ),
    *(
        "[0, 1]",
        "[]",
        "{}",
        "{from: [2, 3], to: [6]}",
        "{heads: 2, parts: 3}",
        "float16",
        "'",
        "#",
        "%YAML 9",
        "---",
        "...",
    ),
)

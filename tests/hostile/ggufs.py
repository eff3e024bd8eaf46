"""GGUF files: headers that are inconsistent, invalid or too large, and unusual valid files.

`test_loaders_gguf` tries all of them in one process; those of CASES are runs of the program, for time and memory.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from hostile.case import Accepted, Case, Refused, State, sam
from hostile.tensorfiles import ODD, cast, mixed, put

TYPES = {torch.float32: 0, torch.float16: 1, torch.int8: 24, torch.int32: 26, torch.float64: 28, torch.bfloat16: 30}
KEY, FIRST = "image_encoder.pos_embed", "image_encoder.blocks.0.attn.proj.bias"
UINT32, FLOAT, STRING, ARRAY = 4, 6, 8, 9


class Described(NamedTuple):
    """The description of a tensor in a header. Without an offset, it follows the one before it."""

    name: bytes
    shape: tuple[int, ...]  # in ggml's order
    type: int
    data: bytes
    offset: int | None = None


def described(state: State) -> list[Described]:
    return [
        Described(
            name.encode(),
            tuple(reversed(tensor.shape)),
            TYPES[tensor.dtype],
            bytes(tensor.contiguous().flatten().view(torch.uint8).tolist()),
        )
        for name, tensor in state.items()
    ]


def text(value: str | bytes, length: int | None = None) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data) if length is None else length) + data


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, data: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + data


ARCHITECTURE = key("general.architecture", STRING, text("clip"))


def written(
    tensors: Iterable[Described],
    keys: Iterable[bytes] = (ARCHITECTURE,),
    *,
    version: int = 3,
    alignment: int = 32,
    num_tensors: int | None = None,
    num_keys: int | None = None,
) -> bytes:
    """A file of these descriptions and keys; the counts may be others."""
    tensors, keys = list(tensors), list(keys)
    parts: list[bytes] = []
    infos: list[bytes] = []
    end = 0
    for each in tensors:
        offset = end if each.offset is None else each.offset
        infos += [text(each.name), struct.pack(f"<I{len(each.shape)}Q", len(each.shape), *each.shape)]
        infos.append(struct.pack("<IQ", each.type, offset))
        parts += [each.data, bytes(-len(each.data) % alignment)]
        end += len(each.data) + len(parts[-1])
    counts = (len(tensors) if num_tensors is None else num_tensors, len(keys) if num_keys is None else num_keys)
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join([*keys, *infos])
    return head + bytes(-len(head) % alignment) + b"".join(parts)


def tiny(**options: Any) -> Callable[[], bytes]:
    return lambda: written(described(sam()), **options)


def changed(**fields: Any) -> Callable[[], bytes]:
    """A tiny SAM with changed fields of one tensor."""
    return lambda: written([d._replace(**fields) if d.name == KEY.encode() else d for d in described(sam())])


def more(*tensors: Described) -> Callable[[], bytes]:
    return lambda: written([*described(sam()), *tensors])


def with_key(kind: int, value: bytes, name: str | bytes = "a") -> Callable[[], bytes]:
    return tiny(keys=[ARCHITECTURE, key(name, kind, value)])


def aligned_to(value: bytes, kind: int = UINT32) -> Callable[[], bytes]:
    return with_key(kind, value, "general.alignment")


def cut(end: int) -> Callable[[], bytes]:
    return lambda: tiny()()[:end]


def empty(name: str | bytes, type: int = 0, shape: tuple[int, ...] = (0,)) -> Described:
    return Described(name.encode() if isinstance(name, str) else name, shape, type, b"")


def quantised(where: str) -> Callable[[], bytes]:
    """A tiny SAM with one more tensor of type Q8_0."""
    return more(Described(where.encode(), (64, 2), 8, bytes(2 * 2 * 34)))


def u32(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


# ---- valid files


def _big_alignment(value: int) -> Callable[[], bytes]:
    return tiny(keys=[ARCHITECTURE, key("general.alignment", UINT32, u32(value))], alignment=value)


def every_value() -> list[bytes]:
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    scalars = [key(f"scalar.{kind}", kind, b"\1" * size) for kind, size in sizes.items()]
    arrays = [key(f"array.{kind}", ARRAY, array(kind, 3, b"\1" * 3 * size)) for kind, size in sizes.items()]
    return [*scalars, *arrays, key("texts", ARRAY, array(STRING, 2, text("a") + text("\x1b[2J")))]


DROPPED = "prompt_encoder.x"
LEGAL: dict[str, Callable[[], bytes]] = {
    "version 2": tiny(version=2),
    "no keys": tiny(keys=()),
    "every type of value": tiny(keys=every_value()),
    "empty arrays": tiny(keys=[key(f"a{kind}", ARRAY, array(kind, 0, b"")) for kind in (UINT32, STRING)]),
    "a value that is not UTF-8": with_key(STRING, text(b"\xff\xfe")),
    "an empty key": with_key(UINT32, u32(1), ""),
    "an odd key": with_key(UINT32, u32(1), "\x1b[2J\n"),
    "300 kB of vocabulary": with_key(ARRAY, array(STRING, 20_000, text("a token") * 20_000)),
    **{f"an alignment of {value}": _big_alignment(value) for value in (1, 8, 64, 4096)},
    "no padding at the end": lambda: written(
        [*described(sam()), Described(DROPPED.encode(), (3,), 24, b"abc")]
    ).removesuffix(bytes(29)),
    "quantised, dropped": quantised(DROPPED),
    "a scalar, dropped": more(Described(DROPPED.encode(), (), 0, bytes(4))),
    "nothing, dropped": more(empty(DROPPED, shape=(2**40, 0, 2**20))),
    **{f"a name that {what}, dropped": more(empty(f"prompt_encoder.{name[:900]}")) for what, name in ODD.items()},
    "called sam.bin": tiny(),
}
MIXED: dict[str, Callable[[], State]] = {
    **{str(dtype): cast(dtype) for dtype in (torch.float64, torch.bfloat16, torch.float16)},
    "a mixture": mixed,
}

# ---- invalid files

UNKNOWN_TYPE = ("has the unknown type", KEY)
ALIGNMENT = ("general.alignment must be an unsigned 32-bit power of two",)
TRUNCATED = ("truncated: its header exceeds",)
OFFSET = ("of the data; expected",)
IMPOSSIBLE = ("has the impossible shape",)
LIMIT = ("a header of more than 33554432 bytes",)

REFUSED: dict[str, tuple[Callable[[], bytes], tuple[str, ...]]] = {
    "the magic alone": (cut(4), TRUNCATED),
    "half a version": (cut(6), TRUNCATED),
    "no counts": (cut(8), TRUNCATED),
    "half the counts": (cut(20), TRUNCATED),
    "no keys": (cut(24), TRUNCATED),
    "half a key": (cut(40), TRUNCATED),
    "half the header": (cut(500), TRUNCATED),
    "no data": (lambda: written([d._replace(data=b"", offset=0) for d in described(sam())][:1]), ("truncated: exp",)),
    "half the data": (lambda: tiny()()[:-4096], ("truncated: expected",)),
    "a byte missing": (
        lambda: written([Described(FIRST.encode(), (8,), 0, bytes(32))])[:-1],
        ("truncated: expected",),
    ),
    "a byte left over": (lambda: tiny()() + bytes(33), ("extra bytes at the end",)),
    "a megabyte left over": (lambda: tiny()() + bytes(1 << 20), ("extra bytes at the end",)),
    **{
        f"version {version}": (tiny(version=version), (f"GGUF version {version}; supported are 2 and 3",))
        for version in (0, 1, 4, 255, 2**32 - 1)
    },
    "big-endian": (tiny(version=0x03000000), ("a big-endian GGUF file", "gguf-convert-endian")),
    "big-endian, version 2": (tiny(version=0x02000000), ("a big-endian GGUF file",)),
    **{
        f"{count} {what}s": (tiny(**{f"num_{what}s": count}), (f"{count} {what}s; the limit is 65536",))
        for what in ("tensor", "key")
        for count in (65_537, 2**32, 2**63, 2**64 - 1)
    },
    "a tensor more than there are": (lambda: tiny(num_tensors=len(sam()) + 1)(), ("damaged GGUF file",)),
    "a tensor fewer than there are": (lambda: tiny(num_tensors=len(sam()) - 1)(), ("damaged GGUF file",)),
    "65536 tensors of none": (tiny(num_tensors=65_536), ("damaged GGUF file",)),
    "a key more than there are": (tiny(num_keys=2), ("damaged GGUF file",)),
    "65536 keys of one": (tiny(num_keys=65_536), ("damaged GGUF file",)),
    "no tensors": (lambda: written([]), ("a GGUF file without tensors",)),
    # Keys and values.
    "a key twice": (tiny(keys=[ARCHITECTURE] * 2), ("the key 'general.architecture' is there twice",)),
    "a key that is not UTF-8": (with_key(UINT32, u32(1), b"\xff\xfe"), ("not UTF-8",)),
    "half of a surrogate pair as a key": (with_key(UINT32, u32(1), b"\xed\xa0\x80"), ("not UTF-8",)),
    "a key of 65536 bytes": (with_key(UINT32, u32(1), "a" * 65536), ("a name of 65536 bytes",)),
    "a key of 2**63 bytes": (tiny(keys=[text("a", 2**63)]), ("a name of 9223372036854775808 bytes",)),
    "a key of 2**64 - 1 bytes": (tiny(keys=[text("a", 2**64 - 1)]), ("a name of 18446744073709551615 bytes",)),
    **{
        f"the type of value {kind}": (with_key(kind, u32(1)), (f"the key 'a' has the unknown type {kind}",))
        for kind in (13, 255, 2**32 - 1)
    },
    "a text beyond the file": (with_key(STRING, text("a", 1 << 24)), TRUNCATED),
    "a text of 2**63 bytes": (with_key(STRING, text("a", 2**63)), TRUNCATED),
    "a text of 2**64 - 1 bytes": (with_key(STRING, text("a", 2**64 - 1)), TRUNCATED),
    "an array beyond the file": (with_key(ARRAY, array(UINT32, 1 << 24, b"")), TRUNCATED),
    "an array of 2**62 numbers of 4 bytes": (with_key(ARRAY, array(UINT32, 2**62, b"")), TRUNCATED),
    "an array of 2**64 - 1 bytes": (with_key(ARRAY, array(0, 2**64 - 1, b"")), TRUNCATED),
    "an array of 2**64 - 1 texts": (with_key(ARRAY, array(STRING, 2**64 - 1, b"")), ("truncated",)),
    "a nested array": (with_key(ARRAY, array(ARRAY, 1, array(UINT32, 1, u32(1)))), ("'a' has nested arrays",)),
    "an array nested 10000 times": (with_key(ARRAY, array(ARRAY, 1, b"") * 10_000), ("'a' has nested arrays",)),
    "an empty nested array": (with_key(ARRAY, array(ARRAY, 0, b"")), ("'a' has nested arrays",)),
    "an array of an unknown type": (with_key(ARRAY, array(99, 1, b"")), ("'a' has the unknown type 99",)),
    "a key that steers terminals": (with_key(99, b"", "\x1b[2J"), ("the key '\\x1b[2J' has",)),
    "an alignment of 0": (aligned_to(u32(0)), ALIGNMENT),
    "an alignment of 3": (aligned_to(u32(3)), ALIGNMENT),
    "an alignment of 2**32 - 1": (aligned_to(u32(2**32 - 1)), ALIGNMENT),
    "an alignment of 2**31": (aligned_to(u32(2**31)), OFFSET),
    "an alignment of 64 that is not kept": (aligned_to(u32(64)), OFFSET),
    "a negative alignment": (aligned_to(struct.pack("<i", -32), 5), ALIGNMENT),
    "an alignment as a float": (aligned_to(struct.pack("<f", 32), FLOAT), ALIGNMENT),
    "an alignment as a text": (aligned_to(text("32"), STRING), ALIGNMENT),
    "an alignment as an array": (aligned_to(array(UINT32, 1, u32(32)), ARRAY), ALIGNMENT),
    "an alignment twice": (
        tiny(keys=[key("general.alignment", UINT32, u32(value)) for value in (32, 64)]),
        ("'general.alignment' is there twice",),
    ),
    # Tensors.
    "a tensor twice": (lambda: more(described(sam())[0])(), ("is there twice",)),
    "a name that is not UTF-8": (changed(name=b"\xff"), ("not UTF-8",)),
    "a name of 65536 bytes": (changed(name=b"a" * 65536), ("a name of 65536 bytes",)),
    "no name": (changed(name=b""), ("by sam-meta.yaml",)),
    **{f"the type {number}": (changed(type=number), UNKNOWN_TYPE) for number in (4, 5, 31, 33, 36, 42, 2**32 - 1)},
    "5 dimensions": (changed(shape=(24, 4, 4, 1, 1)), ("has 5 dimensions; the limit is 4",)),
    "65536 dimensions": (changed(shape=(1,) * 65536), ("has 65536 dimensions",)),
    "a shape of 2**40 * 2**40": (changed(shape=(2**40, 2**40)), IMPOSSIBLE),
    "a shape of 2**63": (changed(shape=(2**63,)), IMPOSSIBLE),
    "a shape of 2**64 - 1": (changed(shape=(2**64 - 1,)), IMPOSSIBLE),
    "a shape of 2**32 * 2**32": (changed(shape=(2**32, 2**32)), IMPOSSIBLE),
    "a terabyte": (changed(shape=(2**38,)), OFFSET),
    "a terabyte at the end": (more(empty("x", shape=(2**38,))), ("truncated: expected",)),
    "a tensor too short": (changed(shape=(24, 4, 2, 1)), OFFSET),
    "a tensor too long": (changed(shape=(24, 4, 8, 1)), OFFSET),
    "a type of other size": (changed(type=28), OFFSET),
    "a tensor on top of another": (more(Described(b"x", (8,), 0, b"", offset=0)), OFFSET),
    "a tensor on top of the next": (more(Described(b"x", (8,), 0, b""), empty("y")), OFFSET),
    "a tensor a little further": (lambda: changed(offset=1 << 20)(), OFFSET),
    "an offset that is not aligned": (changed(offset=1), OFFSET),
    "an offset of 2**63": (changed(offset=2**63), OFFSET),
    "an offset of 2**64 - 1": (changed(offset=2**64 - 1), OFFSET),
    "an offset of 2**64 - 32": (changed(offset=2**64 - 32), OFFSET),
    "two tensors in one place": (lambda: written([d._replace(offset=0) for d in described(sam())]), OFFSET),
    "tensors in another order": (
        lambda: written([d._replace(offset=32 * (9 - i)) for i, d in enumerate(described(sam())[:10])]),
        OFFSET,
    ),
    "rows that do not fill blocks": (changed(type=8), ("does not fill blocks of Q8_0",)),
    "a scalar in blocks": (changed(type=8, shape=()), ("does not fill blocks of Q8_0",)),
    "rows that do not fill large blocks": (changed(type=14, shape=(384,)), ("does not fill blocks of Q6_K",)),
    "integers for weights": (
        lambda: written(described({n: t.to(torch.int32) if n == KEY else t for n, t in sam().items()})),
        (KEY, "int32"),
    ),
    "quantised weights": (
        lambda: written([
            d._replace(type=8, shape=(32, 4), data=bytes(4 * 34)) if d.name == KEY.encode() else d
            for d in described(sam())
        ]),
        ("holds quantised weights (Q8_0)", "F16"),
    ),
}  # fmt: skip
# These take time or memory in readers that trust their input.
LARGE: dict[str, tuple[Callable[[], bytes], tuple[str, ...]]] = {
    "a million texts": (with_key(ARRAY, array(STRING, 1 << 20, text(bytes(24)) * (1 << 20))), LIMIT),
    "a header of 40 MB": (with_key(STRING, text(bytes(40 << 20))), LIMIT),
    "65536 tensors of no elements": (
        lambda: written(empty(f"model.layers.{i}.weight", shape=(768, 0)) for i in range(65_536)),
        ("no SAM layout fits its 65536 tensors",),
    ),
    "65536 tensors and one of them again": (
        lambda: written(empty(f"model.layers.{i % 65_535}.weight") for i in range(65_536)),
        ("is there twice",),
    ),
    "65536 keys": (
        tiny(keys=[key(f"{i}", 0, b"\0") for i in range(65_536)], num_tensors=0),
        ("a GGUF file without tensors",),
    ),
}


def of(like: Callable[[], State]) -> Callable[[], bytes]:
    return lambda: written(described(like()))


CASES = [
    *(Case(f"GGUF: {name}", put(LEGAL[name]), Accepted(sam)) for name in ("version 2", "every type of value")),
    Case("GGUF: called sam.bin", put(LEGAL["called sam.bin"], "sam.bin"), Accepted(sam)),
    *(Case(f"GGUF: {name}", put(of(like)), Accepted(like)) for name, like in MIXED.items()),
    *(
        Case(f"GGUF: {name}", put(REFUSED[name][0]), Refused(REFUSED[name][1]))
        for name in ("the magic alone", "big-endian", "a terabyte", "an array nested 10000 times", "quantised weights")
    ),
    *(Case(f"GGUF: {name}", put(make), Refused(words)) for name, (make, words) in LARGE.items()),
]

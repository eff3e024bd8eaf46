"""safetensors files: headers that are inconsistent, invalid or too large, and unusual valid files.

The format's own library agrees on what is refused, but for `LENIENT`, which it reads, and `STRICT`, which it does not.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from hostile.case import Accepted, Build, Case, Refused, State, sam

Header = dict[str, Any]
KEY = "image_encoder.pos_embed"
FIRST = "image_encoder.blocks.0.attn.proj.bias"
SIDE = "prompt_encoder."  # tensors with this prefix are dropped


def parts(state: State) -> tuple[Header, bytes]:
    """Header and data, as the library writes them."""
    data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in state.items()})
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def written(header: Header | str | bytes, data: bytes, length: int | None = None) -> bytes:
    if isinstance(header, dict):
        header = json.dumps(header)
    text = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def put(make: Callable[[], bytes], name: str = "sam.safetensors") -> Build:
    def build(folder: Path) -> Path:
        (folder / name).write_bytes(make())
        return folder / name

    return build


def entry(**fields: Any) -> Callable[[], bytes]:
    """A tiny SAM with changed fields of one tensor; None removes a field."""

    def make() -> bytes:
        header, data = parts(sam())
        header[KEY] = {field: value for field, value in (header[KEY] | fields).items() if value is not None}
        return written(header, data)

    return make


def offsets(begin: Any, end: Any) -> Callable[[], bytes]:
    """A tiny SAM with other offsets of one tensor: shifted by bytes, or as given."""

    def make() -> bytes:
        header, data = parts(sam())
        first, last = header[KEY]["data_offsets"]
        given = [at + by if type(by) is int else by for at, by in ((first, begin), (last, end))]
        return written(header | {KEY: header[KEY] | {"data_offsets": given}}, data)

    return make


def text(
    change: Callable[[str], str | bytes], after: Callable[[bytes], bytes] = lambda data: data
) -> Callable[[], bytes]:
    """A tiny SAM with a changed header text and changed data."""

    def make() -> bytes:
        header, data = parts(sam())
        return written(change(json.dumps(header)), after(data))

    return make


def raw(field: str, value: str) -> Callable[[], bytes]:
    """A tiny SAM with the JSON text `value` in a field; it may be invalid."""
    return text(lambda header: header.replace(json.dumps(parts(sam())[0][KEY][field]), value))


def of_length(length: int) -> Callable[[], bytes]:
    return lambda: written(parts(sam())[0], parts(sam())[1], length)


def more(**headers: Any) -> Callable[[], bytes]:
    """A tiny SAM with more entries in its header."""
    return lambda: written(parts(sam())[0] | headers, parts(sam())[1])


def named(name: str, prefix: str = "image_encoder.") -> Callable[[], bytes]:
    """A tiny SAM with one more tensor, of no elements; in its encoder by default."""
    return more(**{prefix + name: {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]}})


def _many(last: str = "") -> bytes:
    """A hundred thousand tensors of no elements."""
    one = '"model.layers.{}.weight": {{"dtype": "F32", "shape": [0, 768], "data_offsets": [0, 0]}}'
    return written(
        "{" + ", ".join([*map(one.format, range(100_000)), *([one.format(last)] if last else [])]) + "}", b""
    )


# ---- valid files


def wrapped(prefix: str) -> Callable[[], bytes]:
    return lambda: safetensors.torch.save({prefix + name: tensor.contiguous() for name, tensor in sam().items()})


def _other_order() -> bytes:
    """Data in the reverse order of the header."""
    header, data = parts(sam())
    at, moved = 0, []
    for key in reversed(header):
        begin, end = header[key]["data_offsets"]
        moved.append(data[begin:end])
        header[key]["data_offsets"] = [at, at := at + end - begin]
    return written(header, b"".join(moved))


def cast(dtype: torch.dtype) -> Callable[[], State]:
    return lambda: {name: tensor.to(dtype) for name, tensor in sam().items()}


def mixed() -> State:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return {name: tensor.to(dtypes[i % 4]) for i, (name, tensor) in enumerate(sam().items())}


ODD = {
    "steers terminals": "\x1b]0;owned\7\x1b[2J",
    "breaks lines": "a\r\n::error::b\u2028\x85c",
    "runs backwards": "\u202e\u2066abc",
    "is long": "x" * 100_000,
    "is in many scripts": "编码器🙂é\u0301",
}

LEGAL: dict[str, Callable[[], bytes]] = {
    "white space behind the header": text(lambda header: header + " \n\t\r" * 2500),
    "white space within": text(lambda header: header.replace(":", " \n:\t")),
    "data that is not aligned": text(lambda header: header + " " * (-len(header) % 8 + 1)),
    "names in escapes": text(lambda header: header.replace("image_encoder", "\\u0069mage\\u005fencoder")),
    "data in another order": _other_order,
    "fields in another order": text(lambda header: json.dumps(json.loads(header), sort_keys=True)),
    "an offset of -0": text(lambda header: header.replace('"data_offsets": [0,', '"data_offsets": [-0,')),
    "half of a surrogate pair in metadata": more(__metadata__={"by": "\ud800"}),
    "empty metadata": more(__metadata__={}),
    "odd metadata": more(__metadata__={"\x1b[2J\n": "\u202e\0" * 100, "": "", "format": "tf"}),
    **{f"a prefix that {what}": wrapped(f"{name}.") for what, name in ODD.items()},
    **{f"a name that {what}, dropped": named(name[:900], SIDE) for what, name in ODD.items()},
    "a scalar and nothing, dropped": lambda: written(
        {
            **parts(sam())[0],
            f"{SIDE}nothing": {"dtype": "F64", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]},
            f"{SIDE}scalar": {
                "dtype": "F32",
                "shape": [],
                "data_offsets": [len(parts(sam())[1]), len(parts(sam())[1]) + 4],
            },
        },
        parts(sam())[1] + b"\0\0\xc0\x7f",
    ),
}

# ---- invalid files


def metadata(value: str) -> Callable[[], bytes]:
    return text(lambda header: f'{{"__metadata__": {value}, {header[1:]}')


UNREADABLE = "its header cannot be read"
INTEGERS = (f"tensor '{KEY}'", "lists of integers")
OVERLAP, GAP, MISFIT = "overlaps the one before it", "leaves a gap before it", "does not take"
REFUSED: dict[str, tuple[Callable[[], bytes], tuple[str, ...]]] = {
    "a header of no bytes": (of_length(0), (UNREADABLE,)),
    "a header of a byte": (of_length(1), (UNREADABLE,)),
    "a header too short": (lambda: of_length(len(json.dumps(parts(sam())[0])) - 1)(), (UNREADABLE,)),
    "a header too long": (lambda: of_length(len(json.dumps(parts(sam())[0])) + 1)(), (UNREADABLE,)),
    "a header beyond the file": (of_length(1 << 24), ("truncated: 16777216 bytes at",)),
    "a header beyond the limit": (of_length(100_000_001), ("a header of 100000001 bytes",)),
    "a header of 2**39 bytes": (of_length(1 << 39), ("a header of 549755813888 bytes",)),
    "a header of 2**63 bytes": (of_length(1 << 63), ("unknown format: it begins with 00 00 00 00 00 00 00 80",)),
    "a header of 2**64 - 1 bytes": (of_length(2**64 - 1), ("unknown format: it begins with ff ff",)),
    "a length alone": (lambda: struct.pack("<Q", 2), ("unknown format",)),
    "no JSON": (text(lambda header: header.replace(":", "=")), (UNREADABLE,)),
    "a comma too many": (text(lambda header: header[:-1] + ",}"), (UNREADABLE,)),
    "a comment": (text(lambda header: header[:-1] + "/* */}"), (UNREADABLE,)),
    "text behind the header": (text(lambda header: header + "{}"), (UNREADABLE, "Extra data")),
    "zeros behind the header": (text(lambda header: header + "\0\0"), (UNREADABLE, "Extra data")),
    "no UTF-8": (text(lambda header: header.encode().replace(b"pos_embed", b"pos_\xff\xfe")), (UNREADABLE, "utf-8")),
    "UTF-16": (text(lambda header: header.encode("utf-16-le")), (UNREADABLE,)),
    "a list": (text(lambda header: f"[{header}]"), ("unknown format",)),
    "a byte order mark": (text(lambda header: "\ufeff" + header), ("unknown format",)),
    "white space before the header": (text(lambda header: " " + header), ("unknown format",)),
    "a line break in a name": (text(lambda header: header.replace("pos_embed", "pos\nembed")), (UNREADABLE, "control")),
    "half of a surrogate pair as a name": (
        text(lambda h: h.replace("pos_embed", "\\ud800")),
        (UNREADABLE, "surrogates"),
    ),
    "a tensor twice": (
        text(lambda h: f'{h[:-1]}, "{KEY}": {json.dumps(parts(sam())[0][KEY])}}}'),
        (f"'{KEY}'", "duplicate name"),
    ),
    "a field twice": (
        text(lambda h: h.replace('"shape"', '"dtype": "F32", "shape"', 1)),
        ("duplicate name 'dtype'",),
    ),
    "metadata twice": (
        text(lambda h: f'{{"__metadata__": {{}}, "__metadata__": {{}}, {h[1:]}'),
        ("'__metadata__'", "duplicate name"),
    ),
    "a key of metadata twice": (metadata('{"a": "1", "a": "2"}'), ("duplicate name 'a'",)),
    "a field more": (entry(strides=[1]), (f"tensor '{KEY}' is not described by",)),
    **{
        f"no {field}": (entry(**{field: None}), (f"tensor '{KEY}' is not described by",))
        for field in ("dtype", "shape", "data_offsets")
    },
    **{
        f"{what} for a tensor": (more(**{KEY: value}), (f"tensor '{KEY}' is not described by",))
        for what, value in (("a number", 3), ("null", None), ("a text", "F32"))
    },
    "a list for a tensor": (lambda: more(**{KEY: list(parts(sam())[0][KEY].values())})(), ("is not described by",)),
    "a tensor on top of another": (offsets(-4, -4), (OVERLAP,)),
    "a tensor a little further": (offsets(4, 4), (GAP,)),
    "a tensor too short": (offsets(0, -4), (KEY, MISFIT)),
    "a tensor too long": (offsets(0, 4), (KEY, MISFIT)),
    "a tensor that ends before it begins": (offsets(4, -(2**20)), INTEGERS),
    "a tensor the wrong way round": (
        lambda: entry(data_offsets=parts(sam())[0][KEY]["data_offsets"][::-1])(),
        (KEY, MISFIT),
    ),
    "two tensors in one place": (
        lambda: written(
            {n: e | {"data_offsets": [0, 96], "shape": [24]} for n, e in parts(sam())[0].items()}, bytes(96)
        ),
        (OVERLAP,),
    ),
    "a hole between tensors": (
        lambda: written({n: e for n, e in parts(sam())[0].items() if n != KEY}, parts(sam())[1]),
        (GAP,),
    ),
    **{
        f"{what} as an offset": (offsets(0, value), INTEGERS)
        for what, value in (
            ("a float", 1e9),
            ("a text", "4"),
            ("null", None),
            ("a list", [4]),
            ("true", True),
        )
    },
    "one offset": (entry(data_offsets=[0]), ("1 data_offsets",)),
    "three offsets": (entry(data_offsets=[0, 4, 8]), ("3 data_offsets",)),
    "an offset of 2**63": (entry(data_offsets=[0, 2**63]), INTEGERS),
    "an offset of a terabyte": (entry(data_offsets=[0, 2**40]), (KEY, MISFIT)),
    "a tensor of a terabyte": (entry(shape=[2**38], data_offsets=[0, 2**40]), (OVERLAP,)),
    "a shape of 2**40 * 2**40": (entry(shape=[2**40, 2**40]), (KEY, MISFIT)),
    "a shape of 2**32 * 2**32 bytes": (entry(shape=[2**32, 2**30]), (KEY, MISFIT)),
    "a shape of 0 * 2**64": (entry(shape=[0, 2**64]), INTEGERS),
    "a shape of 65 dimensions": (lambda: entry(shape=parts(sam())[0][KEY]["shape"] + [1] * 61)(), ("65 dimensions",)),
    **{
        f"a shape of {value}": (raw("shape", value), words)
        for value, words in (
            ("[-1, 4, 4, 24]", INTEGERS),
            ("[1, 4, 4, 24.0]", INTEGERS),
            ("[1, 4, 4, 2.4e1]", INTEGERS),
            ("[true, 4, 4, 24]", INTEGERS),
            ("[[1, 4, 4, 24]]", INTEGERS),
            ("384", INTEGERS),
            ("null", INTEGERS),
            ("[NaN, 4, 4, 24]", INTEGERS),
            ("[1e999, 4, 4, 24]", INTEGERS),
            ("[-Infinity]", INTEGERS),
            ("[01, 4, 4, 24]", (UNREADABLE,)),
            ("[0x1, 4, 4, 24]", (UNREADABLE,)),
        )
    },
    "a number of 5000 digits": (raw("shape", f"[{'9' * 5000}]"), (UNREADABLE, "5000 digits")),
    "a number of 4000 digits": (raw("shape", f"[{'9' * 4000}]"), INTEGERS),
    **{
        f"the dtype {json.dumps(value)}": (entry(dtype=value), (f"'{KEY}' has the unknown dtype {value!r}",))
        for value in ("F31", "f32", "C32", "F3", "\x1b[2J\n", "", 32, ["F32"], {"F32": None})
    },
    "a dtype of other size": (entry(dtype="F64"), (f"tensor '{KEY}': float64", MISFIT)),
    "a byte missing": (text(str, lambda data: data[:-1]), ("truncated", "expected")),
    "all data missing": (text(str, lambda data: b""), ("truncated", "expected")),
    "a byte left over": (text(str, lambda data: data + b"\0"), ("extra bytes at the end",)),
    "no tensors": (lambda: written("{}", b""), ("contains no named tensors",)),
    **{
        f"the metadata {value}": (metadata(value), ("__metadata__ is not an object of strings",))
        for value in ("null", "[]", '"a"', '{"a": 1}', '{"a": NaN}', '{"a": {"b": "c"}}', '{"a": ["b"]}')
    },
    # Exhausting memory or time.
    "a hundred thousand lists in one another": (lambda: written(b'{"a":' + b"[" * 100_000, b""), (UNREADABLE, "deep")),
    "a hundred thousand tables in one another": (lambda: written(b'{"a":' * 100_000, b""), (UNREADABLE, "deep")),
    "a header of 90 MB": (lambda: written(b"{" + b" " * 90_000_000 + b"}", b""), ("a header of 90000002 bytes",)),
    "a header of 30 MB of lists": (
        lambda: written(b'{"a":[' + b"[]," * 10_000_000 + b"[]]}", b""),
        (UNREADABLE, "values"),
    ),
    "a header of 30 MB of numbers": (
        lambda: written(b'{"a":[' + b"1," * 15_000_000 + b"1]}", b""),
        (UNREADABLE, "values"),
    ),
    "a hundred thousand tensors": (_many, ("no SAM layout fits its 100000 tensors",)),
    "a hundred thousand tensors and one of them again": (
        lambda: _many("99999"),
        ("'model.layers.99999.weight'", "duplicate name"),
    ),
    # Names.
    "no name": (named(""), ("no rule claims 'image_encoder.'",)),
    **{f"a name that {what}": (named(name), ("no rule claims",)) for what, name in ODD.items()},
    "a name that steers terminals, printed": (
        named("\x1b[2J\n::error::"),
        ("no rule claims 'image_encoder.\\x1b[2J\\n::error::'",),
    ),
    "odd names alone": (
        lambda: safetensors.torch.save({"\x1b[2J\n": torch.ones(1), "\u202e": torch.ones(1)}),
        ("first names: '\\x1b[2J\\n', '\\u202e'",),
    ),
}


def saved(like: Callable[[], State]) -> Callable[[], bytes]:
    return lambda: safetensors.torch.save(like())


LENIENT = (
    "safetensors: a header of 90 MB",  # white space, over the limit
    "safetensors: no tensors",  # nothing to convert
    "safetensors: white space before the header",
    "safetensors: a tensor twice",  # the library uses the last one
    "safetensors: a key of metadata twice",
    "safetensors: a field more",
    "safetensors: a list for a tensor",
    "safetensors: the metadata null",
    'safetensors: the dtype {"F32": null}',
    "safetensors: a hundred thousand tensors and one of them again",
    "safetensors: a shape of 65 dimensions",  # the limit is 64, as in torch
)
STRICT = (
    "safetensors: an offset of -0",
    "safetensors: half of a surrogate pair in metadata",
)
# Tensors that are dropped may have any dtype.
UNKNOWN = ("no rule claims", "no SAM layout fits", "first names")

CASES = [
    *(Case(f"safetensors: {name}", put(make), Accepted(sam)) for name, make in LEGAL.items()),
    *(
        Case(f"safetensors: {dtype}", put(saved(like)), Accepted(like))
        for dtype, like in {
            **{
                str(dtype): cast(dtype) for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
            },
            "a mixture": mixed,
        }.items()
    ),
    *(
        Case(f"safetensors: called {name}", put(lambda: safetensors.torch.save(sam()), name), Accepted(sam))
        for name in ("sam", "sam.pth", "sam.bin", "sam.safetensors.part")
    ),
    *(Case(f"safetensors: {name}", put(make), Refused(words)) for name, (make, words) in REFUSED.items()),
]

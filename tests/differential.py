"""Compares the readers with torch.load(weights_only=True) and safetensors on randomly changed files.

Where both accept a file, all names, dtypes, shapes and bytes must be equal. Where only one does, the reason must be in
`REASONS`.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import resource
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any, NamedTuple

import safetensors.torch
import torch
from fuzzing import mutators
from fuzzing.seeds import saved, scripted, states
from fuzzing.targets import check
from memory import copied, raw
from memory_file import Memory

from converter.errors import DsocrError
from converter.formats.pickle_reader import Placeholder
from converter.formats.registry import open_file
from converter.formats.torch_contents import MAX_DEPTH
from converter.tensors.evaluate import tensor_bytes
from converter.tensors.lazy_tensor import byte_ranges, lazy_read
from converter.tensors.tensor_info import Contents, TensorInfo

# A forked process has no threads of torch and would wait for them forever.
torch.set_num_threads(1)

# Limits of the process that reads one file: the libraries have none.
MEMORY = 8 << 30
SECONDS = 20

OURS, THEIRS, NEITHER, BOTH = "only dsocr-convert", "only the library", "neither", "both"


# In place of a tensor of which only the name is known.
UNREADABLE = "unreadable"


class Reason(NamedTuple):
    """Why only one side accepts a file.

    Attributes:
        kind: "torch" or "safetensors".
        who: The side that accepts it.
        words: Regular expression that the error of the other side matches.
        why: The reason, as in docs/differential.md.
    """

    kind: str
    who: str
    words: str
    why: str


# The first match is used. docs/differential.md explains them.
REASONS = [
    Reason("torch", THEIRS, r"holds an? [\w ]+, not a dict of tensors", "not a dict"),
    Reason("torch", THEIRS, r"values of more than \d+ bytes|a name of \d+ characters", "beyond a limit"),
    Reason("torch", THEIRS, r"of \d+ bytes repeated", "expanded to more than a GiB"),
    Reason("torch", THEIRS, r"big-endian, with another", "big-endian, with another dtype than its storage"),
    Reason("torch", THEIRS, r"checksum|damaged zip archive|own header disagree", "a damaged archive"),
    Reason("torch", THEIRS, r"the pickle refers to", "other globals"),
    Reason("torch", THEIRS, r"a zip archive, but not one that torch", "member names in other letters"),
    Reason("torch", THEIRS, r"no member 'archive/data/", "member names in other letters"),
    Reason("torch", THEIRS, r"unknown format: it begins with", "another encoding of the magic number"),
    Reason("torch", THEIRS, r"a pickle, but not one that torch", "another encoding of the magic number"),
    Reason("torch", THEIRS, r"pickle protocol \d+: 0 to 5", "a pickle protocol above 5"),
    Reason("torch", OURS, r"TorchScript archives", "TorchScript"),
    Reason(
        "torch",
        OURS,
        r"invalid literal for int|codec can't decode|not in a subdirectory",
        "damaged members without weights",
    ),
    Reason(
        "torch",
        OURS,
        r"PytorchStreamReader failed|Couldn't parse the version|hasRecord|record size .* does not match",
        "damaged members without weights",
    ),
    Reason("torch", OURS, r"required positional argument|not enough values to unpack", "ignored values are missing"),
    Reason("torch", OURS, r"takes \d+ positional arguments but", "more arguments than torch's function has"),
    Reason("torch", OURS, r"has no attribute 'dtype'|Weights only load failed", "unsupported by weights_only"),
    Reason("safetensors", THEIRS, r"duplicate name", "a duplicate name"),
    Reason("safetensors", THEIRS, r"not described by dtype, shape and data_offsets", "additional fields"),
    Reason("safetensors", THEIRS, r"unknown format|begins with", "no brace at the beginning"),
    Reason("safetensors", THEIRS, r"__metadata__ is not an object", "metadata null"),
    Reason("safetensors", OURS, r"KeyError: 'F\d", "types that torch lacks"),
    Reason("safetensors", OURS, r"hex escape", "lone surrogates"),
    Reason("safetensors", OURS, r"floating point `-0.0`", "-0 as an integer"),
]


class Outcome(NamedTuple):
    """The result for one file: who accepted it, and the other's error or the differences."""

    who: str
    message: str


def compare(kind: str, files: Sequence[bytes]) -> Iterator[Outcome]:
    """Read files with both in a process that may die, after which a new one reads the files that are left."""
    compared = 0
    while compared < len(files):
        for outcome in _compare_in_child(kind, files[compared:]):
            compared += 1
            yield outcome


def _compare_in_child(kind: str, files: Sequence[bytes]) -> Iterator[Outcome]:
    """Compare files up to the first one that the process does not survive."""
    source, target = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(source)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            with os.fdopen(target, "wb", buffering=0) as pipe:
                for data in files:
                    signal.alarm(SECONDS)
                    pipe.write(pickle.dumps(_compare(kind, data)))
        finally:
            os._exit(0)
    os.close(target)
    with os.fdopen(source, "rb") as pipe:
        for _ in files:
            try:
                yield Outcome(*pickle.load(pipe))
            except EOFError:
                yield Outcome("crashed", "the process that read it")
                break
    os.waitpid(child, 0)


def _compare(kind: str, data: bytes) -> tuple[str, str]:
    warnings.simplefilter("ignore")
    ours, our_error = _ours(data)
    theirs, their_error = _theirs(kind, data)
    if ours is None or theirs is None:
        who = OURS if ours is not None else THEIRS if theirs is not None else NEITHER
        return who, our_error if theirs is not None else their_error
    return BOTH, "\n".join(_differences(ours, _without_tensorless(theirs) or {}, ""))


def _without_tensorless(value: Any, depth: int = 0) -> Any:
    """The value as our readers give it: dicts without tensors become None, and keys other than scalars are dropped."""
    if not isinstance(value, dict) or depth > MAX_DEPTH:
        return None if isinstance(value, dict) else value
    found = {
        key: _without_tensorless(item, depth + 1)
        for key, item in value.items()
        if isinstance(key, (str, bytes, int, float, bool, type(None)))
    }
    return found if any(isinstance(item, (dict, torch.Tensor)) for item in found.values()) else None


def _ours(data: bytes) -> tuple[Contents | None, str]:
    """The contents, each tensor with the bytes that a conversion would write."""
    try:
        _, contents = open_file(Memory(data))
        return _with_bytes(contents), ""
    except DsocrError as error:
        return None, str(error)


def _with_bytes(contents: Contents) -> Contents:
    return {key: _value(value) for key, value in contents.items() if not isinstance(key, Placeholder)}


def _value(value: Any) -> Any:
    if isinstance(value, dict):
        return _with_bytes(value)
    if not isinstance(value, TensorInfo):
        return value
    check(value)
    if not value.dtype.bits:
        return UNREADABLE
    segments = byte_ranges(lazy_read(value))
    data = copied(segments) if segments is not None else bytes(tensor_bytes(lazy_read(value)))
    return f"torch.{value.dtype.name}", value.shape, data


def _theirs(kind: str, data: bytes) -> tuple[Any, str]:
    try:
        if kind == "safetensors":
            return safetensors.torch.load(data), ""
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), ""
    except Exception as error:  # the libraries may raise anything
        return None, f"{type(error).__name__}: {error}"


def _differences(ours: Any, theirs: Any, where: str) -> Iterator[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        if ours.keys() != theirs.keys():
            yield f"{where}: keys {list(ours)} and {list(theirs)}"
            return
        for key in theirs:
            yield from _differences(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(theirs, torch.Tensor) and ours != UNREADABLE:
        found = (str(theirs.dtype), tuple(theirs.shape), raw(theirs.detach()))
        if ours != found:
            yield f"{where}: {str(ours)[:80]} and {str(found)[:80]}"
    elif isinstance(theirs, (str, int, float, bool)):
        # NaN is not equal to itself.
        if ours != theirs and repr(ours) != repr(theirs):
            yield f"{where}: {ours!r} and {theirs!r}"
    elif ours is not None and ours != UNREADABLE:
        yield f"{where}: {ours!r} where they have a {type(theirs).__name__}"


# ---- the files


def originals() -> dict[str, list[bytes]]:
    """The files to change, by the library that reads them."""
    zips = [saved(state) for state in (*states(), *_odd())]
    legacy = [saved(state, _use_new_zipfile_serialization=False) for state in (*states(), *_odd())]
    legacy += [saved(states()[1], _use_new_zipfile_serialization=False, pickle_protocol=number) for number in (0, 4)]
    deflated = [mutators.packed((name, held, 8) for name, held, _ in mutators.members_of(file)) for file in zips[:2]]
    plain = ({str(k): v.contiguous().clone() for k, v in s.items() if torch.is_tensor(v)} for s in states())
    tables = [safetensors.torch.save(state) for state in plain]
    return {
        "torch": [*zips, *legacy, *deflated, *scripted()],
        "safetensors": [*tables, safetensors.torch.save({"x": torch.ones(2)}, {"format": "pt"}), *_lenient()],
    }


def _odd() -> list[Any]:
    """Values that torch.load returns and dsocr-convert does not support."""
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.5, 0, torch.qint8)
    nested: Any = {"x": torch.ones(1)}
    for _ in range(120):
        nested = {"x": nested}
    return [
        {"x": torch.ones(2, dtype=torch.complex64)},
        {"x": torch.eye(2).to_sparse()},
        {"x": torch.eye(2).to_sparse_csr()},
        {"x": quantized},
        {"x": torch.ones(2, device="meta")},
        {"x": torch.ones(2, dtype=torch.complex64).conj()},
        [torch.ones(2)],
        torch.ones(2),
        nested,
        {"x": torch.ones(2), (1, (2, 3)): 1},
        {"x": torch.ones(2), "dtype": torch.complex64},
        {"x": torch.ones(1).expand(1000, 1000)},
    ]


def _lenient() -> list[bytes]:
    """Headers for which the format's document and its library differ."""
    entry = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    headers = [
        b'{"x":' + entry + b',"x":' + entry + b"}",
        b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"more":1}}',
        b'{"x":' + entry + b"}   ",
        b' {"x":' + entry + b"}",
        b'{"x":{"dtype":"F8_E8M0","shape":[1],"data_offsets":[0,1]}}',
        b'{"__metadata__":{"a":1},"x":' + entry + b"}",
        b'{"__metadata__":null,"x":' + entry + b"}",
        b'{"\\ud800":' + entry + b"}",
        b'{"__metadata__":{"a":"\\ud800"},"x":' + entry + b"}",
        b'{"x":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}',
        b"{}",
    ]
    return [len(header).to_bytes(8, "little") + header + b"\0" * (b"[-0]" not in header) for header in headers[:-1]] + [
        (2).to_bytes(8, "little") + headers[-1]
    ]


def changed(kind: str, data: bytes, random: Random) -> bytes:
    """The file with one change to its structure or to a few of its bytes."""
    if kind == "safetensors":
        mutator = mutators.safetensors
    else:
        mutator = mutators.archive if data[:2] == b"PK" else mutators.pickle
    return mutator(data, 1 << 20, random, lambda part, most: _bytes_changed(part, random))


def _bytes_changed(data: bytes, random: Random) -> bytes:
    result = bytearray(data or b"\0")
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        at = random.randrange(len(result))
        what = random.randrange(4)
        if what == 0:
            result[at] = random.randrange(256)
        elif what == 1:
            result[at] ^= 1 << random.randrange(8)
        elif what == 2:
            del result[at : at + random.randint(1, 4)]
        else:
            result[at:at] = random.randbytes(random.randint(1, 4))
        result = result or bytearray(1)
    return bytes(result)


# ---- results


class Tally(NamedTuple):
    """Counts of outcomes and reasons. `unexplained`: files without a reason, with their kinds and outcomes."""

    outcomes: Counter[tuple[str, str]]
    reasons: Counter[tuple[str, str, str]]
    unexplained: list[tuple[str, Outcome, bytes]]


def reason(kind: str, outcome: Outcome) -> Reason | None:
    for entry in REASONS:
        if (entry.kind, entry.who) == (kind, outcome.who) and re.search(entry.words, outcome.message):
            return entry
    return None


def tally(count: int, seed: int) -> Tally:
    """Read all originals, then `count` changed files of each kind."""
    result = Tally(Counter(), Counter(), [])
    for kind, files in originals().items():
        random = Random(f"{kind} {seed}")
        cases = [*files, *(changed(kind, random.choice(files), random) for _ in range(count))]
        for data, outcome in zip(cases, compare(kind, cases), strict=True):
            if outcome.who in (OURS, THEIRS) and reason(kind, outcome) is None:
                # torch keeps sparse tensors of a file that it refused, and refuses the next file for them.
                (outcome,) = compare(kind, [data])
            _count(result, kind, data, outcome)
    return result


def _count(result: Tally, kind: str, data: bytes, outcome: Outcome) -> None:
    result.outcomes[kind, outcome.who] += 1
    if outcome.who == NEITHER or (outcome.who == BOTH and not outcome.message):
        return
    found = reason(kind, outcome)
    if found is None:
        result.unexplained.append((kind, outcome, data))
    else:
        result.reasons[kind, found.who, found.why] += 1


def table(result: Tally) -> Iterator[str]:
    yield from (f"{kind}: {who}: {count}" for (kind, who), count in sorted(result.outcomes.items()))
    yield from (f"{kind}: {who}, {why}: {count}" for (kind, who, why), count in sorted(result.reasons.items()))
    for kind, outcome, data in result.unexplained:
        yield f"UNEXPLAINED: {kind}: {outcome.who}: {outcome.message[:300]!r} ({len(data)} bytes)"


if __name__ == "__main__":
    found = tally(int(sys.argv[1]), int(sys.argv[2]))
    print("\n".join(table(found)))
    sys.exit(bool(found.unexplained))

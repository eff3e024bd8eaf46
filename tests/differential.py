"""Our readers beside torch.load(weights_only=True) and safetensors on the same changed files: who accepts what.

Where both accept a file, every name, type, shape and byte must agree. Where one does, `REASONS` must know why.
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
from collections.abc import Iterator
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
from converter.formats.registry import open_file
from converter.tensors.evaluate import tensor_bytes
from converter.tensors.lazy_tensor import byte_ranges, lazy_read
from converter.tensors.tensor_info import Contents, TensorInfo

# A forked process has none of torch's threads, and would wait for them.
torch.set_num_threads(1)

# Of the process that reads one file: a hostile one may ask the other library for anything.
MEMORY = 8 << 30
SECONDS = 20

OURS, THEIRS = "only we accept", "only they accept"


class Reason(NamedTuple):
    """Why one side alone accepts a file: `words` are found in the refusal, ours or theirs by `who`."""

    kind: str
    who: str
    words: str
    why: str


# The first that fits holds. docs/differential.md says more of each.
REASONS = [
    Reason("torch", THEIRS, r"only plain tensors can be converted", "sparse, quantized, complex or meta"),
    Reason("torch", THEIRS, r"holds an? \w+, not a dict of tensors", "not a dict"),
    Reason("torch", THEIRS, r"dicts nested more than", "nested deeper than any checkpoint"),
    Reason("torch", THEIRS, r"\w+ as a key|a key without a value", "keys that are no plain values"),
    Reason("torch", THEIRS, r"more than \d+ opcodes|a name of \d+ characters", "more than any checkpoint needs"),
    Reason("torch", THEIRS, r"of \d+ bytes repeated", "expanded to more than a GiB"),
    Reason("torch", THEIRS, r"big-endian, with another", "big-endian, in another type than its storage"),
    Reason("torch", THEIRS, r"checksum|damaged zip archive|own header disagree", "a damaged archive"),
    Reason("torch", THEIRS, r"the pickle refers to", "globals that weights do not need"),
    Reason("torch", THEIRS, r"a zip archive, but not one that torch", "members in other letters"),
    Reason("torch", THEIRS, r"no member 'archive/data/", "members in other letters"),
    Reason("torch", THEIRS, r"unknown format: it begins with", "a magic number written another way"),
    Reason("torch", THEIRS, r"a pickle, but not one that torch", "a magic number written another way"),
    Reason("torch", OURS, r"TorchScript archives", "TorchScript"),
    Reason(
        "torch",
        OURS,
        r"invalid literal for int|codec can't decode|not in a subdirectory",
        "members that are not weights",
    ),
    Reason("torch", OURS, r"PytorchStreamReader failed|Couldn't parse the version", "members that are not weights"),
    Reason(
        "torch", OURS, r"required positional argument|not enough values to unpack", "what we read past may be absent"
    ),
    Reason("torch", OURS, r"has no attribute 'dtype'|Weights only load failed", "what its restricted reader lacks"),
    Reason("safetensors", THEIRS, r"duplicate name", "a name twice"),
    Reason("safetensors", THEIRS, r"not described by dtype, shape and data_offsets", "further fields"),
    Reason("safetensors", THEIRS, r"unknown format|begins with", "no brace at the beginning"),
    Reason("safetensors", THEIRS, r"__metadata__ is not an object", "metadata null"),
    Reason("safetensors", OURS, r"hex escape", "halves of surrogate pairs"),
    Reason("safetensors", OURS, r"floating point `-0.0`", "-0 as an integer"),
]


class Outcome(NamedTuple):
    """What became of one file: who accepted it, and the refusal of the other, or where both differ."""

    who: str
    message: str


def compare(kind: str, data: bytes) -> Outcome:
    """Read a file with both, in a process of its own that may die."""
    source, target = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(source)
            signal.alarm(SECONDS)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            with os.fdopen(target, "wb") as pipe:
                pickle.dump(_compare(kind, data), pipe)
        finally:
            os._exit(0)
    os.close(target)
    with os.fdopen(source, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return Outcome(*pickle.loads(answer)) if answer else Outcome("died", "the process that read it")


def _compare(kind: str, data: bytes) -> tuple[str, str]:
    warnings.simplefilter("ignore")
    ours, our_error = _ours(data)
    theirs, their_error = _theirs(kind, data)
    if ours is None or theirs is None:
        who = OURS if ours is not None else THEIRS if theirs is not None else "none accepts"
        return who, our_error if theirs is not None else their_error
    return "both accept", "\n".join(_differences(ours, theirs, ""))


def _ours(data: bytes) -> tuple[Contents | None, str]:
    """The contents with every tensor's bytes in its place, as a conversion would write them."""
    try:
        _, contents = open_file(Memory(data))
        return _filled(contents), ""
    except DsocrError as error:
        return None, str(error)


def _filled(contents: Contents) -> Contents:
    return {key: _value(value) for key, value in contents.items()}


def _value(value: Any) -> Any:
    if isinstance(value, dict):
        return _filled(value)
    if not isinstance(value, TensorInfo):
        return value
    check(value)
    segments = byte_ranges(lazy_read(value))
    data = copied(segments) if segments is not None else bytes(tensor_bytes(lazy_read(value)))
    return f"torch.{value.dtype.name}", value.shape, data


def _theirs(kind: str, data: bytes) -> tuple[Any, str]:
    try:
        if kind == "safetensors":
            return safetensors.torch.load(data), ""
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), ""
    except Exception as error:  # whatever they raise: it is a refusal
        return None, f"{type(error).__name__}: {error}"


def _differences(ours: Any, theirs: Any, where: str) -> Iterator[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        if ours.keys() != theirs.keys():
            yield f"{where}: keys {list(ours)} and {list(theirs)}"
            return
        for key in theirs:
            yield from _differences(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(theirs, torch.Tensor):
        found = (str(theirs.dtype), tuple(theirs.shape), raw(theirs.detach()))
        if ours != found:
            yield f"{where}: {str(ours)[:80]} and {str(found)[:80]}"
    elif isinstance(theirs, (str, int, float, bool)):
        # A NaN equals nothing.
        if ours != theirs and repr(ours) != repr(theirs):
            yield f"{where}: {ours!r} and {theirs!r}"
    elif ours is not None:
        yield f"{where}: {ours!r} where they have a {type(theirs).__name__}"


# ---- the files


def originals() -> dict[str, list[bytes]]:
    """What is changed, and read as it is first: by who else reads it."""
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
    """What torch.load gives back, weights alone or not, and no converter of plain tensors needs."""
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
    """Headers of which the format's document and its library say different things."""
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


def changed(kind: str, data: bytes, chance: Random) -> bytes:
    """A file with one change: to its structure, or to a few of its bytes."""
    if kind == "safetensors":
        mutator = mutators.safetensors
    else:
        mutator = mutators.archive if data[:2] == b"PK" else mutators.pickle
    return mutator(data, 1 << 20, chance, lambda part, most: _bytes_changed(part, chance))


def _bytes_changed(data: bytes, chance: Random) -> bytes:
    result = bytearray(data or b"\0")
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        at = chance.randrange(len(result))
        what = chance.randrange(4)
        if what == 0:
            result[at] = chance.randrange(256)
        elif what == 1:
            result[at] ^= 1 << chance.randrange(8)
        elif what == 2:
            del result[at : at + chance.randint(1, 4)]
        else:
            result[at:at] = chance.randbytes(chance.randint(1, 4))
        result = result or bytearray(1)
    return bytes(result)


# ---- what came of them


class Tally(NamedTuple):
    """How often each outcome and reason came; `unexplained` are the files that no reason fits, and what was said."""

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
        chance = Random(f"{kind} {seed}")
        cases = [*files, *(changed(kind, chance.choice(files), chance) for _ in range(count))]
        for data in cases:
            _count(result, kind, data)
    return result


def _count(result: Tally, kind: str, data: bytes) -> None:
    outcome = compare(kind, data)
    result.outcomes[kind, outcome.who] += 1
    if outcome.who == "none accepts" or (outcome.who == "both accept" and not outcome.message):
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

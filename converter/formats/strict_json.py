"""Parses untrusted JSON: headers of safetensors files, indexes of sharded checkpoints and configs."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

MAX_BYTES = 32 << 20  # 200,000 tensors; the largest checkpoints have 100,000
MAX_VALUES = 2_000_000  # ten describe a tensor; each takes about 100 bytes of memory


def parse(text: bytes) -> Any:
    """Parse UTF-8 text; ValueError if it is not JSON, has a duplicate name in an object, or exceeds the bounds."""
    # Counted before parsing. Characters inside of strings are counted, too: the result is an upper bound.
    values = sum(map(text.count, (b",", b"[", b"{")))
    if len(text) > MAX_BYTES or values > MAX_VALUES:
        raise ValueError(f"{values} values in {len(text)} bytes; the limits are {MAX_VALUES} and {MAX_BYTES}")
    try:
        return json.loads(text.decode(), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deep") from None


def parse_file(text: bytes) -> Any:
    """Parse a JSON file as `parse` does; programs on Windows add a byte order mark, or write UTF-16."""
    return parse(text.decode(json.detect_encoding(text)).encode())


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object as a dict. Of two values with one name, some parsers use the first and others the last."""
    result = dict(pairs)
    if len(result) != len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"duplicate name {name!r}")
    return result

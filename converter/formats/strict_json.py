"""JSON from strangers: headers of safetensors files, indexes of shards."""

from __future__ import annotations

import json
from typing import Any

MAX_BYTES = 32 << 20  # 200,000 tensors; the largest checkpoints there are have 100,000
MAX_VALUES = 2_000_000  # each takes a hundred bytes of memory or so, ten describe a tensor


def parse(text: bytes) -> Any:
    """The values that UTF-8 text stands for; ValueError where it is no JSON, ambiguous, or made to exhaust memory."""
    # Before they are made. Those in strings are counted too, which errs on the safe side.
    values = sum(map(text.count, (b",", b"[", b"{")))
    if len(text) > MAX_BYTES or values > MAX_VALUES:
        raise ValueError(f"{values} values in {len(text)} bytes, and at most {MAX_VALUES} in {MAX_BYTES} are read")
    try:
        return json.loads(text.decode(), object_pairs_hook=_without_doubles)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a dict; of two with one name, some programs would take the first and others the last."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        double = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{double!r} stands there twice")
    return result

"""Converts values to JSON."""

from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass
from typing import Any


def as_json(value: Any) -> Any:
    """Convert a value for `json.dumps`: dataclasses and named tuples become objects, NaN and infinity become null."""
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    elif isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def canonical_json(document: dict[str, Any]) -> bytes:
    """Return a document as canonical JSON: with sorted keys, without spaces, in UTF-8, with a newline at the end."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    # Names may hold lone surrogates, which UTF-8 cannot encode.
    return text.encode(errors="backslashreplace") + b"\n"

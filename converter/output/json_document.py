"""Values as JSON: dataclasses and named tuples become objects."""

from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass
from typing import Any


def as_json(value: Any) -> Any:
    """Converts to what `json` writes: dataclasses and named tuples to objects, NaN and infinity to null."""
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
    """Canonical JSON: sorted keys, no spaces, UTF-8, one newline at the end."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    # Names may hold lone surrogates, which UTF-8 cannot encode.
    return text.encode(errors="backslashreplace") + b"\n"

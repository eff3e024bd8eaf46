"""Summary of the changes that a training made, in one sentence."""

from __future__ import annotations

import math

from converter.comparison.difference import Difference
from converter.errors import first_names
from converter.output.names import fold_layers

_MAX_GROUPS = 4


def summarize(difference: Difference) -> str:
    """Say which blocks moved and how far, which did not, and whether each encoder is bit for bit A's."""
    moved = {block.name: block.relative for block in difference.blocks if block.relative}
    frozen = fold_layers(block.name for block in difference.blocks if not block.differing)
    parts = []
    if moved:
        groups = {name: [moved[member] for member in members] for name, members in fold_layers(moved).items()}
        furthest = sorted(groups.items(), key=lambda group: max(map(_distance, group[1])), reverse=True)
        parts.append(f"moved, relative to A: {first_names([_move(*group) for group in furthest], _MAX_GROUPS)}")
    elif difference.blocks:
        parts.append("no block moved")
    if moved and frozen:
        parts.append(f"not at all (frozen): {first_names(list(frozen), _MAX_GROUPS)}")
    only_cast = all(change.differing == 0 for change in difference.changed) and not (
        difference.removed or difference.added or difference.renamed
    )
    same = "bit for bit A's"
    other = "A's in value, but not in type" if only_cast else "not A's"
    parts += [
        f"the {family.upper()} encoder is {same if equal else other}" for family, equal in difference.encoders.items()
    ]
    return "; ".join(parts) or "no tensor of the same name and shape is in both"


def _distance(relative: float) -> float:
    return relative if math.isfinite(relative) else math.inf


def _move(name: str, moves: list[float]) -> str:
    """Format the smallest and the largest change of some blocks."""
    return f"{name} by {' to '.join(dict.fromkeys(f'{end(moves):.1e}' for end in (min, max)))}"

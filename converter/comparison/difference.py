"""The differences between two checkpoints, as values for the table, the JSON document and the page."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from converter.output.json_document import as_json


class Figures(NamedTuple):
    """A tensor in A and in B: elements that differ, the largest difference, and sums over all elements in float64.

    `gap` sums the squares of the differences, `a` and `b` those of the elements, `ab` the products.
    """

    differing: int = 0
    maximum: float = 0.0
    gap: float = 0.0
    a: float = 0.0
    b: float = 0.0
    ab: float = 0.0

    def plus(self, other: Figures) -> Figures:
        """The figures of two pieces of a tensor, or of two tensors, together."""
        largest = max(self.maximum, other.maximum)
        # max() may lose a NaN.
        maximum = math.nan if math.isnan(self.maximum + other.maximum) else largest
        sums = (x + y for x, y in zip(self[2:], other[2:], strict=True))
        return Figures(self.differing + other.differing, maximum, *sums)

    @property
    def relative(self) -> float:
        """The norm of the difference, divided by the norm of A."""
        if not self.gap:
            return 0.0
        return math.sqrt(self.gap / self.a) if self.a else math.inf

    @property
    def cosine(self) -> float:
        """Cosine of the angle between A and B; NaN if exactly one of them is all zero."""
        if not self.gap:
            return 1.0
        norms = math.sqrt(self.a) * math.sqrt(self.b)
        return max(-1.0, min(self.ab / norms, 1.0)) if norms else math.nan


class Change(NamedTuple):
    """A tensor that both have, differently; `dtypes` and `shapes` are A's and B's.

    `differing` counts elements that differ in a bit, or in value where the types differ. `maximum` is the largest
    absolute difference, `relative` the norm of the difference relative to A's norm, `cosine` that of the angle between
    the two; all are None where the shapes differ, and NaN where the one holds NaNs that the other does not.
    """

    name: str
    dtypes: list[str]
    shapes: list[list[int]]
    differing: int | None = None
    maximum: float | None = None
    relative: float | None = None
    cosine: float | None = None


class Block(NamedTuple):
    """One layer, or another module: the tensors that both have in one shape, and how far they moved together.

    `relative` and `maximum` are as in Change, over the floating-point elements of all its tensors.
    """

    name: str
    num_tensors: int
    differing: int
    relative: float
    maximum: float


class Difference(NamedTuple):
    """All that differs between checkpoints A and B.

    `layouts` are those they were recognised as, by side, and `names` the layout whose names both were compared under;
    empty if those are their own. `removed` are A's alone, `added` B's, `renamed` those that have the same bytes under
    another name. `same` are equal in every bit. `notes` are remarks for the user.
    """

    a: str
    b: str
    containers: list[list[str]]
    layouts: list[list[str]]
    names: list[str]
    notes: list[str]
    same: list[str]
    changed: list[Change]
    removed: list[str]
    added: list[str]
    renamed: dict[str, str]
    blocks: list[Block]

    @property
    def equal(self) -> bool:
        """Whether both hold the same tensors, equal in every bit."""
        return not (self.changed or self.removed or self.added or self.renamed)

    @property
    def moved(self) -> list[Change]:
        """The tensors of one shape that differ, those that moved furthest first."""
        return sorted((change for change in self.changed if change.relative is not None), key=_furthest)

    @property
    def reshaped(self) -> list[Change]:
        """The tensors that have another shape."""
        return [change for change in self.changed if change.relative is None]

    def to_json(self) -> dict[str, Any]:
        """The document that `--json` prints: null for a number that is not finite."""
        return {"equal": self.equal, **as_json(self)}


def _furthest(change: Change) -> tuple[bool, float]:
    moved = change.relative or 0.0
    return not math.isnan(moved), -moved


def block_of(name: str) -> str:
    """The layer that a tensor belongs to, such as `blocks.3`; for others their module.

    A number is a layer's if a module's name follows it: `neck.0.weight` is of `neck`.
    """
    layer = re.match(r"(?:.*?\.)?[0-9]+(?=\.[^.]+\.)", name)
    return layer[0] if layer else re.sub(r"(?:\.[0-9]+)?\.[^.]+$", "", name)


def natural_sort_key(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]

"""Result types of a comparison of two checkpoints, and its summary in one sentence."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from converter.errors import first_names
from converter.output.json_document import as_json
from converter.output.names import fold_layers

# The number of groups of blocks that the summary names.
_MAX_GROUPS = 4


class PairStatistics(NamedTuple):
    """Statistics of a tensor in A and in B. Sums are over all elements, in float64."""

    differing: int = 0  # The number of elements that differ
    maximum: float = 0.0  # The largest absolute difference
    sum_diff_sq: float = 0.0  # The sum of the squared differences
    sum_a_sq: float = 0.0  # The sum of A's squared elements
    sum_b_sq: float = 0.0  # The sum of B's squared elements
    dot: float = 0.0  # The sum of the products of A's and B's elements

    def plus(self, other: PairStatistics) -> PairStatistics:
        """Return the statistics of two chunks of a tensor, or of two tensors, together."""
        # max() may lose a NaN.
        has_nan = math.isnan(self.maximum + other.maximum)
        maximum = math.nan if has_nan else max(self.maximum, other.maximum)
        return PairStatistics._make(x + y for x, y in zip(self, other, strict=True))._replace(maximum=maximum)

    @property
    def relative(self) -> float:
        """The norm of the difference, divided by the norm of A."""
        if not self.sum_diff_sq:
            return 0.0
        return math.sqrt(self.sum_diff_sq / self.sum_a_sq) if self.sum_a_sq else math.inf

    @property
    def cosine(self) -> float:
        """The cosine of the angle between A and B; NaN if exactly one of them is all zero."""
        if not self.sum_diff_sq:
            return 1.0
        norms = math.sqrt(self.sum_a_sq) * math.sqrt(self.sum_b_sq)
        return max(-1.0, min(self.dot / norms, 1.0)) if norms else math.nan


@dataclass(frozen=True, slots=True)
class Change:
    """A tensor that differs between A and B.

    The fields from `differing` on are None if the shapes differ, or if the type has no real numbers, such as complex64.
    All of them but `differing` are NaN if only one of the two tensors has a NaN at some position.

    Attributes:
        name: The name of the tensor.
        dtypes: The types in A and in B.
        shapes: The shapes in A and in B.
        differing: The number of elements whose bits differ, or whose values differ if the types do.
        maximum: The largest absolute difference.
        relative: The norm of the difference, divided by the norm of A.
        cosine: The cosine of the angle between A and B.
        rank: The rank of B - A for matrices, without the effect of rounding; None if it is not low.
    """

    name: str
    dtypes: list[str]
    shapes: list[list[int]]
    differing: int | None = None
    maximum: float | None = None
    relative: float | None = None
    cosine: float | None = None
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """A layer or another module, with the tensors that have the same shape in A and B.

    `relative` and `maximum` are as in Change, over all floating-point elements. `differing` counts tensors.
    """

    name: str
    num_tensors: int
    differing: int
    relative: float
    maximum: float


@dataclass(frozen=True, slots=True)
class Difference:
    """The differences between checkpoints A and B.

    Attributes:
        a: The path or address of A.
        b: The path or address of B.
        containers: The container formats of A and of B.
        layouts: The detected layouts of A and of B.
        names: The layouts under whose names they were compared; empty for the names in the files.
        notes: Messages for the user.
        same: The tensors that are equal in every bit.
        changed: The tensors that differ in type, shape or values.
        removed: The tensors that only A has.
        added: The tensors that only B has.
        renamed: The names in B of tensors that have the same bytes under another name in A.
        blocks: The layers and other modules.
        uncompared: The tensors of both that were not compared, as they are not plain bytes in a file, and their types.
        encoders: Whether the encoder of each family that both have is bit for bit the same.
        cast: The families whose encoders are equal in every value, but not in type.
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
    uncompared: dict[str, str]
    encoders: dict[str, bool]
    cast: list[str]

    @property
    def equal(self) -> bool:
        """Whether A and B have the same tensors, all compared and equal in every bit."""
        return self.verdict == "equal"

    @property
    def verdict(self) -> str:
        """One of "equal", "different", and "not compared" if no tensor differs but some were not compared."""
        if self.changed or self.removed or self.added or self.renamed:
            return "different"
        return "not compared" if self.uncompared else "equal"

    @property
    def moved(self) -> list[Change]:
        """The tensors whose difference is a number or NaN: NaN first, then the largest relative difference."""
        return sorted((change for change in self.changed if change.relative is not None), key=_largest_first)

    @property
    def low_ranks(self) -> list[int]:
        """The ranks of all differences of low rank, lowest first."""
        return sorted(change.rank for change in self.changed if change.rank is not None)

    @property
    def reshaped(self) -> list[Change]:
        """The tensors that have different shapes."""
        return [change for change in self.changed if change.shapes[0] != change.shapes[1]]

    @property
    def unmeasured(self) -> list[Change]:
        """The tensors of the same shape that differ, and whose types have no real numbers to measure."""
        return [change for change in self.changed if change.relative is None and change.shapes[0] == change.shapes[1]]

    def to_json(self) -> dict[str, Any]:
        """Return the document that `--json` prints. NaN and infinity become null."""
        return {"equal": self.equal, **as_json(self)}


def _largest_first(change: Change) -> tuple[bool, float]:
    relative = change.relative or 0.0
    return not math.isnan(relative), -relative


def block_of(name: str) -> str:
    """Return the name of a tensor's layer, such as `blocks.3`, or else of its module.

    A number is a layer index if a module follows it: `neck.0.weight` is in `neck`.
    """
    layer = re.match(r"(?:.*?\.)?[0-9]+(?=\.[^.]+\.)", name)
    return layer[0] if layer else re.sub(r"(?:\.[0-9]+)?\.[^.]+$", "", name)


def summarize(difference: Difference) -> str:
    """Return a sentence on the blocks that moved, those that did not, and whether each encoder is bit for bit A's."""
    moved = {block.name: block.relative for block in difference.blocks if block.relative}
    frozen = fold_layers(block.name for block in difference.blocks if not block.differing)
    parts = []
    if moved:
        groups = {group: [moved[name] for name in names] for group, names in fold_layers(moved).items()}
        furthest_first = sorted(groups, key=lambda group: max(map(_nan_as_infinity, groups[group])), reverse=True)
        ranges = [_format_range(group, groups[group]) for group in furthest_first]
        parts.append(f"moved, relative to A: {first_names(ranges, _MAX_GROUPS)}")
    elif difference.blocks:
        parts.append("no block moved")
    if moved and frozen:
        parts.append(f"not at all (frozen): {first_names(list(frozen), _MAX_GROUPS)}")
    for family, equal in difference.encoders.items():
        if_unequal = "A's in value, but not in type" if family in difference.cast else "not A's"
        relation = "bit for bit A's" if equal else if_unequal
        parts.append(f"the {family.upper()} encoder is {relation}")
    return "; ".join(parts) or "no tensor of the same name and shape is in both"


def _nan_as_infinity(relative: float) -> float:
    return relative if math.isfinite(relative) else math.inf


def _format_range(group: str, moves: list[float]) -> str:
    lowest, highest = f"{min(moves):.1e}", f"{max(moves):.1e}"
    return f"{group} by {lowest}" if lowest == highest else f"{group} by {lowest} to {highest}"

"""The page of a diff: how far each block moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from converter.comparison.difference import Block, Difference
from converter.reports.html import render

# Tensors listed on the page; `--json` has all of them.
_ROWS = 200


@dataclass(frozen=True)
class Bar:
    """One block and the width of its bar in percent: full for the block that moved furthest or is not finite."""

    block: Block
    width: float
    finite: bool


def bars(blocks: Sequence[Block]) -> list[Bar]:
    """A bar for each block."""
    furthest = max((block.relative for block in blocks if math.isfinite(block.relative)), default=0.0) or 1.0
    shares = [block.relative / furthest if math.isfinite(block.relative) else 1.0 for block in blocks]
    return [
        Bar(block, round(100 * share, 1), math.isfinite(block.relative))
        for block, share in zip(blocks, shares, strict=True)
    ]


def page(difference: Difference, facts: Sequence[str], command: str) -> bytes:
    """The page as UTF-8.

    Args:
        difference: The result of the comparison.
        facts: Lines that say what differs.
        command: The command line to repeat it.
    """
    return render(
        "movement.html",
        difference=difference,
        facts=facts,
        bars=bars(difference.blocks) if difference.moved else [],
        moved=difference.moved[:_ROWS],
        rest=max(len(difference.moved) - _ROWS, 0),
        lists={"Only in A": difference.removed, "Only in B": difference.added},
        command=command,
    )

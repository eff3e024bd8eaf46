"""How far each block moved, as one page that needs nothing else, in the look of the verification's."""

from __future__ import annotations

import math
from typing import NamedTuple

from converter.comparison.difference import Block, Difference
from converter.reports import plot
from converter.reports.html import render
from converter.reports.plot import BOTTOM, LEFT, RIGHT, TOP, Axis, Label

# Rows of a table: whoever has read so many has seen what there is to see, and JSON has them all.
_ROWS = 200


class Bar(NamedTuple):
    """One block: the rectangle that stands for how far it moved, and what it says. `kind` is moved, still or beyond."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    says: str


class Chart(NamedTuple):
    """All marks: a bar a block on an axis that begins at zero."""

    bars: list[Bar]
    ticks: list[Label]
    axis: Axis


def chart(blocks: list[Block]) -> Chart:
    """The marks of at least one block."""
    axis = plot.axis([block.name for block in blocks])
    top, step = _scale(max((block.relative for block in blocks if math.isfinite(block.relative)), default=0.0))
    width = round((RIGHT - LEFT) / len(blocks) * 0.76, 1)
    bars = [_bar(block, x, width, top) for block, x in zip(blocks, axis.places, strict=True)]
    ticks = [Label(LEFT, _height(i * step, top), f"{i * step:g}", "tick") for i in range(round(top / step) + 1)]
    return Chart(bars, ticks, axis)


def _scale(furthest: float) -> tuple[float, float]:
    """The axis' end and the distance of its ticks: 1, 2 or 5 times a power of ten, four to eight of them."""
    furthest = furthest or 1.0
    power = 10.0 ** math.floor(math.log10(furthest))
    step = power * next(part for part in (0.2, 0.5, 1.0, 2.0) if furthest / power / part <= 6)
    return math.ceil(furthest / step - 1e-9) * step, step


def _height(value: float, top: float) -> float:
    return round(BOTTOM - value / top * (BOTTOM - TOP), 1)


def _bar(block: Block, x: float, width: float, top: float) -> Bar:
    finite = math.isfinite(block.relative)
    y = _height(block.relative, top) if finite else TOP
    if block.differing:
        # What moved at all is seen.
        y = min(y, BOTTOM - 1)
    kind = "beyond" if not finite else "moved" if block.differing else "still"
    says = f"{block.name}: moved {block.relative:.2g}, {block.differing} of {block.tensors} tensors differ"
    return Bar(round(x - width / 2, 1), y, width, round(BOTTOM - y, 1), kind, says)


def page(found: Difference, facts: list[str], command: str) -> bytes:
    """The page. `facts` are the lines that say what differs, `command` is how to repeat it."""
    return render(
        "movement.html",
        found=found,
        facts=facts,
        chart=chart(found.blocks) if found.blocks and found.moved else None,
        axes=plot,
        moved=found.moved[:_ROWS],
        rest=max(len(found.moved) - _ROWS, 0),
        lists={"Only in A": found.removed, "Only in B": found.added},
        command=command,
    )

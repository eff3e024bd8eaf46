"""Where the marks of a plot stand: relative error block by block on a log axis, with the noise floor and the bar."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from converter.verification.result import Trace

WIDTH = 900.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 792.0, 14.0, 278.0
# Between the baselines of two labels, and between the numbers under the axis.
_LINE, _NUMBERS = 14.0, 24.0
# The brackets under the axis, the baseline of the first row of their names, and how far apart the rows are.
_BRACKET, _NAMES, _ROW = 24.0, 39.0, 15.0
_LETTER = 7.5  # a wide one's width


class Point(NamedTuple):
    """One block: where its mark stands, and what it says. `place` is inside, zero (below the axis) or beyond."""

    x: float
    y: float
    place: str
    over: bool
    says: str


class Label(NamedTuple):
    """Words at a place; `kind` is what they name."""

    x: float
    y: float
    text: str
    kind: str


class Group(NamedTuple):
    """Neighbouring places of one module list, bracketed under the axis; their name stands in row `row`."""

    left: float
    right: float
    row: int
    text: str

    @property
    def width(self) -> float:
        """Of its name, at most."""
        return len(self.text) * _LETTER

    @property
    def middle(self) -> float:
        """Where its name is centred: under the bracket, or from the bracket on, or as near as the edge leaves room."""
        start = max((self.left + self.right - self.width) / 2, self.left + 4)
        return round(min(start, WIDTH - self.width) + self.width / 2, 1)

    @property
    def bracket(self) -> float:
        return BOTTOM + _BRACKET

    @property
    def baseline(self) -> float:
        return BOTTOM + _NAMES + _ROW * self.row


class Axis(NamedTuple):
    """Where each block stands along the axis, and what is written under it: numbers, and the lists they count in."""

    places: list[float]
    numbers: list[Label]
    groups: list[Group]

    @property
    def height(self) -> float:
        """Of the whole plot."""
        return max(group.baseline for group in self.groups) + 8


class Plot(NamedTuple):
    """All marks of one trace. `floor` and `bar` are points of polylines."""

    points: list[Point]
    floor: str
    bar: str
    ticks: list[Label]
    ends: list[Label]
    axis: Axis


def plot(trace: Trace) -> Plot | None:
    """The plot of a trace; None where nothing was measured."""
    if not trace.blocks:
        return None
    bars = [trace.bar * floor for floor in trace.floors]
    low, high = _decades([*trace.errors, *trace.floors, *bars])
    zero = any(error == 0 for error in trace.errors)
    extra_tensors = any(not math.isfinite(error) for error in trace.errors)
    # A row below the axis for what a log axis cannot show, and one above for what is not finite.
    bottom, top = BOTTOM - 26 * zero, TOP + 20 * extra_tensors

    def height(value: float) -> float:
        share = (math.log10(max(value, 10.0**low)) - low) / (high - low)
        return round(bottom - min(share, 1.0) * (bottom - top), 1)

    below = axis(trace.blocks)
    points = []
    for x, name, error, floor, bar in zip(below.places, trace.blocks, trace.errors, trace.floors, bars, strict=True):
        place = "beyond" if not math.isfinite(error) else "zero" if error == 0 else "inside"
        y = {"beyond": TOP + 6, "zero": BOTTOM - 4, "inside": 0.0}[place] or height(error)
        says = f"{name}: error {error:.2g}, bar {bar:.2g}, noise floor {floor:.2g}"
        points.append(Point(x, y, place, not error <= bar, says))
    ticks = [Label(LEFT, height(10.0**power), str(power), "power") for power in _powers(low, high)]
    if zero:
        ticks.append(Label(LEFT, BOTTOM - 4, "0", "zero"))
    if extra_tensors:
        ticks.append(Label(LEFT, TOP + 6, "not finite", "beyond"))
    return Plot(
        points=points,
        floor=_line(below.places, trace.floors, height),
        bar=_line(below.places, bars, height),
        ticks=ticks,
        ends=_ends(points[-1], height(bars[-1]), height(trace.floors[-1]), trace.bar),
        axis=below,
    )


def _decades(values: Sequence[float]) -> tuple[int, int]:
    powers = [math.log10(value) for value in values if math.isfinite(value) and value > 0] or [0.0]
    low, high = math.floor(min(powers) - 0.1), math.ceil(max(powers) + 0.1)
    return (low, high) if high - low > 1 else (low - 1, high + 1)


def _powers(low: int, high: int) -> range:
    return range(low, high + 1, 1 if high - low <= 10 else 2 if high - low <= 24 else 20)


def axis(names: list[str]) -> Axis:
    """The axis for blocks of these names, of which there is at least one."""
    step = (RIGHT - LEFT) / len(names)
    places = [round(LEFT + (i + 0.5) * step, 1) for i in range(len(names))]
    return Axis(places, _numbers(places, names), _groups(places, names))


def _line(xs: list[float], values: Sequence[float], height: Callable[[float], float]) -> str:
    """A polyline drawn to both edges: one block alone has a bar, too."""
    ys = [height(value) for value in values]
    pairs = zip([LEFT, *xs, RIGHT], [ys[0], *ys, ys[-1]], strict=True)
    return " ".join(f"{x},{y}" for x, y in pairs)


def _ends(last: Point, bar: float, floor: float, margin: float) -> list[Label]:
    """The lines' names at their right ends, pushed apart where they would overlap."""
    words = [
        (bar, f"bar: {margin:g} x floor", "bar"),
        (floor, "noise floor", "floor"),
        (last.y, "error", "over" if last.over else "error"),
    ]
    labels: list[Label] = []
    for y, text, kind in sorted(words):
        y = max(y, labels[-1].y + _LINE) if labels else y
        labels.append(Label(RIGHT + 8, round(y, 1), text, kind))
    excess = max(labels[-1].y - BOTTOM, 0)
    return [label._replace(y=label.y - excess) for label in labels]


def _split(name: str) -> tuple[str, str]:
    """`blocks.3` is 3 of blocks; `neck` is itself."""
    match = re.fullmatch(r"(.+)\.([0-9]+)", name)
    return (match[1], match[2]) if match else (name, "")


def _numbers(xs: list[float], names: list[str]) -> list[Label]:
    """The layers' numbers under the axis, as many as have room."""
    every = max(math.ceil(_NUMBERS / ((RIGHT - LEFT) / len(xs))), 1)
    found = []
    for x, name in zip(xs, names, strict=True):
        number = _split(name)[1]
        if number and int(number) % every == 0:
            found.append(Label(x, BOTTOM + 16, number, "number"))
    return found


def _groups(xs: list[float], names: list[str]) -> list[Group]:
    """Neighbours of one list under one bracket, each name in the first row where it meets no other.

    From the right: a short bracket's name goes on to the right, under its neighbours', and a line leads down to it.
    """
    groups: list[Group] = []
    half = (RIGHT - LEFT) / len(xs) / 2 - 1
    for x, name in zip(xs, names, strict=True):
        text = _split(name)[0]
        if groups and groups[-1].text == text:
            groups[-1] = groups[-1]._replace(right=x + half)
        else:
            groups.append(Group(x - half, x + half, 0, text))
    free: list[float] = []  # in each row, up to where
    for i in reversed(range(len(groups))):
        group = groups[i]
        start, end = group.middle - group.width / 2, group.middle + group.width / 2
        row = next((row for row, until in enumerate(free) if end + _LETTER < until), len(free))
        free[: row + 1] = [*[group.left] * row, start]
        groups[i] = group._replace(row=row)
    return groups

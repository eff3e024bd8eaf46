"""Positions of the marks in the error plots, in percent of the plot's width."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from converter.verification.result import Trace, TracePoint

_TICKS = 6


@dataclass(frozen=True)
class Row:
    """One probe, and the positions of its three values on a logarithmic scale, in percent of the plot's width."""

    point: TracePoint
    error_percent: float
    noise_floor_percent: float
    tolerance_percent: float


@dataclass(frozen=True)
class Plot:
    """One trace: a row for each probe, and the scale."""

    name: str
    rows: list[Row]
    ticks: list[tuple[int, float]]  # The exponents of powers of ten, and their positions in percent

    @property
    def diverging(self) -> list[TracePoint]:
        """The points beyond their tolerance."""
        return [row.point for row in self.rows if not row.point.within_tolerance]


def error_plot(trace: Trace) -> Plot:
    """The plot of a trace with at least one point; errors of zero are at the left edge, infinite ones at the right."""
    low, high = _decades(value for p in trace.points for value in (p.error, p.noise_floor, p.tolerance))

    def position(value: float) -> float:
        if not math.isfinite(value):
            return 100.0
        share = (math.log10(value) - low) / (high - low) if value > 0 else 0.0
        return round(100 * min(max(share, 0.0), 1.0), 1)

    rows = [Row(p, position(p.error), position(p.noise_floor), position(p.tolerance)) for p in trace.points]
    step = math.ceil((high - low) / _TICKS)
    return Plot(trace.name, rows, [(power, position(10.0**power)) for power in range(low + 1, high, step)])


def _decades(values: Iterable[float]) -> tuple[int, int]:
    """The exponents of the powers of ten around all positive finite values, at least two apart."""
    powers = [math.log10(value) for value in values if math.isfinite(value) and value > 0] or [0.0]
    low, high = math.floor(min(powers)), math.ceil(max(powers))
    return (low, high) if high - low > 1 else (low - 1, high + 1)

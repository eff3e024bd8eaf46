"""Self-contained pages of a verification and of a difference: no script, no font, no image from elsewhere."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from converter.comparison.difference import Block, Difference
from converter.errors import printable
from converter.output.names import fold_key_map
from converter.reports import words
from converter.verification import result
from converter.verification.result import FAILED, Picture, Trace, TracePoint, Verification

# The class of the verdict in the style sheet, and its sign.
_STYLES = {
    result.VERIFIED: ("passed", "✓"),
    result.PARTLY_VERIFIED: ("partly", "!"),
    result.NOT_VERIFIED: ("failed", "✗"),
}
_TICKS = 6
# Tensors listed on the page of a difference; `--json` has all of them.
_ROWS = 200


def _render(template: str, **values: Any) -> bytes:
    """Render a template of this package to UTF-8; all text in the values is escaped."""
    environment = Environment(
        loader=PackageLoader("converter", "reports"),
        # Every text may come from a file.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Control characters in names could reverse or hide a line. Template text is not a plain str.
        finalize=lambda value: printable(value, keep="\n") if _is_plain(value) else value,
    )
    return environment.get_template(template).render(values).encode("utf-8", "replace")


def _is_plain(value: object) -> bool:
    return isinstance(value, str) and not hasattr(value, "__html__")


def verification_page(verification: Verification, command: str = "") -> bytes:
    """The page of a verification; `command` is the command line to repeat it, if there was one."""
    return _render(
        "page.html",
        found=verification,
        verdict=words.verdict_line(verification),
        words=words,
        groups={group: words.split_failures(checks) for group, checks in words.by_group(verification).items()},
        failures=words.with_verdict(verification, FAILED),
        style=_STYLES[verification.verdict],
        plots=[Plot(trace) for trace in verification.traces if trace.points],
        pictures=_by_run(verification.pictures),
        key_map=fold_key_map(verification.key_map),
        command=command,
    )


def _by_run(pictures: Iterable[Picture]) -> dict[str, list[tuple[Picture, str]]]:
    runs: dict[str, list[tuple[Picture, str]]] = {}
    for picture in pictures:
        url = f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"
        runs.setdefault(picture.run, []).append((picture, url))
    return runs


class Plot:
    """The scale of a trace with at least one point: logarithmic, in percent of the plot's width."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        values = [value for p in trace.points for value in (p.error, p.noise_floor, p.tolerance)]
        powers = [math.log10(value) for value in values if math.isfinite(value) and value > 0] or [0.0]
        low, high = math.floor(min(powers)), math.ceil(max(powers))
        # At least two powers of ten apart.
        self.low, self.high = (low, high) if high - low > 1 else (low - 1, high + 1)

    def position(self, value: float) -> float:
        """The position of a value: zero is at the left edge, infinity at the right one."""
        if not math.isfinite(value):
            return 100.0
        share = (math.log10(value) - self.low) / (self.high - self.low) if value > 0 else 0.0
        return round(100 * min(max(share, 0.0), 1.0), 1)

    @property
    def ticks(self) -> list[tuple[int, float]]:
        """The exponents of powers of ten, and their positions."""
        step = math.ceil((self.high - self.low) / _TICKS)
        return [(power, self.position(10.0**power)) for power in range(self.low + 1, self.high, step)]

    @property
    def diverging(self) -> list[TracePoint]:
        """The points beyond their tolerance."""
        return [point for point in self.trace.points if not point.within_tolerance]


def difference_page(difference: Difference, facts: Sequence[str], command: str) -> bytes:
    """The page of a difference: how far each block moved.

    Args:
        difference: The result of the comparison.
        facts: Lines that say what differs.
        command: The command line to repeat it.
    """
    return _render(
        "movement.html",
        difference=difference,
        facts=facts,
        bars=bars(difference.blocks) if difference.moved else [],
        moved=difference.moved[:_ROWS],
        rest=max(len(difference.moved) - _ROWS, 0),
        lists={"Only in A": difference.removed, "Only in B": difference.added},
        command=command,
    )


class Bar(NamedTuple):
    """One block and the width of its bar in percent: full for the block that moved furthest or is not finite."""

    block: Block
    width: float
    finite: bool


def bars(blocks: Sequence[Block]) -> list[Bar]:
    """A bar for each block."""
    furthest = max((block.relative for block in blocks if math.isfinite(block.relative)), default=0.0) or 1.0
    return [
        Bar(block, round(100 * block.relative / furthest, 1), True)
        if math.isfinite(block.relative)
        else Bar(block, 100.0, False)
        for block in blocks
    ]

"""Renders HTML pages of a verification and of a comparison. They load no script, font or image from elsewhere."""

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

# The CSS class and the sign of each verdict.
_STYLES = {
    result.VERIFIED: ("passed", "✓"),
    result.PARTLY_VERIFIED: ("partly", "!"),
    result.NOT_VERIFIED: ("failed", "✗"),
}
_MAX_TICKS = 6
# Changed tensors listed on the page of a comparison; `--json` has all of them.
_MAX_CHANGES = 200


def _render(template: str, **values: Any) -> bytes:
    """Render a template of this package to UTF-8; all text in the values is escaped."""
    environment = Environment(
        loader=PackageLoader("converter", "reports"),
        # Every text may come from a file.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_with_visible_control_characters,
    )
    return environment.get_template(template).render(values).encode("utf-8", "replace")


def _with_visible_control_characters(value: Any) -> Any:
    """Escape control characters, which could reverse or hide a line. Template text (Markup) is not changed."""
    return printable(value, keep="\n") if isinstance(value, str) and not hasattr(value, "__html__") else value


def verification_page(verification: Verification, command: str = "") -> bytes:
    """Render the page of a verification; `command` is the command line that repeats it, empty if there was none."""
    css_class, sign = _STYLES[verification.verdict]
    return _render(
        "verification.html",
        verification=verification,
        verdict=words.verdict_line(verification),
        words=words,
        groups={group: words.split_failures(checks) for group, checks in words.by_group(verification).items()},
        failures=words.with_verdict(verification, FAILED),
        css_class=css_class,
        sign=sign,
        plots=[Plot(trace) for trace in verification.traces if trace.points],
        pictures=_pictures_by_run(verification.pictures),
        key_map=fold_key_map(verification.key_map),
        command=command,
    )


def _pictures_by_run(pictures: Iterable[Picture]) -> dict[str, list[tuple[Picture, str]]]:
    """Return the pictures of each run, each with a data URL that contains its PNG."""
    runs: dict[str, list[tuple[Picture, str]]] = {}
    for picture in pictures:
        url = f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"
        runs.setdefault(picture.run, []).append((picture, url))
    return runs


class Plot:
    """A trace with at least one point on a logarithmic axis. Positions are in percent of the axis's width."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        values = [value for point in trace.points for value in (point.error, point.noise_floor, point.tolerance)]
        exponents = [math.log10(value) for value in values if math.isfinite(value) and value > 0] or [0.0]
        low, high = math.floor(min(exponents)), math.ceil(max(exponents))
        # The axis spans at least two powers of ten.
        self.min_exponent, self.max_exponent = (low, high) if high - low > 1 else (low - 1, high + 1)

    def position(self, value: float) -> float:
        """Return the position of a value: the left edge for zero, the right edge for NaN and infinity."""
        if not math.isfinite(value):
            return 100.0
        span = self.max_exponent - self.min_exponent
        fraction = (math.log10(value) - self.min_exponent) / span if value > 0 else 0.0
        return round(100 * min(max(fraction, 0.0), 1.0), 1)

    @property
    def ticks(self) -> list[tuple[int, float]]:
        """The exponents of the marked powers of ten, and their positions."""
        step = math.ceil((self.max_exponent - self.min_exponent) / _MAX_TICKS)
        exponents = range(self.min_exponent + 1, self.max_exponent, step)
        return [(exponent, self.position(10.0**exponent)) for exponent in exponents]

    @property
    def diverging(self) -> list[TracePoint]:
        """The points whose error exceeds the tolerance."""
        return [point for point in self.trace.points if not point.within_tolerance]


def difference_page(difference: Difference, facts: Sequence[str], command: str) -> bytes:
    """Render the page of a comparison of two checkpoints, with the relative change of each block.

    Args:
        difference: The result of the comparison.
        facts: Lines that say what differs.
        command: The command line that repeats the comparison.
    """
    return _render(
        "difference.html",
        difference=difference,
        facts=facts,
        bars=bars(difference.blocks) if difference.moved else [],
        moved=difference.moved[:_MAX_CHANGES],
        num_hidden=max(len(difference.moved) - _MAX_CHANGES, 0),
        unmatched={"Only in A": difference.removed, "Only in B": difference.added},
        command=command,
    )


class Bar(NamedTuple):
    """The bar of one block."""

    block: Block
    width: float  # In percent: 100 for the block with the largest relative change, and for one that is not finite
    finite: bool


def bars(blocks: Sequence[Block]) -> list[Bar]:
    """Return a bar for each block."""
    largest = max((block.relative for block in blocks if math.isfinite(block.relative)), default=0.0) or 1.0
    result = []
    for block in blocks:
        finite = math.isfinite(block.relative)
        result.append(Bar(block, round(100 * block.relative / largest, 1) if finite else 100.0, finite))
    return result

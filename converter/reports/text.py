"""The verification as a table on stderr, in colour where the terminal has colours."""

from __future__ import annotations

from rich.box import ROUNDED
from rich.console import Console
from rich.table import Table
from rich.text import Text

from converter.errors import printable
from converter.reports.words import (
    SIGNS,
    by_group,
    detail_text,
    durations,
    split_failures,
    unmentioned_tensors,
    verdict_line,
    verdict_lines,
)
from converter.verification.result import (
    FAILED,
    INCONCLUSIVE,
    NOT_VERIFIED,
    PARTLY_VERIFIED,
    PASSED,
    SKIPPED,
    VERIFIED,
    WARNING,
    Check,
    Verification,
)

_CHECK_STYLES = {PASSED: "green", FAILED: "bold red", WARNING: "yellow", SKIPPED: "dim", INCONCLUSIVE: "yellow"}
_VERDICT_COLOURS = {VERIFIED: "green", PARTLY_VERIFIED: "yellow", NOT_VERIFIED: "red"}
# Columns where stderr is no terminal: log viewers are wide, and 80 would wrap every line.
_LOG_WIDTH = 150


def print_report(verification: Verification, console: Console | None = None) -> None:
    """Print the table of checks, the inputs and the verdict."""
    if console is None:
        console = Console(stderr=True, markup=False, highlight=False, emoji=False)
        if not console.is_terminal:
            console.width = max(console.width, _LOG_WIDTH)
    console.print(_table(verification))
    for name, value in _facts(verification).items():
        console.print(_text(f"{name + ':':<11}", "dim").append(printable(value)), soft_wrap=True)
    console.print(_text(verdict_line(verification), f"bold {_VERDICT_COLOURS[verification.verdict]}"), soft_wrap=True)
    for line in verdict_lines(verification):
        console.print(_text(f"  {line}"), soft_wrap=True)


def _table(verification: Verification) -> Table:
    # GitHub reads a line that begins with `::` as a command, and names come from files. So the table has a border, and
    # no line is wrapped outside of it.
    table = Table(box=ROUNDED, header_style="bold", expand=True)
    table.add_column("group", no_wrap=True)
    table.add_column("check", overflow="fold", ratio=2)
    table.add_column("verdict", no_wrap=True)
    table.add_column("detail", overflow="fold", ratio=3)
    for group, checks in by_group(verification).items():
        shown, hidden = split_failures(checks)
        for check in shown:
            table.add_row(_text(check.group), _text(check.name), _verdict(check.verdict), _detail(check))
        if hidden:
            table.add_row(group, "", _verdict(FAILED), _text(f"and {len(hidden)} more"))
        table.add_section()
    return table


def _detail(check: Check) -> Text:
    text = _text(detail_text(check))
    if also := unmentioned_tensors(check):
        text.append(f"\nalso: {printable(also)}", "red")
    return text


def _verdict(verdict: str) -> Text:
    return _text(f"{SIGNS[verdict]} {verdict}", _CHECK_STYLES[verdict])


def _text(words: str, style: str = "") -> Text:
    return Text(printable(words), style)


def _facts(verification: Verification) -> dict[str, str]:
    layout = f" (layout {verification.mapping})" if verification.mapping else ""
    source = f"{verification.source}{layout}" if verification.source else "none given"
    facts = {
        "converted": verification.converted,
        "source": source,
        "reference": verification.reference,
        "device": f"{verification.device}, {verification.dtype}",
        "time": durations(verification),
    }
    return {name: value for name, value in facts.items() if value}

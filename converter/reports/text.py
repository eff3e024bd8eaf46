"""Prints a verification to stderr as a table, with colours if the terminal has colours."""

from __future__ import annotations

from rich.box import ROUNDED
from rich.console import Console
from rich.table import Table
from rich.text import Text

from converter.errors import printable
from converter.reports import words
from converter.verification import result
from converter.verification.result import FAILED, Check, Verification

# The width in characters if stderr is not a terminal: Rich's default of 80 would wrap every line.
_LOG_WIDTH = 150
# Rich's styles of the verdicts of checks, and of verifications.
_STYLES = {
    result.PASSED: "green",
    result.FAILED: "bold red",
    result.WARNING: "yellow",
    result.SKIPPED: "dim",
    result.INCONCLUSIVE: "yellow",
    result.VERIFIED: "bold green",
    result.PARTLY_VERIFIED: "bold yellow",
    result.NOT_VERIFIED: "bold red",
}


def print_report(verification: Verification, console: Console | None = None) -> None:
    """Print the table of checks, the inputs and the verdict; to stderr by default."""
    if console is None:
        console = Console(stderr=True, markup=False, highlight=False, emoji=False)
        if not console.is_terminal:
            console.width = max(console.width, _LOG_WIDTH)
    console.print(_table(verification))
    for name, value in _inputs(verification).items():
        console.print(_text(f"{name + ':':<11}", "dim").append(printable(value)), soft_wrap=True)
    console.print(_text(words.verdict_line(verification), _STYLES[verification.verdict]), soft_wrap=True)
    for note in words.verdict_notes(verification):
        console.print(_text(f"  {note}"), soft_wrap=True)


def _table(verification: Verification) -> Table:
    # GitHub executes lines that begin with `::`, and the names of tensors come from untrusted files. The border keeps
    # wrapped text from beginning a line.
    table = Table(box=ROUNDED, header_style="bold", expand=True)
    table.add_column("group", no_wrap=True)
    table.add_column("check", overflow="fold", ratio=2)
    table.add_column("verdict", no_wrap=True)
    table.add_column("detail", overflow="fold", ratio=3)
    for group, checks in words.by_group(verification).items():
        shown, hidden = words.split_failures(checks)
        for check in shown:
            table.add_row(_text(check.group), _text(check.name), _verdict(check.verdict), _detail(check))
        if hidden:
            table.add_row(group, "", _verdict(FAILED), _text(f"and {len(hidden)} more"))
        table.add_section()
    return table


def _detail(check: Check) -> Text:
    text = _text(words.detail_text(check))
    if tensors := words.unmentioned_tensors(check):
        text.append(f"\nalso: {printable(tensors)}", "red")
    return text


def _verdict(verdict: str) -> Text:
    return _text(f"{words.SIGNS[verdict]} {verdict}", _STYLES[verdict])


def _text(content: str, style: str = "") -> Text:
    return Text(printable(content), style)


def _inputs(verification: Verification) -> dict[str, str]:
    """Return the labelled lines under the table: what was verified, against what, where, and in what time."""
    layout = f" (layout {verification.mapping})" if verification.mapping else ""
    lines = {
        "converted": verification.converted,
        "source": f"{verification.source}{layout}" if verification.source else "none given",
        "reference": verification.reference,
        "device": f"{verification.device}, {verification.dtype}",
        "time": words.durations(verification),
    }
    return {name: value for name, value in lines.items() if value}

"""The verification as a table on stderr, in colour where the terminal has colours."""

from __future__ import annotations

from rich.box import ROUNDED
from rich.console import Console
from rich.table import Table
from rich.text import Text

from converter.errors import printable
from converter.reports.words import SIGNS, folded, proofs, seen, shorten, times, unsaid, verdict
from converter.verification.result import FAILED, PASSED, SKIPPED, WARNING, Check, Verification

_STYLES = {PASSED: "green", FAILED: "bold red", WARNING: "yellow", SKIPPED: "dim"}
# Logs are read in wide windows; 80 columns would fold every line.
_LOG_WIDTH = 150


def show(found: Verification, console: Console | None = None) -> None:
    """Print the table, what the verification ran on, and the verdict."""
    if console is None:
        console = Console(stderr=True, markup=False, highlight=False, emoji=False)
        if not console.is_terminal:
            console.width = max(console.width, _LOG_WIDTH)
    console.print(_table(found))
    for name, value in _facts(found).items():
        console.print(_text(f"{name + ':':<11}", "dim").append(printable(value)), soft_wrap=True)
    console.print(_text(verdict(found), "bold green" if found.ok else "bold red"), soft_wrap=True)


def _table(found: Verification) -> Table:
    # A line of a log that began with `::` would be a command to GitHub, and names come from files: hence the border,
    # and no line broken but in the table.
    table = Table(box=ROUNDED, header_style="bold", expand=True)
    table.add_column("proof", no_wrap=True)
    table.add_column("check", overflow="fold", ratio=2)
    table.add_column("verdict", no_wrap=True)
    table.add_column("what was seen", overflow="fold", ratio=3)
    for proof, checks in proofs(found).items():
        shown, rest = folded(checks)
        for check in shown:
            table.add_row(*_row(check))
        if rest:
            table.add_row(proof, "", _mark(FAILED), _text(f"and {len(rest)} more"))
        table.add_section()
    return table


def _row(check: Check) -> list[Text]:
    words = _text(seen(check))
    if check.verdict == FAILED and (names := unsaid(check)):
        words.append(f"\nalso: {printable(shorten(names))}", "red")
    return [_text(check.proof), _text(check.name), _mark(check.verdict), words]


def _mark(verdict: str) -> Text:
    return _text(f"{SIGNS[verdict]} {verdict}", _STYLES[verdict])


def _text(words: str, style: str = "") -> Text:
    return Text(printable(words), style)


def _facts(found: Verification) -> dict[str, str]:
    facts = {
        "converted": found.converted,
        "source": f"{found.source} (layout {found.mapping})" if found.source else "none given",
        "reference": found.reference,
        "device": f"{found.device}, {found.dtype}",
        "time": times(found),
    }
    return {name: value for name, value in facts.items() if value}

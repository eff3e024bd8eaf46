"""The verification for GitHub Actions: annotations, and the step's summary in Markdown."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from converter.errors import OutputError, printable
from converter.reports.words import SIGNS, having, proofs, seen, shorten, times, unsaid, verdict
from converter.verification.result import FAILED, SKIPPED, WARNING, Check, Verification

# GitHub shows ten errors a step, and drops the rest without a word.
_ANNOTATIONS = 10
_ROWS = 100


def annotate(found: Verification) -> None:
    """Annotations on stderr, which GitHub reads as it does stdout; the summary where the environment says."""
    for line in commands(found):
        print(line, file=sys.stderr)
    if path := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(summary(found))
        except OSError as error:
            raise OutputError(f"{path}: the step summary cannot be written: {error.strerror}") from error


def commands(found: Verification) -> list[str]:
    """Workflow commands: an error for every failure as far as GitHub shows them, notices for what to know."""
    faults = having(found, FAILED)
    shown = faults if len(faults) <= _ANNOTATIONS else faults[: _ANNOTATIONS - 1]
    lines = [_command("error", check) for check in shown]
    if len(shown) < len(faults):
        lines.append(f"::error title=dsocr-verify::and {len(faults) - len(shown)} more checks failed")
    lines += [_command("notice", check) for check in [*having(found, WARNING), *having(found, SKIPPED)][:_ANNOTATIONS]]
    return lines


def _command(kind: str, check: Check) -> str:
    title = escape_property(f"dsocr-verify, {check.proof}: {check.name}")
    names = unsaid(check) if check.verdict == FAILED else []
    detail = f"{check.detail}\nalso: {shorten(names)}" if names else check.detail
    return f"::{kind} title={title}::{escape_data(detail)}"


def escape_data(text: str) -> str:
    """As GitHub's toolkit escapes a command's message; control characters are written out."""
    return printable(text.replace("%", "%25"), keep="\r\n").replace("\r", "%0D").replace("\n", "%0A")


def escape_property(text: str) -> str:
    """As GitHub's toolkit escapes the value of a command's property."""
    return escape_data(text).replace(":", "%3A").replace(",", "%2C")


def summary(found: Verification) -> str:
    """A section of Markdown: the verdict, what was compared, the checks as a table."""
    lines = [f"## {'✅' if found.ok else '❌'} {escape_markdown(verdict(found))}", ""]
    compared = [f"<code>{escape_markdown(found.converted)}</code>"]
    if found.source:
        compared.append(f"with <code>{escape_markdown(found.source)}</code> ({escape_markdown(found.mapping)})")
    if found.reference:
        compared.append(f"beside {escape_markdown(found.reference)}")
    ran_on = escape_markdown(f"{found.device}, {found.dtype}; {times(found)}")
    lines += [" ".join(compared), "", ran_on, "", "| proof | check | verdict | what was seen |", "|---|---|---|---|"]
    for checks in proofs(found).values():
        lines += [_row(check) for check in checks[:_ROWS]]
        if len(checks) > _ROWS:
            lines.append(f"| {checks[0].proof} | | | and {len(checks) - _ROWS} more |")
    return "\n".join(lines) + "\n\n"


def _row(check: Check) -> str:
    words = seen(check)
    if check.verdict == FAILED and (names := unsaid(check)):
        words += f"; also {shorten(names)}"
    cells = [check.proof, check.name, f"{SIGNS[check.verdict]} {check.verdict}", words]
    return f"| {' | '.join(map(escape_markdown, cells))} |"


def escape_markdown(text: str) -> str:
    """The text as itself: whatever could be markup, a link or the end of a cell becomes a character reference."""
    safe = " -,;/'=✓✗"
    return "".join(char if char.isalnum() or char in safe else f"&#{ord(char)};" for char in printable(text))

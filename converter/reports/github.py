"""The verification for GitHub Actions: annotations, and the step's summary in Markdown."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from converter.errors import OutputError, printable
from converter.reports import words
from converter.verification import result
from converter.verification.result import FAILED, INCONCLUSIVE, SKIPPED, WARNING, Check, Verification

# GitHub shows ten annotations of a kind for each step and drops the others silently.
_ANNOTATIONS = 10
_ROWS = 100
_NOTICES = (WARNING, INCONCLUSIVE, SKIPPED)
_SIGNS = {result.VERIFIED: "✅", result.PARTLY_VERIFIED: "⚠️", result.NOT_VERIFIED: "❌"}


def annotate(verification: Verification) -> None:
    """Print annotations to stderr, and append the summary to the file that GITHUB_STEP_SUMMARY names."""
    for line in commands(verification):
        print(line, file=sys.stderr)
    if path := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(summary(verification))
        except OSError as error:
            raise OutputError(f"{path}: the step summary cannot be written: {error.strerror}") from error


def commands(verification: Verification) -> list[str]:
    """Workflow commands: an error for each failure and unmet requirement, notices for what was not checked."""
    failures = [check for check in verification.requirements if check.verdict == FAILED]
    failures += words.with_verdict(verification, FAILED)
    shown = failures if len(failures) <= _ANNOTATIONS else failures[: _ANNOTATIONS - 1]
    lines = [_command("error", check) for check in shown]
    if len(shown) < len(failures):
        lines.append(f"::error title=dsocr-verify::and {len(failures) - len(shown)} more checks failed")
    notices = [check for verdict in _NOTICES for check in words.with_verdict(verification, verdict)]
    return [*lines, *(_command("notice", check) for check in notices[:_ANNOTATIONS])]


def _command(kind: str, check: Check) -> str:
    title = escape_property(f"dsocr-verify, {check.group}: {check.name}")
    also = words.unmentioned_tensors(check)
    detail = f"{check.detail}\nalso: {also}" if also else check.detail
    return f"::{kind} title={title}::{escape_data(detail)}"


def escape_data(text: str) -> str:
    """Escape a command's message as GitHub's toolkit does; other control characters are written out."""
    return printable(text.replace("%", "%25"), keep="\r\n").replace("\r", "%0D").replace("\n", "%0A")


def escape_property(text: str) -> str:
    """Escape the value of a command's property as GitHub's toolkit does."""
    return escape_data(text).replace(":", "%3A").replace(",", "%2C")


def summary(verification: Verification) -> str:
    """A section of Markdown: the verdict, the inputs, and the checks as a table."""
    inputs = f"<code>{escape_markdown(verification.converted)}</code>"
    if verification.source:
        source, mapping = escape_markdown(verification.source), escape_markdown(verification.mapping)
        inputs += f", converted from <code>{source}</code> ({mapping})"
    if verification.reference:
        inputs += f", compared with {escape_markdown(verification.reference)}"
    ran_on = escape_markdown(f"{verification.device}, {verification.dtype}; {words.durations(verification)}")
    lines = [f"## {_SIGNS[verification.verdict]} {escape_markdown(words.verdict_line(verification))}", ""]
    if open_points := words.verdict_lines(verification):
        lines += [*(f"- {escape_markdown(line)}" for line in open_points), ""]
    lines += [inputs, "", ran_on, "", "| group | check | verdict | detail |", "|---|---|---|---|"]
    for group, checks in words.by_group(verification).items():
        lines += [_row(check) for check in checks[:_ROWS]]
        if len(checks) > _ROWS:
            lines.append(f"| {group} | | | and {len(checks) - _ROWS} more |")
    return "\n".join(lines) + "\n\n"


def _row(check: Check) -> str:
    also = words.unmentioned_tensors(check)
    detail = words.detail_text(check) + (f"; also {also}" if also else "")
    cells = [check.group, check.name, f"{words.SIGNS[check.verdict]} {check.verdict}", detail]
    return f"| {' | '.join(map(escape_markdown, cells))} |"


def escape_markdown(text: str) -> str:
    """Write everything that could be markup, a link or the end of a cell as a character reference."""
    safe = " -,;/'=✓✗"
    return "".join(char if char.isalnum() or char in safe else f"&#{ord(char)};" for char in printable(text))

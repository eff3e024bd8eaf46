"""Reports a verification to GitHub Actions, as annotations and as a step summary in Markdown."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from converter.errors import OutputError, printable
from converter.reports import words
from converter.verification import result
from converter.verification.result import FAILED, INCONCLUSIVE, SKIPPED, WARNING, Check, Verification

# For each step, GitHub shows ten errors and ten notices, and drops further ones silently.
_MAX_ANNOTATIONS = 10
_MAX_ROWS_PER_GROUP = 100
_NOTICE_VERDICTS = (WARNING, INCONCLUSIVE, SKIPPED)
_EMOJIS = {result.VERIFIED: "✅", result.PARTLY_VERIFIED: "⚠️", result.NOT_VERIFIED: "❌"}


def annotate(verification: Verification) -> None:
    """Print annotations to stderr, and append the summary to the file that GITHUB_STEP_SUMMARY names."""
    for line in command_lines(verification):
        print(line, file=sys.stderr)
    if path := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(summary(verification))
        except OSError as error:
            raise OutputError(f"{path}: the step summary cannot be written: {error.strerror}") from error


def command_lines(verification: Verification) -> list[str]:
    """Return workflow commands: errors for failures and unmet requirements, notices for warnings and skipped checks."""
    failures = [check for check in verification.requirements if check.verdict == FAILED]
    failures += words.with_verdict(verification, FAILED)
    shown = failures if len(failures) <= _MAX_ANNOTATIONS else failures[: _MAX_ANNOTATIONS - 1]
    commands = [_command("error", check) for check in shown]
    if len(shown) < len(failures):
        commands.append(f"::error title=dsocr-verify::and {len(failures) - len(shown)} more checks failed")
    notices = [check for verdict in _NOTICE_VERDICTS for check in words.with_verdict(verification, verdict)]
    return [*commands, *(_command("notice", check) for check in notices[:_MAX_ANNOTATIONS])]


def _command(kind: str, check: Check) -> str:
    title = escape_property(f"dsocr-verify, {check.group}: {check.name}")
    tensors = words.unmentioned_tensors(check)
    detail = f"{check.detail}\nalso: {tensors}" if tensors else check.detail
    return f"::{kind} title={title}::{escape_data(detail)}"


def escape_data(text: str) -> str:
    """Escape the message of a workflow command as GitHub's toolkit does, and make other control characters visible."""
    return printable(text.replace("%", "%25"), keep="\r\n").replace("\r", "%0D").replace("\n", "%0A")


def escape_property(text: str) -> str:
    """Escape a property of a workflow command, such as its title, as GitHub's toolkit does."""
    return escape_data(text).replace(":", "%3A").replace(",", "%2C")


def summary(verification: Verification) -> str:
    """Return a Markdown section with the verdict, the inputs, and a table of the checks."""
    inputs = f"<code>{escape_markdown(verification.converted)}</code>"
    if verification.source:
        source, mapping = escape_markdown(verification.source), escape_markdown(verification.mapping)
        inputs += f", converted from <code>{source}</code> ({mapping})"
    if verification.reference:
        inputs += f", compared with {escape_markdown(verification.reference)}"
    ran_on = escape_markdown(f"{verification.device}, {verification.dtype}; {words.durations(verification)}")
    lines = [f"## {_EMOJIS[verification.verdict]} {escape_markdown(words.verdict_line(verification))}", ""]
    if notes := words.verdict_notes(verification):
        lines += [*(f"- {escape_markdown(note)}" for note in notes), ""]
    lines += [inputs, "", ran_on, "", "| group | check | verdict | detail |", "|---|---|---|---|"]
    for group, checks in words.by_group(verification).items():
        lines += [_row(check) for check in checks[:_MAX_ROWS_PER_GROUP]]
        if len(checks) > _MAX_ROWS_PER_GROUP:
            lines.append(f"| {group} | | | and {len(checks) - _MAX_ROWS_PER_GROUP} more |")
    return "\n".join(lines) + "\n\n"


def _row(check: Check) -> str:
    tensors = words.unmentioned_tensors(check)
    detail = words.detail_text(check) + (f"; also {tensors}" if tensors else "")
    cells = [check.group, check.name, f"{words.SIGNS[check.verdict]} {check.verdict}", detail]
    return f"| {' | '.join(map(escape_markdown, cells))} |"


def escape_markdown(text: str) -> str:
    """Replace all characters that could start markup or a link, or end a table cell, by character references."""
    safe = " -,;/'=✓✗"
    return "".join(char if char.isalnum() or char in safe else f"&#{ord(char)};" for char in printable(text))

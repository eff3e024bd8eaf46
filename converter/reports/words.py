"""Formats and orders the checks of a verification, for all reports."""

from __future__ import annotations

import re
from collections.abc import Sequence

from converter.errors import first_names
from converter.verification import result
from converter.verification.result import FAILED, PASSED, Check, Verification

GROUP_DESCRIPTIONS = {
    "structure": "Names, shapes and types match the target layout, and no weight is NaN or infinite.",
    "record": "The file is the one that its conversion record describes: SHA-256 of every tensor.",
    "bytes": "Every tensor equals its source tensors bit by bit, as the formats' own libraries read them.",
    "outputs": "The converted encoder computes the same features as the source's own implementation.",
    result.ACTIVATIONS: "The activations of a port are those of the encoder, but for rounding.",
    result.REQUIRED: "The parts that --require names were done.",
}
# Reports show verdicts by sign and by colour, for terminals and readers without colours.
SIGNS = {PASSED: "✓", FAILED: "✗", result.WARNING: "!", result.SKIPPED: "-", result.INCONCLUSIVE: "?"}
# Failures of a group that reports show: a wrong source fails in every tensor.
_MAX_FAILURES = 12


def by_group(verification: Verification) -> dict[str, list[Check]]:
    """Return the checks by group, in the order of `GROUP_DESCRIPTIONS`, without empty groups."""
    groups: dict[str, list[Check]] = {group: [] for group in GROUP_DESCRIPTIONS}
    for check in [*verification.checks, *verification.requirements]:
        groups.setdefault(check.group, []).append(check)
    return {group: checks for group, checks in groups.items() if checks}


def with_verdict(verification: Verification, verdict: str) -> list[Check]:
    """Return the checks with a verdict."""
    return [check for check in verification.checks if check.verdict == verdict]


def split_failures(checks: Sequence[Check]) -> tuple[list[Check], list[Check]]:
    """Return the checks of a group to show, and the failures beyond the first dozen, to hide."""
    hidden = [check for check in checks if check.verdict == FAILED][_MAX_FAILURES:]
    return [check for check in checks if check not in hidden], hidden


def verdict_line(verification: Verification) -> str:
    """Return the verdict in one line, with the first failure, or else with the parts that were done."""
    if failures := with_verdict(verification, FAILED):
        return f"NOT VERIFIED: {_count(failures)} failed, first {failures[0].group}: {failures[0].name}"
    passes = with_verdict(verification, PASSED)
    if not passes:
        return "NOT VERIFIED: no check was made"
    # The result may list the parts that were done in parentheses, which stay in lower case.
    verdict, separator, parts = verification.result.partition(" (")
    return f"{verdict.upper()}{separator}{parts}: {_count(passes)} passed, none failed"


def verdict_notes(verification: Verification) -> list[str]:
    """Return the limits of the verdict: parts that were not done and why, unmet requirements, and notes."""
    return [
        *(f"{part.name} {part.state}: {part.reason}" for part in verification.not_checked),
        *(f"required, but {part.state}: {part.name}" for part in verification.unmet),
        *verification.all_notes,
    ]


def _count(checks: Sequence[Check]) -> str:
    return f"{len(checks)} check{'s' if len(checks) != 1 else ''}"


def detail_text(check: Check) -> str:
    """Return the detail of a check without its name, which reports show in another column."""
    return check.detail.removeprefix(f"{check.name} ")


def unmentioned_tensors(check: Check) -> str:
    """Return a short list of the affected tensors that the name and the detail of a failed check do not mention."""
    # Whole names only: `layers.10` does not mention `layers.1`.
    names = [
        name
        for name in check.tensors
        if name != check.name and not re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", check.detail)
    ]
    return first_names(names) if check.verdict == FAILED else ""


def durations(verification: Verification) -> str:
    """Return the time of each stage, such as `structure 0.1 s, bytes 0.5 s`."""
    return ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in verification.seconds.items())

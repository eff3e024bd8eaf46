"""Wording and order of checks, shared by all reports."""

from __future__ import annotations

import re
from collections.abc import Sequence

from converter.errors import first_names
from converter.verification import result
from converter.verification.result import FAILED, PASSED, Check, Verification

GROUPS = {
    "structure": "Names, shapes and types match the target layout, and no weight is NaN or infinite.",
    "record": "The file is the one that its conversion record describes: SHA-256 of every tensor.",
    "bytes": "Every tensor equals its source tensors bit by bit, as the formats' own libraries read them.",
    "outputs": "The converted encoder computes the same features as the source's own implementation.",
    result.ACTIVATIONS: "The activations of a port are those of the encoder, but for rounding.",
    result.REQUIRED: "The parts that --require names were done.",
}
# Verdicts have a sign and a colour, so that either is enough.
SIGNS = {PASSED: "✓", FAILED: "✗", result.WARNING: "!", result.SKIPPED: "-", result.INCONCLUSIVE: "?"}
# A wrong source fails in every tensor: reports show this many failures of a group.
_FAILURES_SHOWN = 12


def by_group(verification: Verification) -> dict[str, list[Check]]:
    """The checks by group, in the order of `GROUPS`."""
    groups: dict[str, list[Check]] = {group: [] for group in GROUPS}
    for check in [*verification.checks, *verification.requirements]:
        groups.setdefault(check.group, []).append(check)
    return {group: checks for group, checks in groups.items() if checks}


def with_verdict(verification: Verification, verdict: str) -> list[Check]:
    """The checks with this verdict."""
    return [check for check in verification.checks if check.verdict == verdict]


def split_failures(checks: Sequence[Check]) -> tuple[list[Check], list[Check]]:
    """The checks of a group to show, and the failures beyond the first dozen."""
    hidden = [check for check in checks if check.verdict == FAILED][_FAILURES_SHOWN:]
    return [check for check in checks if check not in hidden], hidden


def verdict_line(verification: Verification) -> str:
    """The verdict in one line: the first failure, or what was done."""
    if failures := with_verdict(verification, FAILED):
        return f"NOT VERIFIED: {_count(failures)} failed, first {failures[0].group}: {failures[0].name}"
    passes = with_verdict(verification, PASSED)
    if not passes:
        return "NOT VERIFIED: no check was made"
    verdict, _, done = verification.result.partition(" (")
    return f"{verdict.upper()}{f' ({done}' if done else ''}: {_count(passes)} passed, none failed"


def verdict_lines(verification: Verification) -> list[str]:
    """What the verdict leaves open: parts that were not done and why, unmet requirements, and notes."""
    return [
        *(f"{part.name} {part.state}: {part.reason}" for part in verification.not_checked),
        *(f"required, but {part.state}: {part.name}" for part in verification.unmet),
        *verification.all_notes,
    ]


def _count(checks: Sequence[Check]) -> str:
    return f"{len(checks)} check{'s' if len(checks) != 1 else ''}"


def detail_text(check: Check) -> str:
    """The detail without the check's name, which reports show next to it."""
    return check.detail.removeprefix(f"{check.name} ")


def unmentioned_tensors(check: Check) -> str:
    """The affected tensors that neither name nor detail of a failed check mention, shortened; else empty."""
    # Whole names only: `layers.10` does not mention `layers.1`.
    names = [
        name
        for name in check.tensors
        if name != check.name and not re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", check.detail)
    ]
    return first_names(names) if check.verdict == FAILED else ""


def durations(verification: Verification) -> str:
    """Time by stage, such as `structure 0.1 s, bytes 0.5 s`."""
    return ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in verification.seconds.items())

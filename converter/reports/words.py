"""What all views say in the same words."""

from __future__ import annotations

import re

from converter.verification.result import FAILED, PASSED, SKIPPED, WARNING, Check, Verification

PROOFS = {
    "structure": "Whether names, shapes and types are the target's, and whether the weights could show a mistake.",
    "card": "Whether the file is the one that its card describes, by every tensor's SHA-256.",
    "bytes": "Whether every tensor equals its source tensors in every bit, as the formats' own libraries read them.",
    "outputs": "Whether the converted encoder computes what the source's own implementation computes.",
}
# A sign beside each colour: neither is needed to understand the other.
SIGNS = {PASSED: "✓", FAILED: "✗", WARNING: "!", SKIPPED: "-"}


# A wrong pair fails in every tensor: whoever has read a dozen has read them all.
FAULTS_SHOWN = 12


def folded(checks: list[Check]) -> tuple[list[Check], list[Check]]:
    """The checks to show, and the failures beyond the first dozen."""
    rest = [check for check in checks if check.verdict == FAILED][FAULTS_SHOWN:]
    return [check for check in checks if check not in rest], rest


def having(found: Verification, verdict: str) -> list[Check]:
    return [check for check in found.checks if check.verdict == verdict]


def proofs(found: Verification) -> dict[str, list[Check]]:
    """The checks by proof, in the order of the proofs."""
    order = list(dict.fromkeys([*PROOFS, *(check.proof for check in found.checks)]))
    groups = {proof: [check for check in found.checks if check.proof == proof] for proof in order}
    return {proof: checks for proof, checks in groups.items() if checks}


def verdict(found: Verification) -> str:
    """The verdict in one line, with what it leaves open."""
    faults, passes = having(found, FAILED), having(found, PASSED)
    if faults:
        first = faults[0]
        return f"NOT VERIFIED: {_count(len(faults))} failed, first {first.proof}: {first.name}"
    if not passes:
        return "NOT VERIFIED: nothing was proved"
    open_ends = list(dict.fromkeys(check.proof for check in having(found, SKIPPED)))
    if open_ends:
        return f"VERIFIED as far as was checked: {_count(len(passes))} passed; not checked: {', '.join(open_ends)}"
    return f"VERIFIED: {_count(len(passes))} passed, none failed"


def _count(number: int) -> str:
    return f"{number} check{'s' if number != 1 else ''}"


def seen(check: Check) -> str:
    """What was seen, for a reader who has the check's name before the eyes."""
    return check.detail.removeprefix(f"{check.name} ")


def unsaid(check: Check) -> list[str]:
    """The culprits that neither the check's name nor its words name already."""
    # Whole names: `layers.1` is not named by what is said of `layers.10`.
    return [
        name
        for name in check.tensors
        if name != check.name and not re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", check.detail)
    ]


def times(found: Verification) -> str:
    return ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in found.seconds.items())


def shorten(names: list[str]) -> str:
    """The first three names, and how many there are besides."""
    return ", ".join([*names[:3], f"and {len(names) - 3} more"] if len(names) > 3 else names)

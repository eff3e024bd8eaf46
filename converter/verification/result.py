"""What a verification found, as values; the terminal, JSON, JUnit and HTML are views of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from converter.output.record import as_json

PASSED, FAILED, SKIPPED, WARNING = "passed", "failed", "skipped", "noted"


class Check(NamedTuple):
    """One thing that was looked at: which of the three proofs it belongs to, its verdict, and what was seen.

    `culprits` names the tensors, rules or blocks at fault, worst first. `figures` are what was measured; a measured
    `error` stands beside the `bar` it must not exceed.
    """

    proof: str
    name: str
    verdict: str
    detail: str
    tensors: list[str]
    figures: dict[str, float]


class Trace(NamedTuple):
    """Relative errors along an encoder, block by block: of the conversion, and of the reference against itself."""

    name: str
    blocks: list[str]
    errors: list[float]
    floors: list[float]
    bar: float


class Picture(NamedTuple):
    """A PNG of what one run saw or computed; `name` is image, source, converted or difference."""

    run: str
    name: str
    png: bytes


class Verification(NamedTuple):
    """All checks of one converted checkpoint, and what they ran on.

    `reference` names the implementation that the outputs were compared with; `seconds` says where the time went.
    `key_map` gives each tensor that the source makes the source tensors it is made of, in order; none for one that is
    filled in. `pictures` are there if they were asked for.
    """

    converted: str
    source: str
    family: str
    mapping: str
    reference: str
    device: str
    dtype: str
    environment: dict[str, str]
    checks: list[Check]
    traces: list[Trace]
    seconds: dict[str, float]
    key_map: dict[str, list[str]] = {}  # noqa: RUF012
    pictures: list[Picture] = []  # noqa: RUF012

    @property
    def ok(self) -> bool:
        """Whether nothing failed, and at least one check could have."""
        verdicts = [check.verdict for check in self.checks]
        return FAILED not in verdicts and PASSED in verdicts

    def to_json(self) -> dict[str, Any]:
        """The document that `--json` prints: without pictures, and null for a number that is not finite."""
        document = {"verified": self.ok, **as_json(self._replace(pictures=[]))}
        del document["pictures"]
        return document


def shorten(words: Sequence[str], shown: int = 3) -> str:
    """The first of them, and how many there are besides."""
    rest = len(words) - shown
    return ", ".join(words[:shown]) + (f" and {rest} more" if rest > 0 else "")


def passed(proof: str, name: str, detail: str, **figures: float) -> Check:
    return Check(proof, name, PASSED, detail, [], figures)


def failed(proof: str, name: str, detail: str, tensors: list[str], **figures: float) -> Check:
    return Check(proof, name, FAILED, detail, tensors, figures)


def warning(proof: str, name: str, detail: str, tensors: list[str]) -> Check:
    """Something that is not wrong in itself, and that whoever relies on the verdict should know."""
    return Check(proof, name, WARNING, detail, tensors, {})


def skipped(proof: str, name: str, detail: str) -> Check:
    return Check(proof, name, SKIPPED, detail, [], {})

"""Result types of a verification. The terminal table, JSON, JUnit and HTML are rendered from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from converter.output.json_document import as_json

PASSED, FAILED, SKIPPED, WARNING, INCONCLUSIVE = "passed", "failed", "skipped", "warning", "inconclusive"
VERIFIED, PARTLY_VERIFIED, NOT_VERIFIED = "verified", "partly verified", "not verified"
DONE, NOT_CHECKED = "done", "not checked"

# The parts of a verification, each a group of checks. `verified` means that all of them were done.
PARTS = ("structure", "bytes", "outputs")
# Other groups of checks, which no verdict needs.
RECORD, ACTIVATIONS, REQUIRED = "record", "activations", "required"


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    group: str  # One of PARTS, RECORD, ACTIVATIONS and REQUIRED
    name: str  # Unique within the group
    verdict: str  # A check that could not have failed is inconclusive, never passed
    detail: str
    tensors: Sequence[str] = ()  # The affected tensors, files or probes, the most important first
    figures: Mapping[str, float] = field(default_factory=dict)  # Measurements, such as `error` and `tolerance`


@dataclass(frozen=True)
class TracePoint:
    """The relative errors at one probe."""

    probe: str
    error: float  # Of the converted encoder against the reference
    noise_floor: float  # Of the reference against itself in float64
    tolerance: float

    @property
    def within_tolerance(self) -> bool:
        """Whether the error is a number and at most the tolerance."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Trace:
    """The errors of one run, probe by probe."""

    name: str
    points: Sequence[TracePoint] = ()


@dataclass(frozen=True)
class Control:
    """A negative control: a deliberate mistake in a copy of one block."""

    mistake: str  # Completes the sentence "outputs cannot show ... in this checkpoint"
    block: str  # The probe at which it was measured
    effect: float  # The relative error that the comparison would have reported at this probe
    tolerance: float  # The tolerance of the comparison at this probe

    @property
    def seen(self) -> bool:
        """Whether the comparison of outputs would have shown the mistake."""
        return not self.effect <= self.tolerance


@dataclass(frozen=True)
class Part:
    """One of `PARTS`."""

    name: str
    state: str  # done, failed, inconclusive or not checked
    reason: str = ""  # Why the part was not done
    qualifier: str = ""  # A limit of the part that was done, such as `by mine.yaml`


@dataclass(frozen=True)
class Picture:
    """A PNG of the input or of features of one run."""

    run: str
    name: str  # image, source, converted or difference
    png: bytes


@dataclass(frozen=True)
class Verification:
    """All checks of one converted checkpoint, in the order in which they were made."""

    converted: str
    family: str
    checks: Sequence[Check]
    source: str = ""
    mapping: str = ""  # The mapping from the source's layout
    reference: str = ""  # The implementation that the encoder's outputs were compared with
    device: str = "CPU"  # The processor or GPU that the encoders ran on, in the precision `dtype`
    dtype: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)  # Versions of dsocr-convert, torch and Python
    traces: Sequence[Trace] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)  # Time spent in each stage
    # The source tensors of each converted tensor, in order; none for a generated one
    key_map: Mapping[str, Sequence[str]] = field(default_factory=dict)
    pictures: Sequence[Picture] = ()  # The input and the features, if they were requested
    notes: Sequence[str] = ()  # Sentences that belong to the verdict, such as what the outputs cannot show
    controls: Sequence[Control] = ()
    # The limits of parts that were done, such as `by mine.yaml` for bytes
    qualifiers: Mapping[str, str] = field(default_factory=dict)
    required: Sequence[str] = ()  # The parts without which the verification is not ok

    @property
    def parts(self) -> list[Part]:
        """The state of each part, computed from the checks that were made."""
        return [self._part(name) for name in PARTS]

    def _part(self, name: str) -> Part:
        # The worst verdict decides: one check that failed or could not fail leaves a part undone.
        for verdict, state in ((FAILED, FAILED), (INCONCLUSIVE, INCONCLUSIVE), (PASSED, DONE), (SKIPPED, NOT_CHECKED)):
            if checks := [check for check in self.checks if check.group == name and check.verdict == verdict]:
                if state != DONE:
                    return Part(name, state, checks[0].detail)
                if name == "outputs" and self.controls and not any(control.seen for control in self.controls):
                    return Part(name, INCONCLUSIVE, "none of the mistakes made on purpose shows in them")
                return Part(name, DONE, qualifier=self.qualifiers.get(name, ""))
        return Part(name, NOT_CHECKED, "not part of this verification")

    @property
    def done(self) -> list[str]:
        """The parts that were done, such as `structure` or `bytes by mine.yaml`, then `record` and `activations`."""
        done = [f"{part.name} {part.qualifier}".rstrip() for part in self.parts if part.state == DONE]
        for group in (RECORD, ACTIVATIONS):
            verdicts = {check.verdict for check in self.checks if check.group == group}
            done += [group] if PASSED in verdicts and INCONCLUSIVE not in verdicts else []
        return done

    @property
    def verdict(self) -> str:
        """`verified` if all parts were done, `not verified` if a check failed or none passed, or `partly verified`."""
        if any(check.verdict == FAILED for check in self.checks) or not self.done:
            return NOT_VERIFIED
        return VERIFIED if all(part.state == DONE for part in self.parts) else PARTLY_VERIFIED

    @property
    def result(self) -> str:
        """The verdict, with the parts that were done if not all were, such as `partly verified (structure, bytes)`."""
        return f"{self.verdict} ({', '.join(self.done)})" if self.verdict == PARTLY_VERIFIED else self.verdict

    @property
    def not_checked(self) -> list[Part]:
        """The parts that were neither done nor failed."""
        return [part for part in self.parts if part.state in (NOT_CHECKED, INCONCLUSIVE)]

    @property
    def unmet(self) -> list[Part]:
        """The required parts that were not done."""
        return [part for part in self.parts if part.name in self.required and part.state != DONE]

    @property
    def requirements(self) -> list[Check]:
        """One check for each required part, which fails unless the part was done."""
        checks = []
        for part in self.parts:
            if part.name in self.required:
                verdict, detail = PASSED if part.state == DONE else FAILED, f"{part.state}: {part.reason}"
                checks.append(Check(REQUIRED, part.name, verdict, detail.removesuffix(": ")))
        return checks

    @property
    def ok(self) -> bool:
        """Whether no check failed and all that is required was done."""
        return self.verdict != NOT_VERIFIED and not self.unmet

    @property
    def all_notes(self) -> list[str]:
        """The notes, the comparisons left out of a part that was done, and the mistakes that no output would show."""
        done = [part.name for part in self.parts if part.state == DONE]
        skipped = [check for check in self.checks if check.verdict == SKIPPED and check.group in done]
        left_out = [f"{check.name}: {check.detail}" for check in skipped]
        return [*self.notes, *left_out, *_unseen_mistakes(self.controls)]

    def to_json(self) -> dict[str, Any]:
        """Return the document that `--json` prints, without pictures. NaN and infinity become null."""
        document: dict[str, Any] = {
            "verdict": self.verdict,
            "parts": {part.name: part.state for part in self.parts},
            "not_checked": [{"part": part.name, "reason": part.reason} for part in self.not_checked],
            "unmet": [part.name for part in self.unmet],
            **as_json(replace(self, pictures=(), controls=(), notes=self.all_notes)),
            "controls": [as_json(control) | {"seen": control.seen} for control in self.controls],
        }
        del document["pictures"]
        return document


def _unseen_mistakes(controls: Sequence[Control]) -> list[str]:
    """Return a sentence for each mistake that outputs would not show, with the blocks if others would show it."""
    notes = []
    for mistake in dict.fromkeys(control.mistake for control in controls):
        same_mistake = [control for control in controls if control.mistake == mistake]
        if unseen := [control.block for control in same_mistake if not control.seen]:
            blocks = "" if len(unseen) == len(same_mistake) else f"{', '.join(unseen)} of "
            notes.append(f"outputs cannot show {mistake} in {blocks}this checkpoint")
    return notes

"""Results of a verification as values; the terminal table, JSON, JUnit and HTML are made from them."""

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
    """One check of a group: structure, record, bytes or outputs."""

    group: str
    name: str  # Unique within the group
    verdict: str  # One that could not have failed is inconclusive, never passed
    detail: str
    tensors: Sequence[str] = ()  # The affected tensors, files or probes, the most important first
    figures: Mapping[str, float] = field(default_factory=dict)  # Of outputs: `error`, `tolerance` and `noise_floor`


@dataclass(frozen=True)
class TracePoint:
    """Relative errors at one probe: of the conversion, and of the reference against itself in float64."""

    probe: str
    error: float
    noise_floor: float
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
    """A negative control: a mistake made on purpose in one block."""

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
    reason: str = ""  # Why it was not done
    qualifier: str = ""  # Limits what was done, such as `by mine.yaml`


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
    # Limits of what was done by part, such as `by mine.yaml` of the bytes
    qualifiers: Mapping[str, str] = field(default_factory=dict)
    required: Sequence[str] = ()  # The parts without which the verification is not ok

    @property
    def parts(self) -> list[Part]:
        """The state of each part, computed from the checks that were made."""
        return [self._part(name) for name in PARTS]

    def _part(self, name: str) -> Part:
        # The worst verdict decides: one check that failed or could not fail leaves a part undone.
        for verdict, state in ((FAILED, FAILED), (INCONCLUSIVE, INCONCLUSIVE), (PASSED, DONE), (SKIPPED, NOT_CHECKED)):
            if check := next((c for c in self.checks if c.group == name and c.verdict == verdict), None):
                if state != DONE:
                    return Part(name, state, check.detail)
                if name == "outputs" and self.controls and not any(control.seen for control in self.controls):
                    return Part(name, INCONCLUSIVE, "none of the mistakes made on purpose shows in them")
                return Part(name, DONE, qualifier=self.qualifiers.get(name, ""))
        return Part(name, NOT_CHECKED, "not part of this verification")

    @property
    def done(self) -> list[str]:
        """What was done, such as `structure` and `bytes by mine.yaml`; also `record` or `activations`."""
        done = [f"{part.name} {part.qualifier}".rstrip() for part in self.parts if part.state == DONE]
        for group in (RECORD, ACTIVATIONS):
            verdicts = {check.verdict for check in self.checks if check.group == group}
            done += [group] if PASSED in verdicts and INCONCLUSIVE not in verdicts else []
        return done

    @property
    def verdict(self) -> str:
        """`verified`, `partly verified` or `not verified`: what was done, and nothing more."""
        if any(check.verdict == FAILED for check in self.checks) or not self.done:
            return NOT_VERIFIED
        return VERIFIED if all(part.state == DONE for part in self.parts) else PARTLY_VERIFIED

    @property
    def result(self) -> str:
        """The verdict, with what was done if that is not all, such as `partly verified (structure, bytes)`."""
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
        """A check for each required part: whether it was done."""
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
        """The document that `--json` prints: without pictures, and null for a number that is not finite."""
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
    """A sentence for each mistake that no output would show, with its blocks if others would show it."""
    notes = []
    for mistake in dict.fromkeys(control.mistake for control in controls):
        made = [control for control in controls if control.mistake == mistake]
        if unseen := [control.block for control in made if not control.seen]:
            place = "" if len(unseen) == len(made) else f"{', '.join(unseen)} of "
            notes.append(f"outputs cannot show {mistake} in {place}this checkpoint")
    return notes

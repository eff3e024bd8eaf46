"""Results of a verification as values; the terminal table, JSON, JUnit and HTML are made from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from converter.output.json_document import as_json

PASSED, FAILED, SKIPPED, WARNING = "passed", "failed", "skipped", "warning"


@dataclass(frozen=True)
class Check:
    """One check of a group: structure, record, bytes or outputs.

    `name` is unique within the group, `tensors` are the affected tensors, files or probes, the most important first.
    A comparison of outputs has the figures `error`, `tolerance` and `noise_floor`.
    """

    group: str
    name: str
    verdict: str
    detail: str
    tensors: Sequence[str] = ()
    figures: Mapping[str, float] = field(default_factory=dict)


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
class Picture:
    """A PNG of the input or of features of one run; `name` is image, source, converted or difference."""

    run: str
    name: str
    png: bytes


@dataclass(frozen=True)
class Verification:
    """All checks of one converted checkpoint, in the order in which they were made.

    Attributes:
        mapping: The mapping from the source's layout.
        reference: The implementation that the encoder's outputs were compared with.
        device: The processor or GPU that the encoders ran on, in the precision `dtype`.
        environment: Versions of dsocr-convert, torch and Python.
        seconds: Time spent in each stage.
        key_map: The source tensors of each converted tensor, in order; none for a generated one.
        pictures: The input and the features, if they were requested.
    """

    converted: str
    family: str
    checks: Sequence[Check]
    source: str = ""
    mapping: str = ""
    reference: str = ""
    device: str = "CPU"
    dtype: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    traces: Sequence[Trace] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    key_map: Mapping[str, Sequence[str]] = field(default_factory=dict)
    pictures: Sequence[Picture] = ()

    @property
    def ok(self) -> bool:
        """Whether at least one check passed and none failed."""
        verdicts = [check.verdict for check in self.checks]
        return FAILED not in verdicts and PASSED in verdicts

    def to_json(self) -> dict[str, Any]:
        """The document that `--json` prints: without pictures, and null for a number that is not finite."""
        document = {"verified": self.ok, **as_json(replace(self, pictures=()))}
        del document["pictures"]
        return document

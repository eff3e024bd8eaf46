"""The verification as JUnit XML: one test suite a proof, one test case a check, so that CI systems show them."""

from __future__ import annotations

import io

from junitparser import Failure, JUnitXml, Skipped, TestCase, TestSuite

from converter.errors import printable
from converter.reports.words import proofs
from converter.verification.result import FAILED, SKIPPED, WARNING, Check, Verification


def document(found: Verification) -> bytes:
    """The XML document, in UTF-8."""
    report = JUnitXml("dsocr-verify")
    for proof, checks in proofs(found).items():
        suite = TestSuite(f"dsocr-verify.{proof}")
        for name, value in _properties(found).items():
            suite.add_property(name, printable(value))
        for check in checks:
            suite.add_testcase(_case(check))
        report.add_testsuite(suite)
    report.update_statistics()  # type: ignore[no-untyped-call]
    # The library adds up the cases' times, which are not measured; those of the proofs are.
    for suite, proof in zip(report, proofs(found), strict=True):
        suite.time = found.seconds.get(proof, 0.0)
    report.time = sum(found.seconds.values())
    file = io.BytesIO()
    report.write(file, pretty=True)
    return file.getvalue()


def _case(check: Check) -> TestCase:
    case = TestCase(printable(check.name), classname=f"dsocr-verify.{check.proof}", time=0.0)
    detail = _legal(check.detail)
    if check.verdict == FAILED:
        failure = Failure(printable(check.detail), type_=check.proof)
        failure.text = "\n".join([detail, *(f"at fault: {_legal(name)}" for name in check.tensors), *_figures(check)])
        case.result = [failure]
    elif check.verdict == SKIPPED:
        case.result = [Skipped(printable(check.detail))]
    else:
        warning = [_legal(name) for name in check.tensors] if check.verdict == WARNING else []
        case.system_out = "\n".join([detail, *warning, *_figures(check)])
    return case


def _figures(check: Check) -> list[str]:
    return [f"{_legal(name)}: {value:.6g}" for name, value in check.figures.items()]


def _properties(found: Verification) -> dict[str, str]:
    return {
        "converted": found.converted,
        "source": found.source,
        "family": found.family,
        "mapping": found.mapping,
        "reference": found.reference,
        "device": found.device,
        "dtype": found.dtype,
        **found.environment,
    }


def _legal(text: str) -> str:
    """Text between tags: XML has no way to write most control characters. Attributes lose their newlines, too."""
    return printable(text, keep="\n")

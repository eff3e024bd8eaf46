"""Renders a verification as JUnit XML for CI systems: one test suite for each group, one test case for each check."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from converter.errors import printable
from converter.reports.words import by_group, verdict_notes
from converter.verification.result import FAILED, INCONCLUSIVE, SKIPPED, WARNING, Check, Verification

# Message prefixes of the verdicts that become `skipped`. JUnit has no verdict for inconclusive checks.
_SKIP_PREFIXES = {SKIPPED: "", INCONCLUSIVE: "inconclusive: "}
_PROPERTIES = ("converted", "source", "family", "mapping", "reference", "device", "dtype")


def junit_xml(verification: Verification) -> bytes:
    """Return the XML document in UTF-8."""
    root = Element("testsuites", name="dsocr-verify", time=f"{sum(verification.seconds.values()):g}")
    root.attrib.update(_counts([*verification.checks, *verification.requirements]))
    values = {"verdict": verification.result, "notes": "; ".join(verdict_notes(verification))}
    values |= {name: getattr(verification, name) for name in _PROPERTIES} | dict(verification.environment)
    for group, checks in by_group(verification).items():
        seconds = verification.seconds.get(group, 0.0)
        suite = SubElement(root, "testsuite", _counts(checks), name=f"dsocr-verify.{group}", time=f"{seconds:g}")
        properties = SubElement(suite, "properties")
        for name, value in values.items():
            SubElement(properties, "property", name=name, value=printable(value))
        for check in checks:
            _add_case(suite, check)
    indent(root)
    data: bytes = tostring(root, encoding="utf-8", xml_declaration=True)
    return data


def _counts(checks: Sequence[Check]) -> dict[str, str]:
    verdicts = [check.verdict for check in checks]
    failures, skipped = verdicts.count(FAILED), sum(verdict in _SKIP_PREFIXES for verdict in verdicts)
    return {"tests": str(len(checks)), "failures": str(failures), "errors": "0", "skipped": str(skipped)}


def _add_case(suite: Element, check: Check) -> None:
    case = SubElement(suite, "testcase", name=printable(check.name), classname=f"dsocr-verify.{check.group}", time="0")
    if check.verdict in _SKIP_PREFIXES:
        SubElement(case, "skipped", message=printable(f"{_SKIP_PREFIXES[check.verdict]}{check.detail}"))
        return
    if check.verdict == FAILED:
        element = SubElement(case, "failure", message=printable(check.detail), type=check.group)
    else:
        element = SubElement(case, "system-out")
    affected = check.tensors if check.verdict in (FAILED, WARNING) else ()
    figures = [f"{name}: {value:.6g}" for name, value in check.figures.items()]
    # XML has no representation of most control characters.
    element.text = printable("\n".join([check.detail, *(f"affected: {name}" for name in affected), *figures]), "\n")

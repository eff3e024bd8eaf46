"""Checks what tensors do not show about the function that an encoder computes: activation, heads and epsilon.

A conversion may be right in every byte, and its encoder may still compute another function than the source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from converter.plan.assumptions import ASSUMED, Assumptions, describe_differences, differences
from converter.verification.inputs import ConvertedEncoder, Origin
from converter.verification.result import FAILED, INCONCLUSIVE, PASSED, Check


def tested_assumptions(converted: ConvertedEncoder, origin: Origin | None) -> Assumptions:
    """Return the values that a converted encoder computes with; empty for the DeepEncoder's values.

    A file for another library computes with the values in its config, and with the source's values where it has none.
    """
    if converted.in_deep_encoder or origin is None:
        return converted.assumptions
    stated = {name: value for name, value in converted.assumptions.items() if value.is_stated}
    return {**origin.reference_plan.assumptions, **stated}


def check_config(converted: ConvertedEncoder, origin: Origin | None) -> list[Check]:
    """Check that the config next to a converted file states the source's values; no check without a config."""
    if origin is None or converted.in_deep_encoder:
        return []
    expected = origin.reference_plan.assumptions
    return compare_config("structure", converted.assumptions, converted.remarks, expected, "the source")


def compare_config(
    group: str, assumptions: Assumptions, remarks: Sequence[str], expected: Assumptions, expected_from: str
) -> list[Check]:
    """Check the values in the config next to a converted file; no check if it states none.

    Args:
        group: The group of the check.
        assumptions: The values that the config states, and those that are assumed.
        remarks: Remarks on the config. Each warning fails the check, as the config then does not fit the file.
        expected: The values that it should state.
        expected_from: The origin of these values, for messages.
    """
    stated = {name: value for name, value in assumptions.items() if value.is_stated and name in expected}
    wrong = [remark.removeprefix("warning: ") for remark in remarks if remark.startswith("warning: ")]
    wrong += [
        f"{actual.origin} is {actual.value}, in {expected_from} {expected[name].value} ({expected[name].origin})"
        for name, actual in stated.items()
        if actual.value != expected[name].value
    ]
    if wrong:
        return [Check(group, "config", FAILED, "; ".join(wrong))]
    names = ", ".join(name.replace("_", " ") for name in stated)
    return [Check(group, "config", PASSED, f"{names} as in {expected_from}")] if stated else []


def function_note(converted: ConvertedEncoder, origin: Origin | None) -> str:
    """Return a sentence on the source's values that differ from the DeepEncoder's; empty if none do."""
    return _describe_source_function(origin.reference_plan.assumptions) if origin and converted.in_deep_encoder else ""


def check_function(check: Check, assumptions: Assumptions) -> Check:
    """Return the check of a comparison with the source's own function, whose values differ from the DeepEncoder's."""
    name = f"source's {', '.join(differences(assumptions)).replace('_', ' ')}"
    verdict, outcome = (PASSED, "agree") if check.verdict == PASSED else (INCONCLUSIVE, "differ")
    detail = f"{_describe_source_function(assumptions)}: outputs {outcome}: {check.detail}"
    return replace(check, name=name, verdict=verdict, detail=detail, tensors=[])


def _describe_source_function(assumptions: Assumptions) -> str:
    theirs, ours = describe_differences(assumptions)
    return f"the source computes with {theirs}, the DeepEncoder with {ours}" if theirs else ""


def check_unusable_values(assumptions: Assumptions) -> list[Check]:
    """Return an inconclusive check for each value that the source's config states in a form that cannot be used."""
    return [
        Check("outputs", f"source's {name.replace('_', ' ')}", INCONCLUSIVE, f"{assumed.value} is {assumed.origin}")
        for name, assumed in assumptions.items()
        if "." not in name and not assumed.is_stated and assumed.origin != ASSUMED
    ]

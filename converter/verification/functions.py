"""The function that an encoder computes: activation, heads and epsilon, which no tensor shows.

A conversion may be right in every byte, and its encoder still compute another function than the source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from converter.plan.assumptions import ASSUMED, Assumptions, describe_differences, differences
from converter.verification.inputs import ConvertedEncoder, Origin
from converter.verification.result import FAILED, INCONCLUSIVE, PASSED, Check


def tested_assumptions(converted: ConvertedEncoder, origin: Origin | None) -> Assumptions:
    """Return what a converted encoder computes with; empty for the DeepEncoder's values.

    A file for another library computes with what its config states, and with the source's values without a config.
    """
    if converted.in_deep_encoder or origin is None:
        return converted.assumptions
    stated = {name: each for name, each in converted.assumptions.items() if each.is_stated}
    return {**origin.reference_plan.assumptions, **stated}


def check_config(converted: ConvertedEncoder, origin: Origin | None) -> list[Check]:
    """Check that the config next to a converted file states what the source computes with; none without a config."""
    if origin is None or converted.in_deep_encoder:
        return []
    expected = origin.reference_plan.assumptions
    return compare_config("structure", converted.assumptions, converted.remarks, expected, "the source")


def compare_config(
    group: str, assumptions: Assumptions, remarks: Sequence[str], expected: Assumptions, place: str
) -> list[Check]:
    """Check what the config next to a converted file states; none if it states nothing.

    Args:
        group: The group of the check.
        assumptions: What the config states, and what is assumed.
        remarks: Remarks on the config; one that cannot be used is not that of the converted file.
        expected: What it should state.
        place: Where these values are from.
    """
    stated = {name: each for name, each in assumptions.items() if each.is_stated and name in expected}
    wrong = [remark.removeprefix("warning: ") for remark in remarks if remark.startswith("warning: ")]
    wrong += [
        f"{each.origin} is {each.value}, in {place} {expected[name].value} ({expected[name].origin})"
        for name, each in stated.items()
        if each.value != expected[name].value
    ]
    if wrong:
        return [Check(group, "config", FAILED, "; ".join(wrong))]
    names = ", ".join(name.replace("_", " ") for name in stated)
    return [Check(group, "config", PASSED, f"{names} as in {place}")] if stated else []


def function_note(converted: ConvertedEncoder, origin: Origin | None) -> str:
    """Return a sentence on what the source computes otherwise than the DeepEncoder; empty if nothing."""
    return _other_function(origin.reference_plan.assumptions) if origin and converted.in_deep_encoder else ""


def check_function(check: Check, assumptions: Assumptions) -> Check:
    """Describe a comparison of a DeepEncoder's part with the source's own function, given the source's values."""
    name = f"source's {', '.join(differences(assumptions)).replace('_', ' ')}"
    verdict, outcome = (PASSED, "agree") if check.verdict == PASSED else (INCONCLUSIVE, "differ")
    detail = f"{_other_function(assumptions)}: outputs {outcome}: {check.detail}"
    return replace(check, name=name, verdict=verdict, detail=detail, tensors=[])


def _other_function(assumptions: Assumptions) -> str:
    theirs, ours = describe_differences(assumptions)
    return f"the source computes with {theirs}, the DeepEncoder with {ours}" if theirs else ""


def check_assumed(assumptions: Assumptions) -> list[Check]:
    """Inconclusive checks of values that the source's config states in a form that cannot be used."""
    return [
        Check("outputs", f"source's {name.replace('_', ' ')}", INCONCLUSIVE, f"{each.value} is {each.origin}")
        for name, each in assumptions.items()
        if "." not in name and not each.is_stated and each.origin != ASSUMED
    ]

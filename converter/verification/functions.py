"""The function that an encoder computes: activation, heads and epsilon, which no tensor shows.

A conversion may be right in every byte, and its encoder still compute another function than the source.
"""

from __future__ import annotations

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
    return {**origin.reference_plan.assumptions, **_stated(converted)}


def check_config(converted: ConvertedEncoder, origin: Origin | None) -> list[Check]:
    """Check that the config next to a converted file states what the source computes with; none without a config."""
    stated = _stated(converted) if origin else {}
    source = origin.reference_plan.assumptions if origin else {}
    wrong = [
        f"{each.origin} is {each.value}, in the source {source[name].value} ({source[name].origin})"
        for name, each in stated.items()
        if each.value != source[name].value
    ]
    if wrong:
        return [Check("structure", "config", FAILED, "; ".join(wrong))]
    names = ", ".join(name.replace("_", " ") for name in stated)
    return [Check("structure", "config", PASSED, f"{names} as in the source")] if stated else []


def function_notes(converted: ConvertedEncoder, origin: Origin | None) -> list[str]:
    """Return a sentence on what the source computes otherwise than the DeepEncoder, if it does."""
    if origin is None or not converted.in_deep_encoder:
        return []
    theirs, ours = describe_differences(origin.reference_plan.assumptions)
    return [f"the source computes with {theirs}, the DeepEncoder with {ours}"] if theirs else []


def check_function(check: Check, assumptions: Assumptions) -> Check:
    """Describe a comparison of a DeepEncoder's part with the source's own function.

    Args:
        check: The comparison.
        assumptions: The source's values.
    """
    theirs, ours = describe_differences(assumptions)
    name = f"source's {', '.join(differences(assumptions)).replace('_', ' ')}"
    verdict, outcome = (PASSED, "agree") if check.verdict == PASSED else (INCONCLUSIVE, "differ")
    detail = f"the source computes with {theirs}, the DeepEncoder with {ours}: outputs {outcome}: {check.detail}"
    return replace(check, name=name, verdict=verdict, detail=detail, tensors=[])


def _stated(converted: ConvertedEncoder) -> Assumptions:
    return {name: each for name, each in converted.assumptions.items() if each.origin != ASSUMED}

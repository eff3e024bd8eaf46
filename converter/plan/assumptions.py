"""Assumptions on what no tensor shows, such as activation and heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from converter.layouts.spec import CanonicalLayout

Value = str | int | float | list[float]
# The origin of a value that no config states.
ASSUMED = "assumed"


class Assumption(NamedTuple):
    """A value that no tensor shows."""

    value: Value  # The value that the source computes with
    expected: Value  # The DeepEncoder's value
    # The config and the key that state the value; or "assumed", with the reason, and then it is the DeepEncoder's
    origin: str = ASSUMED

    @property
    def is_stated(self) -> bool:
        """Whether a config states the value."""
        return not self.origin.startswith(ASSUMED)


Assumptions = Mapping[str, Assumption]


def assumed(target: CanonicalLayout) -> dict[str, Assumption]:
    """Return the assumptions on a checkpoint without a config."""
    return {name: Assumption(value, value) for name, value in target.assumptions.items()}


def values_of(assumptions: Assumptions, part: str = "") -> dict[str, Any]:
    """Return the values of one part by their names without the part; of the encoder itself by default."""
    split = {name.rpartition("."): assumption.value for name, assumption in assumptions.items()}
    return {name: value for (of_part, _, name), value in split.items() if of_part == part}


def differences(assumptions: Assumptions) -> dict[str, Assumption]:
    """Return the values of the encoder that differ from the DeepEncoder's."""
    return {name: each for name, each in assumptions.items() if "." not in name and each.value != each.expected}


def used_assumptions(assumptions: Assumptions, tensors: Iterable[str]) -> dict[str, Assumption]:
    """Return the assumptions on the encoder, and on those parts of a full model of which there are tensors."""
    parts = {name.partition(".")[0] for name in tensors}
    return {name: each for name, each in assumptions.items() if "." not in name or name.partition(".")[0] in parts}


def describe_differences(assumptions: Assumptions) -> tuple[str, str]:
    """Return the differing values in words: the source's, with their origin, and the DeepEncoder's; empty for none."""
    different = differences(assumptions)
    origins = ", ".join(dict.fromkeys(assumption.origin for assumption in different.values()))
    theirs = ", ".join(f"{name.replace('_', ' ')} {assumption.value}" for name, assumption in different.items())
    ours = ", ".join(f"{name.replace('_', ' ')} {assumption.expected}" for name, assumption in different.items())
    return (f"{theirs} ({origins})", ours) if different else ("", "")

"""Assumptions: values that an encoder computes with and that no tensor shows, such as activation and heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from converter.layouts.spec import CanonicalLayout

Value = str | int | float | list[float]
# The origin of a value that no config states.
ASSUMED = "assumed"


class Assumption(NamedTuple):
    """A value that the encoder computes with and that no tensor shows."""

    value: Value  # The value of the source
    expected: Value  # The value of the DeepEncoder
    # The config and the key that state the value. If none does: "assumed" and why; `value` is then the DeepEncoder's
    origin: str = ASSUMED

    @property
    def is_stated(self) -> bool:
        """Whether a config states the value."""
        return not self.origin.startswith(ASSUMED)


Assumptions = Mapping[str, Assumption]


def default_assumptions(target: CanonicalLayout) -> dict[str, Assumption]:
    """Return the assumptions for a checkpoint without a config."""
    return {name: Assumption(value, value) for name, value in target.assumptions.items()}


def values_of(assumptions: Assumptions, part: str = "") -> dict[str, Any]:
    """Return the values of a part of a full model, such as `text_model`, by names without it; default: the encoder."""
    of_part = {name: value for name, value in assumptions.items() if name.rpartition(".")[0] == part}
    return {name.rpartition(".")[2]: assumption.value for name, assumption in of_part.items()}


def differences(assumptions: Assumptions) -> dict[str, Assumption]:
    """Return the values of the encoder that differ from the DeepEncoder's."""
    of_encoder = {name: assumption for name, assumption in assumptions.items() if "." not in name}
    return {name: assumption for name, assumption in of_encoder.items() if assumption.value != assumption.expected}


def used_assumptions(assumptions: Assumptions, tensors: Iterable[str]) -> dict[str, Assumption]:
    """Return the assumptions on the encoder, and on the other parts of a full model that have tensors."""
    parts = {name.partition(".")[0] for name in tensors}
    return {name: value for name, value in assumptions.items() if "." not in name or name.partition(".")[0] in parts}


def describe_differences(assumptions: Assumptions) -> tuple[str, str]:
    """Return texts of the source's differing values, with their origin, and of the DeepEncoder's; empty for none."""
    different = differences(assumptions)
    origins = ", ".join(dict.fromkeys(assumption.origin for assumption in different.values()))
    source = ", ".join(f"{name.replace('_', ' ')} {assumption.value}" for name, assumption in different.items())
    expected = ", ".join(f"{name.replace('_', ' ')} {assumption.expected}" for name, assumption in different.items())
    return (f"{source} ({origins})", expected) if different else ("", "")

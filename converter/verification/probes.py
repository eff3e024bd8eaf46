"""Probes: the places in an encoder where features are compared, the same in every implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Probe:
    """A module whose output is compared, or its input with `takes_input`."""

    name: str
    module: nn.Module
    takes_input: bool = False


@dataclass(frozen=True)
class ProbedEncoder:
    """An encoder to run."""

    label: str  # Library, version and class
    model: nn.Module
    probes: Sequence[Probe]  # Where features are recorded. One whose module does not run records nothing.
    run: Callable[[Tensor], Any]  # Computes features from pixels (B, 3, H, W)
    output: str = ""  # The probe name of what `run` returns; empty if it is not compared


def record_features(encoder: ProbedEncoder, pixels: Tensor) -> dict[str, Tensor]:
    """The features at every probe, in the order of execution."""
    recorded: dict[str, Tensor] = {}
    handles = [_record(probe, recorded) for probe in encoder.probes]
    try:
        with torch.inference_mode():
            output = encoder.run(pixels)
    finally:
        for handle in handles:
            handle.remove()
    return recorded | ({encoder.output: _tensor(output).detach()} if encoder.output else {})


def _record(probe: Probe, recorded: dict[str, Tensor]) -> torch.utils.hooks.RemovableHandle:
    """Hook a probe's module to put its features into `recorded`."""

    def record(features: Tensor) -> None:
        recorded[probe.name] = features.detach().clone()

    if not probe.takes_input:
        return probe.module.register_forward_hook(lambda module, args, output: record(_tensor(output)))
    return probe.module.register_forward_pre_hook(
        lambda module, args, kwargs: record((args or tuple(kwargs.values()))[0]), with_kwargs=True
    )


def _tensor(output: Any) -> Tensor:
    """The features in a module's output: a tensor, a tuple that begins with it, or transformers' output object."""
    while not isinstance(output, Tensor):
        output = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
    return output

"""Runs encoders with probes that record features, and builds them without drawing random weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Methods of tensors, and functions of torch.nn.init or of libraries that wrap it.
_RANDOM = ("normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_")


class Probe(NamedTuple):
    """A module whose features are compared. Probes of the same name in two implementations record the same features."""

    name: str
    module: nn.Module
    takes_input: bool = False  # Whether the features are the input of the module, not its output


@dataclass(frozen=True)
class ProbedEncoder:
    """An encoder, its probes, and the function that runs it."""

    label: str  # The library, its version, and the class
    model: nn.Module
    probes: Sequence[Probe]  # Probes whose modules do not run record nothing
    run: Callable[[Tensor], Any]  # Computes features from pixels (B, 3, H, W)
    output: str = ""  # The name under which the result of `run` is recorded; empty if it is not compared


class SkipInitialization(TorchFunctionMode):
    """Skips the random initialisation of modules that are built inside this context, in this thread only.

    Random weights take seconds to draw, and a checkpoint's overwrite them. Unlike construction on the meta device,
    buffers and constants get their values.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _RANDOM:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def record_features(encoder: ProbedEncoder, pixels: Tensor) -> dict[str, Tensor]:
    """Run an encoder; return the features at every probe, in the order of execution."""
    recorded: dict[str, Tensor] = {}
    handles = [_register_hook(probe, recorded) for probe in encoder.probes]
    try:
        with torch.inference_mode():
            output = encoder.run(pixels)
    finally:
        for handle in handles:
            handle.remove()
    return recorded | ({encoder.output: _features_in(output).detach()} if encoder.output else {})


def _register_hook(probe: Probe, recorded: dict[str, Tensor]) -> torch.utils.hooks.RemovableHandle:
    """Register a forward hook that puts the features of a probe into `recorded`."""

    def record(features: Tensor) -> None:
        recorded[probe.name] = features.detach().clone()

    if not probe.takes_input:
        return probe.module.register_forward_hook(lambda module, args, output: record(_features_in(output)))
    return probe.module.register_forward_pre_hook(
        lambda module, args, kwargs: record((args or tuple(kwargs.values()))[0]), with_kwargs=True
    )


def _features_in(output: Any) -> Tensor:
    """Return the tensor in a module's output, which may be a tuple or one of transformers' output objects."""
    while not isinstance(output, Tensor):
        output = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
    return output

"""Encoders as they run: built without random weights, with probes where features are compared."""

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
    """A module whose output is compared, or its input with `takes_input`; the same place in every implementation."""

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


class SkipInitialization(TorchFunctionMode):
    """Leaves parameters of modules that are built inside of it uninitialised, in this thread only.

    Random weights take seconds to draw, and a checkpoint's overwrite them. Unlike construction on the meta device,
    buffers and constants get their values.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _RANDOM:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


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

"""Modules built without random weights, which take seconds to draw and are overwritten by a checkpoint's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.overrides import TorchFunctionMode

# Methods of tensors, and functions of torch.nn.init or of libraries that wrap it.
_RANDOM = ("normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_")


class SkipInitialization(TorchFunctionMode):
    """Leaves parameters of modules that are built inside of it uninitialised.

    It holds for this thread only. Unlike construction on the meta device, buffers and constants get their values.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _RANDOM:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)

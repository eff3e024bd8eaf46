"""LoRA adapters as values: their settings, the factors of each module, and tensors that were trained whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

from converter.tensors.tensor_info import TensorInfo

_Number = TypeVar("_Number", int, float)


class AdapterConfig(NamedTuple):
    """The settings of a LoRA adapter."""

    base_model: str  # The model that it was trained on; empty if the config does not say
    rank: int
    alpha: float
    ranks: Mapping[str, int]  # Of modules with another rank, by their names or ends of them
    alphas: Mapping[str, float]
    rslora: bool  # Whether the scale is alpha / sqrt(rank), not alpha / rank

    def scale_of(self, module: str) -> tuple[int, float, float]:
        """Return rank and alpha of a module, and its factor of B @ A."""
        rank, alpha = _lookup(self.ranks, module, self.rank), _lookup(self.alphas, module, self.alpha)
        return rank, alpha, alpha / (math.sqrt(rank) if self.rslora else rank)


def _lookup(values: Mapping[str, _Number], module: str, default: _Number) -> _Number:
    """Return the value of the first name that is the module's, or the end of it; `^` allows the whole name alone."""
    for name, value in values.items():
        is_whole = name.startswith("^")
        if module == name.removeprefix("^") or (not is_whole and module.endswith(f".{name}")):
            return value
    return default


class Factors(NamedTuple):
    """The factors of one module: its weight becomes W + scale * B @ A."""

    a: TensorInfo
    b: TensorInfo
    is_embedding: bool  # The sum is W + scale * (B @ A) transposed
    rank: int
    alpha: float
    scale: float


class Adapter(NamedTuple):
    """A LoRA adapter."""

    name: str  # Its file, for messages
    config: AdapterConfig
    factors: Mapping[str, Factors]  # By the paths of modules, without PEFT's prefix
    # Tensors that replace those of the model, by their names there: modules_to_save and trained biases
    whole: Mapping[str, TensorInfo]
    has_encoder: bool  # Whether the trained encoder is in a file of its own next to the adapter, as ms-swift saves it

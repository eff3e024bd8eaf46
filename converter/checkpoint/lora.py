"""LoRA adapters as values: their settings, the factors of each module, and tensors that were trained whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from converter.tensors.tensor_info import TensorInfo

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of a LoRA adapter.

    Attributes:
        base_model: The model that it was trained on; empty if the config does not say.
        rank: The rank of modules that `ranks` does not name.
        alpha: The alpha of modules that `alphas` does not name.
        ranks: Ranks by names of modules, or ends of them.
        alphas: The alpha by names of modules, or ends of them.
        rslora: Whether the scale is alpha / sqrt(rank), not alpha / rank.
    """

    base_model: str
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rslora: bool

    def rank_of(self, module: str) -> int:
        """The rank of a module."""
        return _lookup(self.ranks, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """The alpha of a module."""
        return _lookup(self.alphas, module, self.alpha)

    def scale(self, module: str) -> float:
        """The factor of B @ A for a module."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.rslora else rank)


class Factors(NamedTuple):
    """The factors of one module: its weight becomes W + scale * B @ A."""

    a: TensorInfo
    b: TensorInfo
    is_embedding: bool  # The sum is W + scale * (B @ A) transposed
    rank: int
    alpha: float
    scale: float


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter.

    Attributes:
        name: Its file, for messages.
        config: Its config.
        factors: The factors by the paths of modules, without PEFT's prefix.
        whole: Tensors that replace those of the model, by their names there: modules_to_save and trained biases.
        has_encoder: Whether the trained encoder is in a file of its own next to the adapter, as ms-swift saves it.
    """

    name: str
    config: AdapterConfig
    factors: Mapping[str, Factors]
    whole: Mapping[str, TensorInfo]
    has_encoder: bool = False


def _lookup(values: Mapping[str, _Number], module: str, default: _Number) -> _Number:
    """Return the value of the first name that is the module's, or the end of it; `^` allows the whole name alone."""
    for name, value in values.items():
        is_whole = name.startswith("^")
        if module == name.removeprefix("^") or (not is_whole and module.endswith(f".{name}")):
            return value
    return default

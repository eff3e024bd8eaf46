"""Values that describe a LoRA adapter: its settings, the factors of each module, and fully trained tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

from converter.tensors.tensor_info import TensorInfo

_Number = TypeVar("_Number", int, float)


class AdapterConfig(NamedTuple):
    """The settings of a LoRA adapter."""

    base_model: str  # The model that it was trained on; empty if the config does not say
    rank: int  # The default rank
    alpha: float  # The default alpha
    # PEFT's `rank_pattern` and `alpha_pattern`: other values, by the name of a module or the end of its name
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool  # Whether the scale is alpha / sqrt(rank), not alpha / rank

    def scale_of(self, module: str) -> tuple[int, float, float]:
        """Return the rank and the alpha of a module, and the scale by which its B @ A is multiplied."""
        rank = _lookup(self.rank_pattern, module, self.rank)
        alpha = _lookup(self.alpha_pattern, module, self.alpha)
        return rank, alpha, alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _lookup(pattern: Mapping[str, _Number], module: str, default: _Number) -> _Number:
    """Return the value of the first name that is the module's name or its end; after `^`, only the full name fits."""
    for name, value in pattern.items():
        is_full_name = name.startswith("^")
        if module == name.removeprefix("^") or (not is_full_name and module.endswith(f".{name}")):
            return value
    return default


class Factors(NamedTuple):
    """The factors of one module: its weight becomes W + scale * B @ A."""

    a: TensorInfo
    b: TensorInfo
    is_embedding: bool  # Whether the weight becomes W + scale * (B @ A) transposed, as for an embedding
    rank: int
    alpha: float
    scale: float


class Adapter(NamedTuple):
    """A LoRA adapter."""

    name: str  # The name of its file, for messages
    config: AdapterConfig
    factors: Mapping[str, Factors]  # The factors by the path of the module, without PEFT's prefix
    # Tensors that replace tensors of the model (modules_to_save and trained biases), by their names in the model
    fully_trained: Mapping[str, TensorInfo]
    has_encoder: bool  # Whether the trained encoder is in another file next to the adapter, as ms-swift saves it

    @property
    def modules(self) -> list[str]:
        """The modules that the adapter trains, and the names of fully trained tensors."""
        return [*self.factors, *self.fully_trained]

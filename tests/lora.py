"""Tiny models with adapters that peft made, trained for two steps, and the weights that peft merges from them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CLIP_IMAGE, GRID, PATCH
from safetensors.torch import save_file

peft = pytest.importorskip("peft", exc_type=ImportError)
State = dict[str, torch.Tensor]


def clip_loss(model: Any) -> torch.Tensor:
    pixels = torch.randn(2, 3, CLIP_IMAGE, CLIP_IMAGE, generator=torch.Generator().manual_seed(1))
    return getattr(model, "vision_model", model)(pixels.to(model.dtype)).last_hidden_state.float().tanh().mean()


def sam_loss(model: Any) -> torch.Tensor:
    pixels = torch.randn(1, 3, GRID * PATCH, GRID * PATCH, generator=torch.Generator().manual_seed(1))
    features = model.vision_encoder(pixels.to(model.dtype)).last_hidden_state
    return features.float().tanh().mean()  # type: ignore[no-any-return]


def qwen2_loss(model: Any) -> torch.Tensor:
    return model.model(torch.arange(5)[None]).last_hidden_state.float().tanh().mean()  # type: ignore[no-any-return]


def train(
    model: torch.nn.Module, loss: Callable[[Any], torch.Tensor], dtype: torch.dtype = torch.float32, **config: Any
) -> Any:
    """A copy of a model with an adapter that was trained for two steps."""
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **config}
    wrapped = peft.get_peft_model(copy.deepcopy(model).to(dtype), peft.LoraConfig(**options))
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        loss(wrapped.base_model.model).backward()
        optimizer.step()
    return wrapped


def save_model(model: torch.nn.Module, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save the weights of a model from before the training."""
    save_file({name: tensor.to(dtype).contiguous().clone() for name, tensor in model.state_dict().items()}, path)
    return path


def save_merged(model: Any, path: Path) -> Path:
    """Save the weights that peft merges."""
    merged = copy.deepcopy(model).merge_and_unload()
    save_file({name: tensor.contiguous().clone() for name, tensor in merged.state_dict().items()}, path)
    return path


def off_by(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The distance of two tensors of one type, element by element, in units in the last place."""
    kind = {4: torch.int32, 2: torch.int16}[actual.element_size()]

    def ordered(tensor: torch.Tensor) -> torch.Tensor:
        bits = tensor.contiguous().view(kind).long()
        return torch.where(bits < 0, -(bits & torch.iinfo(kind).max), bits)

    return (ordered(actual) - ordered(expected)).abs()


def assert_merged(actual: State, expected: State) -> None:
    """At least 99.9 % of elements are equal in every bit, and none is further away than one unit in the last place."""
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape), name
        distance = off_by(tensor, expected[name]) if tensor.is_floating_point() else tensor != expected[name]
        assert distance.max() <= 1 and (distance == 0).double().mean() >= 0.999, name

"""LoRA adapters merged by peft, or by torch in float64 where peft is not installed, as a check of our own merge."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from collections.abc import Mapping, Set
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from converter.checkpoint.lora import Adapter, Factors
from converter.checkpoint.open import Checkpoint
from converter.layouts import registry
from converter.plan.merge import match_adapter
from converter.storage.progress import OnProgress
from converter.tensors.evaluate import bit_view, evaluate, torch_dtype
from converter.tensors.lazy_tensor import Cast, LazyTensor, is_resampled, source_tensors
from converter.tensors.tensor_info import TensorInfo
from converter.verification.inputs import Converted, Expected
from converter.verification.reference_readers import Reader, open_independently

# Of the elements of a tensor: those that must be equal in every bit. The others may differ in the last place.
_MIN_EQUAL = 0.999
# Without peft, float32 is compared with a sum in float64, within a few roundings of the largest element.
_FLOAT32_TOLERANCE = 2.0**-22


def merged_by_library(
    target: Converted, expected: Expected, adapter: Adapter, files: Checkpoint, on_progress: OnProgress
) -> Expected:
    """Return the expected output of a conversion, with an adapter merged into the tensors as they are read.

    Args:
        target: The converted file.
        expected: The expected output of the conversion without the adapter.
        adapter: The adapter.
        files: The files of the adapter.
        on_progress: Called as tensors are fetched from a hub.

    Raises:
        LayoutError: An encoder lacks a module of the adapter.
    """
    changes: dict[TensorInfo, Factors | TensorInfo] = {}
    adapter_tensors: list[TensorInfo] = []
    for family, origin in expected.origins.items():
        names = origin.detected.all_tensors
        merged = match_adapter(adapter, origin.detected, registry.canonical(family), expected.name)
        changes |= {names[name]: change.trained for name, change in merged.changes.items()}
        adapter_tensors += [tensor for change in merged.changes.values() for tensor in change.tensors]
    read_adapter = open_independently(files, adapter_tensors, on_progress)

    def read(tensor: TensorInfo) -> Tensor:
        base, change = expected.read(tensor), changes.get(tensor)
        if change is None:
            return base
        if isinstance(change, TensorInfo):
            return read_adapter(change).to(base.dtype)
        merge = _by_peft if _has_peft() else _by_torch
        return merge(base, read_adapter(change.a), read_adapter(change.b), change, adapter.config.use_rslora)

    merged_tensors = frozenset(tensor for tensor, change in changes.items() if isinstance(change, Factors))
    rounded = _rounded_alike(read, merged_tensors, expected.outputs, target)
    return replace(
        expected,
        read=read,
        origins={family: replace(origin, read=rounded) for family, origin in expected.origins.items()},
        merged=merged_tensors,
        merged_by=f"peft {importlib.metadata.version('peft')}" if _has_peft() else "torch in float64",
    )


def _rounded_alike(
    read: Reader, merged: Set[TensorInfo], outputs: Mapping[str, LazyTensor], target: Converted
) -> Reader:
    """A reader of merged tensors with the elements of the converted file where those are neighbours.

    The order of a sum depends on the processor. In 16 bits, a single rounding would show in the outputs.
    """
    uses: dict[TensorInfo, list[tuple[str, LazyTensor]]] = {}
    for name, value in outputs.items():
        for tensor in merged & set(source_tensors(value)):
            if name in target.tensors and not is_resampled(value):
                uses.setdefault(tensor, []).append((name, value.base if isinstance(value, Cast) else value))

    def rounded(tensor: TensorInfo) -> Tensor:
        result = read(tensor).contiguous()
        for name, value in uses.get(tensor, ()):
            actual = target.read(target.tensors[name])
            if tuple(actual.shape) == value.shape and actual.is_floating_point():
                positions = evaluate(value, partial(_positions, tensor)).flatten()
                part = positions >= 0
                _take_neighbours(result.view(-1), positions[part], actual.flatten()[part])
        return result

    return rounded


def _positions(wanted: TensorInfo, tensor: TensorInfo) -> Tensor:
    """Give each element of a tensor its number; -1 if it is not the wanted one."""
    size = math.prod(tensor.shape)
    return (torch.arange(size) if tensor == wanted else torch.full((size,), -1)).reshape(tensor.shape)


def _take_neighbours(merged: Tensor, positions: Tensor, actual: Tensor) -> None:
    """Replace elements of `merged` by the `actual` ones that are at most one unit in the last place away."""
    unit, expected = _coarser(merged.dtype, actual.dtype), merged[positions]
    is_near = (_places(actual.to(unit)) - _places(expected.to(unit))).abs() <= 1
    merged[positions] = torch.where(is_near, actual.to(merged.dtype), expected)


def _coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    return a if torch.finfo(a).eps >= torch.finfo(b).eps else b


def _has_peft() -> bool:
    return importlib.util.find_spec("peft") is not None


def _by_peft(base: Tensor, a: Tensor, b: Tensor, factors: Factors, rslora: bool) -> Tensor:
    import peft

    rows, columns = base.shape[:2]
    if factors.is_embedding:
        layer: Any = nn.Embedding(rows, columns, dtype=base.dtype)
    elif base.dim() == 2:
        layer = nn.Linear(columns, rows, bias=False, dtype=base.dtype)
    else:
        layer = nn.Conv2d(columns, rows, base.shape[2:], bias=False, dtype=base.dtype)  # type: ignore[arg-type]
    layer.weight.data = base.clone()
    config = peft.LoraConfig(
        r=factors.rank, lora_alpha=factors.alpha, use_rslora=rslora, init_lora_weights=False, target_modules=["layer"]
    )
    model = peft.inject_adapter_in_model(config, nn.ModuleDict({"layer": layer}))
    wrapped: Any = model["layer"]
    dtype = torch.promote_types(base.dtype, torch.float32)
    for parameter in wrapped.parameters():
        # As PeftModel.from_pretrained does with adapters of 16 bits.
        parameter.data = parameter.data if parameter is wrapped.base_layer.weight else parameter.data.to(dtype)
    name = "layer.lora_embedding_{}" if factors.is_embedding else "layer.lora_{}.weight"
    peft.set_peft_model_state_dict(model, {name.format("A"): a, name.format("B"): b})
    wrapped.merge()
    return wrapped.base_layer.weight.data  # type: ignore[no-any-return]


def _by_torch(base: Tensor, a: Tensor, b: Tensor, factors: Factors, rslora: bool) -> Tensor:
    """Merge one module in float64, rounded once."""
    scale = factors.alpha / (factors.rank**0.5 if rslora else factors.rank)
    product: Tensor = torch.tensordot(b.double().flatten(1), a.double(), 1) * scale
    # peft rounds the product of embeddings too.
    total: Tensor = base.double() + (product.T.to(base.dtype) if factors.is_embedding else product)
    return total.to(base.dtype)


def is_merge(actual: Tensor, expected: Tensor, base: str, by: str) -> bool:
    """Whether two tensors may be the same merge: few elements differ, and only by a rounding.

    Args:
        actual: The converted tensor.
        expected: The one that the library merged.
        base: The type of the source's weights, in which the sum was rounded.
        by: The library.
    """
    unit = _coarser(torch_dtype(base), actual.dtype)
    actual, expected = actual.to(unit), expected.to(unit)
    if by.startswith("torch") and unit == torch.float32:
        return bool((actual - expected).abs().max() <= _FLOAT32_TOLERANCE * expected.abs().max())
    distance = (_places(actual) - _places(expected)).abs()
    return bool((distance <= 1).all()) and float((distance == 0).double().mean()) >= _MIN_EQUAL


def _places(tensor: Tensor) -> Tensor:
    """The elements as integers, of which neighbouring numbers are one apart."""
    bits = bit_view(tensor)
    return torch.where(bits < 0, -(bits.long() & torch.iinfo(bits.dtype).max), bits.long())

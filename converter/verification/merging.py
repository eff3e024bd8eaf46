"""Merges LoRA adapters with peft, or with torch in float64 if peft is not installed, to check our own merge."""

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

# The fraction of elements that must be equal in every bit. The others may differ by one unit in the last place.
_MIN_EQUAL = 0.999
# Without peft, float32 is compared with a merge in float64. The tolerance is a few roundings of the largest element.
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
        for name, change in merged.changes.items():
            changes[names[name]] = change.trained
            adapter_tensors += change.tensors
    read_adapter = open_independently(files, adapter_tensors, on_progress)

    def read(tensor: TensorInfo) -> Tensor:
        base, change = expected.read(tensor), changes.get(tensor)
        if change is None:
            return base
        if isinstance(change, TensorInfo):
            return read_adapter(change).to(base.dtype)
        merge = _merge_with_peft if _has_peft() else _merge_with_torch
        return merge(base, read_adapter(change.a), read_adapter(change.b), change, adapter.config.use_rslora)

    merged_tensors = frozenset(tensor for tensor, change in changes.items() if isinstance(change, Factors))
    rounded = _with_same_rounding(read, merged_tensors, expected.outputs, target)
    return replace(
        expected,
        read=read,
        origins={family: replace(origin, read=rounded) for family, origin in expected.origins.items()},
        merged=merged_tensors,
        merged_by=f"peft {importlib.metadata.version('peft')}" if _has_peft() else "torch in float64",
    )


def _with_same_rounding(
    read: Reader, merged: Set[TensorInfo], outputs: Mapping[str, LazyTensor], target: Converted
) -> Reader:
    """Return a reader of merged tensors that takes elements from the converted file if they differ by one rounding.

    The order of a sum depends on the processor, and a single rounding in 16 bits would show in the outputs.
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
                indices = evaluate(value, partial(_element_indices, tensor)).flatten()
                is_merged = indices >= 0
                _copy_neighbours(result.view(-1), indices[is_merged], actual.flatten()[is_merged])
        return result

    return rounded


def _element_indices(merged: TensorInfo, tensor: TensorInfo) -> Tensor:
    """Return the index of each element of `tensor` if it is the merged tensor, else -1 for each element."""
    size = math.prod(tensor.shape)
    return (torch.arange(size) if tensor == merged else torch.full((size,), -1)).reshape(tensor.shape)


def _copy_neighbours(merged: Tensor, indices: Tensor, actual: Tensor) -> None:
    """Replace elements of `merged` by elements of `actual` that are at most one unit in the last place away."""
    dtype, expected = _coarser(merged.dtype, actual.dtype), merged[indices]
    is_near = (_ordered_integers(actual.to(dtype)) - _ordered_integers(expected.to(dtype))).abs() <= 1
    merged[indices] = torch.where(is_near, actual.to(merged.dtype), expected)


def _coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    return a if torch.finfo(a).eps >= torch.finfo(b).eps else b


def _has_peft() -> bool:
    return importlib.util.find_spec("peft") is not None


def _merge_with_peft(base: Tensor, a: Tensor, b: Tensor, factors: Factors, rslora: bool) -> Tensor:
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
        # PeftModel.from_pretrained casts adapters of 16 bits in the same way.
        parameter.data = parameter.data if parameter is wrapped.base_layer.weight else parameter.data.to(dtype)
    name = "layer.lora_embedding_{}" if factors.is_embedding else "layer.lora_{}.weight"
    peft.set_peft_model_state_dict(model, {name.format("A"): a, name.format("B"): b})
    wrapped.merge()
    return wrapped.base_layer.weight.data  # type: ignore[no-any-return]


def _merge_with_torch(base: Tensor, a: Tensor, b: Tensor, factors: Factors, rslora: bool) -> Tensor:
    """Merge the factors of one module in float64, and round the result once."""
    scale = factors.alpha / (factors.rank**0.5 if rslora else factors.rank)
    product: Tensor = torch.tensordot(b.double().flatten(1), a.double(), 1) * scale
    # For embeddings, peft also rounds the product.
    total: Tensor = base.double() + (product.T.to(base.dtype) if factors.is_embedding else product)
    return total.to(base.dtype)


def is_same_merge(actual: Tensor, expected: Tensor, base_dtype: str, merged_by: str) -> bool:
    """Return whether two tensors may be the same merge: few elements differ, and only by one rounding.

    Args:
        actual: The converted tensor.
        expected: The tensor that the library merged.
        base_dtype: The type of the source's weights, to which the sum was rounded.
        merged_by: The library and its version.
    """
    dtype = _coarser(torch_dtype(base_dtype), actual.dtype)
    actual, expected = actual.to(dtype), expected.to(dtype)
    if merged_by.startswith("torch") and dtype == torch.float32:
        return bool((actual - expected).abs().max() <= _FLOAT32_TOLERANCE * expected.abs().max())
    distance = (_ordered_integers(actual) - _ordered_integers(expected)).abs()
    return bool((distance <= 1).all()) and float((distance == 0).double().mean()) >= _MIN_EQUAL


def _ordered_integers(tensor: Tensor) -> Tensor:
    """Return the floats as integers in the same order: floats one unit in the last place apart become neighbours."""
    bits = bit_view(tensor)
    return torch.where(bits < 0, -(bits.long() & torch.iinfo(bits.dtype).max), bits.long())

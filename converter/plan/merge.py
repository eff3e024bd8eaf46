"""Merging a LoRA adapter into the tensors of a checkpoint, before they are mapped to another layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import NamedTuple

from converter.checkpoint.adapter_config import MERGE_IN_PEFT
from converter.checkpoint.lora import Adapter, Factors
from converter.errors import LayoutError, MappingError, first_names
from converter.layouts.claims import summary
from converter.layouts.detect import DetectedLayout
from converter.layouts.spec import CanonicalLayout
from converter.plan.apply import outside_predicate
from converter.tensors.lazy_tensor import LazyTensor, add_product, cast, lazy_read, permuted
from converter.tensors.tensor_info import TensorInfo

# peft 0.21 adds the product for out_proj twice, in the training and in its merge.
_ATTENTION = "is a torch.nn.MultiheadAttention, which peft does not merge as W + scale * B @ A"


class MergedTensor(NamedTuple):
    """A change that an adapter makes to one tensor."""

    key: str  # The tensor's name in the source
    module: str  # The module's path in the adapter; of a tensor that was trained whole, its name
    trained: Factors | TensorInfo

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """The adapter's tensors."""
        return (self.trained,) if isinstance(self.trained, TensorInfo) else (self.trained.a, self.trained.b)


class Merged(NamedTuple):
    """An adapter that is matched with the tensors of a checkpoint."""

    tensors: dict[str, MergedTensor]  # What it changes, by the names of the tensors
    notes: list[str]  # Remarks for the user

    def under(self, prefix: str) -> dict[str, MergedTensor]:
        """The changes of tensors whose names begin with a prefix, by their names without it."""
        return {name[len(prefix) :]: change for name, change in self.tensors.items() if name.startswith(prefix)}


def match_adapter(adapter: Adapter, detected: DetectedLayout, canonical: CanonicalLayout, source: str) -> Merged:
    """Match the modules of an adapter with the tensors of a checkpoint.

    Args:
        adapter: The adapter.
        detected: The encoder that was detected in the checkpoint.
        canonical: The canonical layout of its family.
        source: The checkpoint's name, for error messages.

    Raises:
        LayoutError: The encoder lacks a module of the adapter.
    """
    names, match = detected.all_tensors, detected.match
    is_outside = outside_predicate(match.layout.mapping, match.prefix, canonical, match.outer_prefix)
    targets = {f"{module}.weight": module for module in adapter.factors}
    targets |= {name: name for name in adapter.fully_trained}
    old, new = "", ""
    if names.keys().isdisjoint(targets):
        encoder = {name for name in names if not is_outside(name)}
        old, new = _prefixes(adapter, targets, encoder, match.full_prefix, source)
    merged, absent = Merged({}, []), list[str]()
    for target, module in targets.items():
        if not target.startswith(old):
            continue
        name, pair = new + target.removeprefix(old), adapter.factors.get(module)
        if name in names:
            merged.tensors[name] = MergedTensor(names[name].key, module, pair or adapter.fully_trained[target])
        elif pair and f"{name.removesuffix('weight')}in_proj_weight" in names:
            raise LayoutError(f"{adapter.name}: {module!r} {_ATTENTION}", MERGE_IN_PEFT)
        elif not is_outside(name):
            shapes = f" (factors A {list(pair.a.shape)}, B {list(pair.b.shape)})" if pair else ""
            absent.append(f"{name!r}{shapes}")
    if absent:
        what = f"{source}: lacks modules of the encoder that {adapter.name} trained: {summary(absent)}"
        raise LayoutError(what, _base_step(adapter))
    if merged.tensors and (old, new) != ("", ""):
        text = "the modules under {} of the adapter were taken for those under {} of the source"
        merged.notes.append(text.format(repr(old) if old else "no prefix", repr(new) if new else "no prefix"))
    return merged


def _prefixes(adapter: Adapter, targets: Iterable[str], encoder: Set[str], prefix: str, source: str) -> tuple[str, str]:
    """Return the prefix of the encoder's modules in an adapter, and the one that they have in the checkpoint.

    One of both models was part of the other; both are empty if nothing fits.
    """
    found = dict.fromkeys(
        target[: len(target) - len(tail)] for target in targets for tail in _tails(target) if prefix + tail in encoder
    )
    nested = [old for old in found if f".{prefix}".endswith(f".{old}") or f".{old}".endswith(f".{prefix}")]
    if len(nested) > 1:
        fitting = first_names(list(map(repr, nested)))
        what = f"{adapter.name}: trains several modules that fit the encoder of {source}: {fitting}"
        raise LayoutError(what, _base_step(adapter))
    return (nested[0], prefix) if nested else ("", "")


def _tails(name: str) -> Iterable[str]:
    """Yield a name without its first segments, from none of them to all but one."""
    while name:
        yield name
        name = name.partition(".")[2]


def merge(
    tensors: Mapping[str, LazyTensor], merged: Mapping[str, MergedTensor], adapter: Adapter
) -> dict[str, LazyTensor]:
    """Return the tensors with an adapter merged into them.

    Args:
        tensors: The checkpoint's tensors by name.
        merged: What the adapter changes, by the same names.
        adapter: The adapter, for error messages.

    Raises:
        MappingError: Factors do not fit a tensor.
    """
    result, problems = dict(tensors), []
    for name, change in merged.items():
        try:
            result[name] = _merge(tensors[name], change.trained)
        except ValueError as error:
            problems.append(f"{change.module!r}: {error}, of {change.key!r}")
    if problems:
        raise MappingError(f"{adapter.name}: {summary(problems)}", _base_step(adapter))
    return result


def _merge(base: LazyTensor, trained: Factors | TensorInfo) -> LazyTensor:
    if isinstance(trained, TensorInfo):
        if trained.shape != base.shape:
            raise ValueError(f"trained with the shape {list(trained.shape)}, which is not {list(base.shape)}")
        return cast(lazy_read(trained), base.dtype.name)
    a, b = lazy_read(trained.a), lazy_read(trained.b)
    if trained.is_embedding and len(base.shape) == 2:
        return permuted(add_product(permuted(base, (1, 0)), a, b, trained.scale, rounds_product=True), (1, 0))
    return add_product(base, a, b, trained.scale)


def _base_step(adapter: Adapter) -> str:
    model = f": {adapter.config.base_model}" if adapter.config.base_model else ""
    return f"convert the model that the adapter was trained on{model}"

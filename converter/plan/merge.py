"""Merging a LoRA adapter into the tensors of a checkpoint, before they are mapped to another layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from typing import NamedTuple

from converter.checkpoint.adapter_config import MERGE_IN_PEFT
from converter.checkpoint.folder import SWIFT_ENCODER
from converter.checkpoint.lora import Adapter, Factors
from converter.errors import LayoutError, MappingError, first_names
from converter.layouts.claims import summary
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
    """An adapter that is matched with the tensors of a checkpoint.

    Attributes:
        tensors: What it changes, by the names of the tensors.
        notes: Remarks for the user.
    """

    tensors: dict[str, MergedTensor]
    notes: list[str]

    def under(self, prefix: str) -> dict[str, MergedTensor]:
        """The changes of tensors whose names begin with a prefix, by their names without it."""
        return {name[len(prefix) :]: change for name, change in self.tensors.items() if name.startswith(prefix)}


def match_adapter(
    adapter: Adapter, names: Mapping[str, TensorInfo], prefix: str, is_outside: Callable[[str], bool], source: str
) -> Merged:
    """Match the modules of an adapter with the tensors of a checkpoint.

    Args:
        adapter: The adapter.
        names: The checkpoint's tensors by name.
        prefix: The prefix of the encoder's names; empty if there is none.
        is_outside: Whether a tensor of that name is outside the encoder.
        source: The checkpoint's name, for error messages.

    Raises:
        LayoutError: The encoder lacks a module of the adapter.
    """
    targets = {f"{module}.weight": module for module in adapter.factors} | {name: name for name in adapter.whole}
    old, new = _prefixes(adapter, targets, names, prefix, is_outside, source)
    merged = Merged({}, [])
    absent: list[str] = []
    for target, module in targets.items():
        name = new + target.removeprefix(old) if target.startswith(old) else ""
        if name in names:
            trained = adapter.factors.get(module) or adapter.whole[target]
            merged.tensors[name] = MergedTensor(names[name].key, module, trained)
        elif f"{name.removesuffix('weight')}in_proj_weight" in names and module in adapter.factors:
            raise LayoutError(f"{adapter.name}: {module!r} {_ATTENTION}", MERGE_IN_PEFT)
        elif name and not is_outside(name):
            absent.append(_absent(name, module, adapter))
    if absent:
        raise LayoutError(
            f"{source}: lacks modules of the encoder that {adapter.name} trained: {summary(absent)}",
            f"convert the model that the adapter was trained on{_named(adapter)}",
        )
    if merged.tensors and (old, new) != ("", ""):
        text = "the modules under {} of the adapter were taken for those under {} of the source"
        merged.notes.append(text.format(repr(old) if old else "no prefix", repr(new) if new else "no prefix"))
    return merged


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
        raise MappingError(
            f"{adapter.name}: {summary(problems)}",
            f"convert the model that the adapter was trained on{_named(adapter)}",
        )
    return result


def used_changes(changes: Mapping[str, MergedTensor], read: Set[TensorInfo]) -> dict[str, MergedTensor]:
    """Return those changes of which a tensor is read."""
    return {name: change for name, change in changes.items() if not read.isdisjoint(change.tensors)}


def merge_notes(adapter: Adapter, changes: Collection[MergedTensor], encoder: Sequence[str]) -> list[str]:
    """Return notes on what was merged.

    Args:
        adapter: The adapter.
        changes: Those of its changes that the output is made of.
        encoder: Names of the encoder's tensors, of which the message shows some.

    Raises:
        LayoutError: There are none.
    """
    modules, name = [*adapter.factors, *adapter.whole], adapter.name
    if not changes:
        raise LayoutError(
            f"{name}: this adapter trains {len(modules)} modules, none of them in the encoder: "
            f"{first_names(modules)}; the encoder's tensors are {first_names(encoder, 2)}",
            _frozen_step(adapter),
        )
    used = {change.module for change in changes}
    others = [module for module in modules if module not in used]
    rest = f"; not in the output: {len(others)} others, such as {others[0]}" if others else ""
    return [f"merged {len(used)} modules of the adapter {name}{rest}"]


def _frozen_step(adapter: Adapter) -> str:
    """Return the next step for an adapter that trains nothing of the encoder."""
    if adapter.has_encoder:
        return f"the encoder was trained whole, into {SWIFT_ENCODER} next to the adapter (ms-swift): convert that"
    return "the encoder is that of the base model (trainers freeze it by default): convert it without --lora"


def _merge(base: LazyTensor, trained: Factors | TensorInfo) -> LazyTensor:
    if isinstance(trained, TensorInfo):
        if trained.shape != base.shape:
            raise ValueError(f"trained with the shape {list(trained.shape)}, which is not {list(base.shape)}")
        return cast(lazy_read(trained), base.dtype.name)
    a, b = lazy_read(trained.a), lazy_read(trained.b)
    if trained.is_embedding and len(base.shape) == 2:
        return permuted(add_product(permuted(base, (1, 0)), a, b, trained.scale, rounds_product=True), (1, 0))
    return add_product(base, a, b, trained.scale)


def _prefixes(
    adapter: Adapter,
    targets: Mapping[str, str],
    names: Mapping[str, TensorInfo],
    prefix: str,
    is_outside: Callable[[str], bool],
    source: str,
) -> tuple[str, str]:
    """Return the prefix of the encoder's modules in an adapter, and the one that they have in the checkpoint.

    Both are empty where the adapter has names of the checkpoint. Else, one of both models was part of the other.
    """
    if any(target in names for target in targets):
        return "", ""
    found = Counter(
        target[: len(target) - len(tail)]
        for target in targets
        for tail in _tails(target)
        if prefix + tail in names and not is_outside(prefix + tail)
    )
    nested = [old for old in found if f".{prefix}".endswith(f".{old}") or f".{old}".endswith(f".{prefix}")]
    if len(nested) > 1:
        raise LayoutError(
            f"{adapter.name}: trains several modules that fit the encoder of {source}: "
            f"{first_names(list(map(repr, nested)))}",
            f"convert the model that the adapter was trained on{_named(adapter)}",
        )
    return (nested[0], prefix) if nested else ("", "")


def _tails(name: str) -> Iterable[str]:
    """Yield a name without its first segments, from none of them to all but one."""
    while name:
        yield name
        name = name.partition(".")[2]


def _absent(name: str, module: str, adapter: Adapter) -> str:
    """Describe a module that the checkpoint lacks."""
    pair = adapter.factors.get(module)
    shapes = f" (factors A {list(pair.a.shape)}, B {list(pair.b.shape)})" if pair else ""
    return f"{name!r}{shapes}"


def _named(adapter: Adapter) -> str:
    return f": {adapter.config.base_model}" if adapter.config.base_model else ""

"""Merges a LoRA adapter into the tensors of a checkpoint, before they are converted to another layout."""

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


class TensorChange(NamedTuple):
    """A change that an adapter makes to one tensor."""

    key: str  # The name of the tensor in the source
    module: str  # The path of the module in the adapter; the name of a fully trained tensor
    trained: Factors | TensorInfo  # The factors, or the fully trained tensor

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """The adapter's tensors."""
        return (self.trained,) if isinstance(self.trained, TensorInfo) else (self.trained.a, self.trained.b)


class MatchedAdapter(NamedTuple):
    """The changes of an adapter to the tensors of a checkpoint."""

    changes: dict[str, TensorChange]  # By tensor name
    notes: list[str]  # Remarks for the user

    def changes_under(self, prefix: str) -> dict[str, TensorChange]:
        """Return the changes of tensors whose names begin with a prefix, by names without it."""
        return {name[len(prefix) :]: change for name, change in self.changes.items() if name.startswith(prefix)}


def match_adapter(
    adapter: Adapter, detected: DetectedLayout, canonical: CanonicalLayout, source: str
) -> MatchedAdapter:
    """Match the modules of an adapter with the tensors of a checkpoint.

    Args:
        adapter: The adapter.
        detected: The encoder that was detected in the checkpoint.
        canonical: The canonical layout of the encoder.
        source: The checkpoint's name, for error messages.

    Raises:
        LayoutError: The encoder lacks a module of the adapter.
    """
    tensors, match = detected.all_tensors, detected.match
    is_outside = outside_predicate(match.layout.mapping, match.prefix, canonical, match.outer_prefix)
    targets = {f"{module}.weight": module for module in adapter.factors}
    targets |= {name: name for name in adapter.fully_trained}
    adapter_prefix, source_prefix = "", ""
    if tensors.keys().isdisjoint(targets):
        encoder = {name for name in tensors if not is_outside(name)}
        adapter_prefix, source_prefix = _prefixes(adapter, targets, encoder, match.full_prefix, source)
    matched, absent = MatchedAdapter({}, []), list[str]()
    for target, module in targets.items():
        if not target.startswith(adapter_prefix):
            continue
        name, factors = source_prefix + target.removeprefix(adapter_prefix), adapter.factors.get(module)
        if name in tensors:
            matched.changes[name] = TensorChange(tensors[name].key, module, factors or adapter.fully_trained[target])
        elif factors and f"{name.removesuffix('weight')}in_proj_weight" in tensors:
            raise LayoutError(f"{adapter.name}: {module!r} {_ATTENTION}", MERGE_IN_PEFT)
        elif not is_outside(name):
            shapes = f" (factors A {list(factors.a.shape)}, B {list(factors.b.shape)})" if factors else ""
            absent.append(f"{name!r}{shapes}")
    if absent:
        what = f"{source}: lacks modules of the encoder that {adapter.name} trained: {summary(absent)}"
        raise LayoutError(what, _base_step(adapter))
    if matched.changes and adapter_prefix != source_prefix:
        old, new = (repr(prefix) if prefix else "no prefix" for prefix in (adapter_prefix, source_prefix))
        matched.notes.append(f"the modules under {old} of the adapter were taken for those under {new} of the source")
    return matched


def _prefixes(adapter: Adapter, targets: Iterable[str], encoder: Set[str], prefix: str, source: str) -> tuple[str, str]:
    """Return the prefixes of the encoder's modules in an adapter and in the checkpoint; two empty ones if none fit.

    One model must be a part of the other: one prefix ends with the other one.
    """
    candidates = dict.fromkeys(
        target.removesuffix(suffix) for target in targets for suffix in _suffixes(target) if prefix + suffix in encoder
    )
    nested = [other for other in candidates if f".{prefix}".endswith(f".{other}") or f".{other}".endswith(f".{prefix}")]
    if len(nested) > 1:
        fitting = first_names(list(map(repr, nested)))
        what = f"{adapter.name}: trains several modules that fit the encoder of {source}: {fitting}"
        raise LayoutError(what, _base_step(adapter))
    return (nested[0], prefix) if nested else ("", "")


def _suffixes(name: str) -> Iterable[str]:
    """Yield a name, the name without its first segment, and so on to its last segment."""
    while name:
        yield name
        name = name.partition(".")[2]


def merge(
    tensors: Mapping[str, LazyTensor], changes: Mapping[str, TensorChange], adapter: Adapter
) -> dict[str, LazyTensor]:
    """Return the tensors with an adapter merged into them.

    Args:
        tensors: The checkpoint's tensors by name.
        changes: The changes of the adapter, by the same names.
        adapter: The adapter, for error messages.

    Raises:
        MappingError: Factors do not fit a tensor.
    """
    result, problems = dict(tensors), []
    for name, change in changes.items():
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

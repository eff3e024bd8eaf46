"""Matches tensors of two checkpoints by their values.

Candidates are found by the sum of all elements, which does not depend on their order: a renamed, reshaped or transposed
tensor has the same sum as its source, and each part of a fused tensor has the same sum as the tensor it was made from.
Candidates are then compared element by element.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Container, Iterator

import torch

from converter.derivation.comparison import Comparison, Tensors
from converter.derivation.matches import TensorMatch, find_missing
from converter.derivation.operations import Ops, find_operations
from converter.errors import LayoutError
from converter.tensors.evaluate import bit_view, evaluate
from converter.tensors.lazy_tensor import LazyTensor, nbytes
from converter.tensors.ops import Fuse, Split

# For example, separate q, k and v for each of 21 heads.
_MAX_PARTS = 64

# Element type, number of elements, and their sum.
Fingerprint = tuple[str, int, int]
ByFingerprint = dict[Fingerprint, list[str]]


def match_by_values(comparison: Comparison, on_bytes: Callable[[int], None]) -> list[TensorMatch]:
    """Match tensors by their values; LayoutError if several source tensors match equally well.

    `on_bytes` is called with the size of each tensor that was read, in bytes.
    """
    search = _Search(comparison.tensors, comparison.expected, on_bytes)
    search.match_unique()
    search.match_fused()
    search.match_split()
    search.check_ties(comparison)
    return sorted(search.matches, key=lambda match: match.targets)


def _load(value: LazyTensor) -> torch.Tensor:
    """Read a tensor and return its elements as integers in the same shape."""
    return bit_view(evaluate(value))


def _fingerprint(tensor: torch.Tensor, value: LazyTensor) -> Fingerprint:
    # Modulo 2**32: a sum in a wider type than the elements' would copy them first.
    return value.dtype.name, tensor.numel(), int(tensor.sum(dtype=torch.int32))


def _names_by_fingerprint(values: Tensors, on_bytes: Callable[[int], None]) -> ByFingerprint:
    names: ByFingerprint = defaultdict(list)
    for name, value in values.items():
        names[_fingerprint(_load(value), value)].append(name)
        on_bytes(nbytes(value))
    return dict(names)


class _Search:
    """The state of a search: the matches, and the names on both sides without a match."""

    def __init__(self, source: Tensors, target: Tensors, on_bytes: Callable[[int], None]) -> None:
        self.source_tensors, self.target_tensors = source, target
        self.matches: list[TensorMatch] = []
        self.unmatched_sources, self.unmatched_targets = dict.fromkeys(source), dict.fromkeys(target)
        self.source_names, self.target_names = (
            _names_by_fingerprint(source, on_bytes),
            _names_by_fingerprint(target, on_bytes),
        )
        self.candidates = {
            name: self.source_names.get(key, []) for key, names in self.target_names.items() for name in names
        }

    def _add(self, match: TensorMatch) -> None:
        self.matches.append(match)
        for name in match.sources:
            del self.unmatched_sources[name]
        for name in match.targets:
            del self.unmatched_targets[name]

    def match_unique(self) -> None:
        """Match tensors with a fingerprint that is unique on both sides."""
        for key, targets in self.target_names.items():
            if len(targets) == len(self.source_names.get(key, ())) == 1:
                source, target = self.source_names[key][0], targets[0]
                ops = find_operations(_load(self.source_tensors[source]), _load(self.target_tensors[target]))
                if ops is not None:
                    self._add(TensorMatch((source,), (target,), ops))

    def match_fused(self) -> None:
        """Match targets in which each of several equal parts is one source, in any order."""
        pool = {key: names for key, names in self.source_names.items() if key not in self.target_names}
        for target in [name for name in self.unmatched_targets if not self.candidates[name]]:
            for _, parts in _equal_splits(self.target_tensors[target], pool):
                sources = _unique_names(parts, self.unmatched_sources)
                if sources and (ops := self._fuse(sources, target)):
                    self._add(TensorMatch(sources, (target,), ops))
                    break
                if all(parts):
                    self.candidates[target] = max(parts, key=len)

    def _fuse(self, parts: tuple[str, ...], target: str) -> Ops | None:
        """Return the operations from these sources to a target, or None."""
        values = [_load(self.source_tensors[part]) for part in parts]
        for dim in range(values[0].dim() if len({value.shape for value in values}) == 1 else 0):
            ops = find_operations(torch.cat(values, dim), _load(self.target_tensors[target]))
            if ops is not None:
                return (Fuse(len(parts), dim), *ops)
        return None

    def match_split(self) -> None:
        """Match sources in which each of several equal parts is one target."""
        pool = {key: names for key, names in self.target_names.items() if key not in self.source_names}
        large = [names for key, names in self.source_names.items() if key not in self.target_names]
        for source in [name for name in itertools.chain(*large) if name in self.unmatched_sources]:
            for dim, parts in _equal_splits(self.source_tensors[source], pool):
                targets = _unique_names(parts, self.unmatched_targets)
                if targets and (ops := self._split(source, targets, dim)):
                    self._add(TensorMatch((source,), targets, ops))
                    break

    def _split(self, source: str, targets: tuple[str, ...], dim: int) -> Ops | None:
        """Return the operations from a source to these targets, or None."""
        parts = _load(self.source_tensors[source]).chunk(len(targets), dim)
        pairs = zip(parts, targets, strict=True)
        ops, *others = {find_operations(part, _load(self.target_tensors[target])) for part, target in pairs}
        return None if others or ops is None else (Split(len(targets), dim), *ops)

    def check_ties(self, comparison: Comparison) -> None:
        """Raise LayoutError if several sources have the values of an unmatched target."""
        ties = [name for name in find_missing(comparison, self.matches) if len(self.candidates[name]) > 1]
        if ties:
            target, names = ties[0], self.candidates[ties[0]]
            raise LayoutError(
                f"{comparison.source}: tensors with the same values fit {len(ties)} tensors of {comparison.target} "
                f"equally well: {' and '.join(map(repr, names[:4]))} for {target!r}",
                "remove copies such as an EMA from the checkpoint; untrained weights have too many equal tensors",
            )


def _equal_splits(value: LazyTensor, pool: ByFingerprint) -> Iterator[tuple[int, list[list[str]]]]:
    """Yield the ways to split a tensor equally: the dimension, and for each part the names with its fingerprint."""
    tensor = _load(value)
    sizes = sorted({size for _, size, _ in pool if size}, reverse=True)
    for size, dim in itertools.product(sizes, range(tensor.dim())):
        num_parts, remainder = divmod(tensor.numel(), size)
        if not remainder and 1 < num_parts <= _MAX_PARTS and tensor.shape[dim] % num_parts == 0:
            yield dim, [pool.get(_fingerprint(part, value), []) for part in tensor.chunk(num_parts, dim)]


def _unique_names(parts: list[list[str]], unmatched: Container[str]) -> tuple[str, ...]:
    """Return the only unmatched name of each part, or () unless every part has one and all are different."""
    names = dict.fromkeys(part[0] for part in parts if len(part) == 1 and part[0] in unmatched)
    return tuple(names) if len(names) == len(parts) else ()

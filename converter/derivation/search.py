"""Matches tensors of two checkpoints by their values.

Candidates are found by the sum of all elements, which stays the same when elements move: a renamed, reshaped or
transposed tensor has the sum of its source, each part of a fused one the sum of the tensor that it was. Candidates are
then compared element by element.
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

# q, k and v of each of 21 heads.
_MAX_PARTS = 64

# Element type, number of elements, and their sum.
Fingerprint = tuple[str, int, int]
ByFingerprint = dict[Fingerprint, list[str]]


def match_by_values(comparison: Comparison, on_bytes: Callable[[int], None]) -> list[TensorMatch]:
    """Match tensors by their values; LayoutError if several tensors of the source fit equally well.

    `on_bytes` is called with the number of bytes of each tensor that was read.
    """
    search = _Search(comparison.tensors, comparison.expected, on_bytes)
    search.match_whole()
    search.match_fused()
    search.match_split()
    search.check_ties(comparison)
    return sorted(search.matches, key=lambda match: match.targets)


def _load(value: LazyTensor) -> torch.Tensor:
    """Return a tensor's elements as integers, in its shape."""
    return bit_view(evaluate(value))


def _fingerprint(tensor: torch.Tensor, value: LazyTensor) -> Fingerprint:
    # Modulo 2**32: a sum in a wider type than the elements' would copy them first.
    return value.dtype.name, tensor.numel(), int(tensor.sum(dtype=torch.int32))


def _by_fingerprint(values: Tensors, on_bytes: Callable[[int], None]) -> ByFingerprint:
    names: ByFingerprint = defaultdict(list)
    for name, value in values.items():
        names[_fingerprint(_load(value), value)].append(name)
        on_bytes(nbytes(value))
    return dict(names)


class _Search:
    """The state of a search: the matches, and the names on both sides that have none yet."""

    def __init__(self, source: Tensors, target: Tensors, on_bytes: Callable[[int], None]) -> None:
        self.source, self.target = source, target
        self.matches: list[TensorMatch] = []
        self.free, self.missing = dict.fromkeys(source), dict.fromkeys(target)
        self.sources, self.targets = _by_fingerprint(source, on_bytes), _by_fingerprint(target, on_bytes)
        self.rivals = {name: self.sources.get(key, []) for key, names in self.targets.items() for name in names}

    def _add(self, match: TensorMatch) -> None:
        self.matches.append(match)
        for name in match.sources:
            del self.free[name]
        for name in match.targets:
            del self.missing[name]

    def match_whole(self) -> None:
        """Match tensors whose elements only one tensor on each side has."""
        for key, targets in self.targets.items():
            if len(targets) == len(self.sources.get(key, ())) == 1:
                source, target = self.sources[key][0], targets[0]
                ops = find_operations(_load(self.source[source]), _load(self.target[target]))
                if ops is not None:
                    self._add(TensorMatch((source,), (target,), ops))

    def match_fused(self) -> None:
        """Match targets whose equal parts are one source each, in any order."""
        pool = {key: names for key, names in self.sources.items() if key not in self.targets}
        for target in [name for name in self.missing if not self.rivals[name]]:
            for _, parts in _cut(self.target[target], pool):
                sources = _one_each(parts, self.free)
                if sources and (ops := self._fuse(sources, target)):
                    self._add(TensorMatch(sources, (target,), ops))
                    break
                if all(parts):
                    self.rivals[target] = max(parts, key=len)

    def _fuse(self, parts: tuple[str, ...], target: str) -> Ops | None:
        """Return the operations that make a target of these sources."""
        values = [_load(self.source[part]) for part in parts]
        for dim in range(values[0].dim() if len({value.shape for value in values}) == 1 else 0):
            ops = find_operations(torch.cat(values, dim), _load(self.target[target]))
            if ops is not None:
                return (Fuse(len(parts), dim), *ops)
        return None

    def match_split(self) -> None:
        """Match sources whose equal parts are one target each."""
        pool = {key: names for key, names in self.targets.items() if key not in self.sources}
        large = [names for key, names in self.sources.items() if key not in self.targets]
        for source in [name for name in itertools.chain(*large) if name in self.free]:
            for dim, parts in _cut(self.source[source], pool):
                targets = _one_each(parts, self.missing)
                if targets and (ops := self._split(source, targets, dim)):
                    self._add(TensorMatch((source,), targets, ops))
                    break

    def _split(self, source: str, targets: tuple[str, ...], dim: int) -> Ops | None:
        """Return the operations that make these targets of a source."""
        pieces = _load(self.source[source]).chunk(len(targets), dim)
        pairs = zip(pieces, targets, strict=True)
        ops, *others = {find_operations(piece, _load(self.target[target])) for piece, target in pairs}
        return None if others or ops is None else (Split(len(targets), dim), *ops)

    def check_ties(self, comparison: Comparison) -> None:
        """Raise LayoutError if a target has several sources with its values: nothing tells which is meant."""
        ties = [name for name in find_missing(comparison, self.matches) if len(self.rivals[name]) > 1]
        if ties:
            target, names = ties[0], self.rivals[ties[0]]
            raise LayoutError(
                f"{comparison.source}: tensors with the same values fit {len(ties)} tensors of {comparison.target} "
                f"equally well: {' and '.join(map(repr, names[:4]))} for {target!r}",
                "remove copies such as an EMA from the checkpoint; weights before training have too many equal tensors",
            )


def _cut(value: LazyTensor, pool: ByFingerprint) -> Iterator[tuple[int, list[list[str]]]]:
    """Yield each way to cut a tensor into equal parts: the dimension, and for each part the names with its values."""
    tensor = _load(value)
    sizes = sorted({size for _, size, _ in pool if size}, reverse=True)
    for size, dim in itertools.product(sizes, range(tensor.dim())):
        number, rest = divmod(tensor.numel(), size)
        if not rest and 1 < number <= _MAX_PARTS and tensor.shape[dim] % number == 0:
            yield dim, [pool.get(_fingerprint(part, value), []) for part in tensor.chunk(number, dim)]


def _one_each(parts: list[list[str]], unmatched: Container[str]) -> tuple[str, ...]:
    """Return the one unmatched name that each part has; nothing unless all have one, and different ones."""
    names = dict.fromkeys(part[0] for part in parts if len(part) == 1 and part[0] in unmatched)
    return tuple(names) if len(names) == len(parts) else ()

"""Matches tensors of two checkpoints by their values.

Candidates are found by a hash that does not depend on the order of elements: a renamed, reshaped or transposed tensor
has the same hash as its source, and each part of a fused tensor has the same hash as the tensor it was made from.
Candidates are then compared element by element.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field

import torch

from converter.derivation.comparison import Comparison, TensorMatch, Tensors, find_missing
from converter.derivation.operations import find_operations, mix
from converter.errors import LayoutError
from converter.layouts.match import outermost
from converter.tensors.dtypes import BY_NAME
from converter.tensors.evaluate import bit_view, evaluate
from converter.tensors.lazy_tensor import LazyTensor, nbytes
from converter.tensors.ops import Fuse, Split

# For example, separate q, k and v for each of 21 heads.
_MAX_PARTS = 64
# Elements that are hashed at once, to bound the memory.
_NUM_HASHED = 1 << 20

# Element type, number of elements, and their hash.
Fingerprint = tuple[str, int, int]
ByFingerprint = dict[Fingerprint, list[str]]


@dataclass(slots=True, eq=False)
class _Side:
    """The tensors of the source or of the target, their names by fingerprint, and the names that have a match."""

    tensors: Tensors
    names: ByFingerprint
    matched: set[str] = field(default_factory=set)

    def load(self, name: str) -> torch.Tensor:
        """Read a tensor and return its elements as integers in the same shape."""
        return bit_view(evaluate(self.tensors[name]))


def match_by_values(comparison: Comparison, on_bytes: Callable[[int], None]) -> list[TensorMatch]:
    """Match tensors by their values; LayoutError if several source tensors match equally well.

    `on_bytes` is called with the size of each tensor that was read, in bytes.
    """
    search = _Search(_read(comparison.selected, on_bytes, comparison.prefix), _read(comparison.expected, on_bytes))
    search.match_single()
    search.match_parts(search.target, search.source, search.fuse)
    search.match_parts(search.source, search.target, search.split)
    _check_ties(comparison, search)
    return sorted(search.matches, key=lambda match: match.targets)


def _read(tensors: Tensors, on_bytes: Callable[[int], None], prefix: str | None = None) -> _Side:
    names: ByFingerprint = {}
    for name, value in tensors.items():
        if value.dtype.name not in BY_NAME:  # such as sparse tensors, which no encoder has
            continue
        names.setdefault(_fingerprint(bit_view(evaluate(value)), value), []).append(name)
        on_bytes(nbytes(value))
    return _Side(tensors, {key: outermost(equal, prefix) for key, equal in names.items()})


def _fingerprint(tensor: torch.Tensor, value: LazyTensor) -> Fingerprint:
    # A sum of the elements themselves would be the same for many tensors of similar 16-bit numbers.
    pieces = tensor.reshape(-1).chunk(1 + tensor.numel() // _NUM_HASHED)
    return value.dtype.name, tensor.numel(), sum(int(mix(elements).sum()) for elements in pieces)


class _Search:
    """The state of a search: both sides, the matches, and all sources that fit a target."""

    def __init__(self, source: _Side, target: _Side) -> None:
        self.source, self.target = source, target
        self.matches: list[TensorMatch] = []
        self.candidates = {name: source.names.get(key, []) for key, names in target.names.items() for name in names}

    def _add(self, match: TensorMatch) -> None:
        self.matches.append(match)
        self.source.matched.update(match.sources)
        self.target.matched.update(match.targets)

    def match_single(self) -> None:
        """Match tensors with a fingerprint that is unique on both sides."""
        for key, targets in self.target.names.items():
            if len(targets) == len(self.source.names.get(key, ())) == 1:
                source, target = self.source.names[key][0], targets[0]
                ops = find_operations(self.source.load(source), self.target.load(target))
                if ops is not None:
                    self._add(TensorMatch((source,), (target,), ops))

    def match_parts(self, wholes: _Side, parts: _Side, find: Callable[..., TensorMatch | None]) -> None:
        """Match the tensors of one side whose equal parts are tensors of the other, in any order."""
        pool = {key: names for key, names in parts.names.items() if key not in wholes.names}
        for key, names in wholes.names.items():
            for whole in names if key not in parts.names else ():
                for dim, found in _equal_splits(wholes.load(whole), wholes.tensors[whole], pool):
                    chosen = _unique_names(found, parts.matched) if len(names) == 1 else ()
                    if chosen and (match := find(whole, chosen, dim)):
                        self._add(match)
                        break
                    if all(found):
                        self._add_candidates(wholes, names, found)

    def _add_candidates(self, wholes: _Side, names: list[str], found: list[list[str]]) -> None:
        """Remember which sources fit a target, for the message if there are several."""
        if wholes is self.source:
            self.candidates.update((target, names) for targets in found for target in targets)
        else:
            self.candidates.update((target, max(found, key=len)) for target in names)

    def fuse(self, target: str, parts: tuple[str, ...], _: int) -> TensorMatch | None:
        """Return the match of a target with the sources that it is fused from, or None."""
        values, expected = [self.source.load(part) for part in parts], self.target.load(target)
        for dim in range(values[0].dim() if len({value.shape for value in values}) == 1 else 0):
            ops = find_operations(torch.cat(values, dim), expected)
            if ops is not None:
                return TensorMatch(parts, (target,), (Fuse(len(parts), dim), *ops))
        return None

    def split(self, source: str, targets: tuple[str, ...], dim: int) -> TensorMatch | None:
        """Return the match of a source with the targets that it is split into along a dimension, or None."""
        pairs = zip(self.source.load(source).chunk(len(targets), dim), targets, strict=True)
        ops, *others = {find_operations(part, self.target.load(target)) for part, target in pairs}
        return None if others or ops is None else TensorMatch((source,), targets, (Split(len(targets), dim), *ops))


def _equal_splits(
    tensor: torch.Tensor, value: LazyTensor, pool: ByFingerprint
) -> Iterator[tuple[int, list[list[str]]]]:
    """Yield the ways to split a tensor equally: the dimension, and for each part the names with its fingerprint."""
    sizes = sorted({size for dtype, size, _ in pool if size and dtype == value.dtype.name}, reverse=True)
    for size, dim in itertools.product(sizes, range(tensor.dim())):
        num_parts, remainder = divmod(tensor.numel(), size)
        if not remainder and 1 < num_parts <= _MAX_PARTS and tensor.shape[dim] % num_parts == 0:
            yield dim, [pool.get(_fingerprint(part, value), []) for part in tensor.chunk(num_parts, dim)]


def _unique_names(parts: list[list[str]], matched: Container[str]) -> tuple[str, ...]:
    """Return the only name of each part, or () unless every part has one, without a match, and all are different."""
    names = dict.fromkeys(part[0] for part in parts if len(part) == 1 and part[0] not in matched)
    return tuple(names) if len(names) == len(parts) else ()


def _check_ties(comparison: Comparison, search: _Search) -> None:
    """Raise LayoutError if several sources have the values of an unmatched target of the encoder."""
    missing = [name for name in find_missing(comparison, search.matches) if comparison.canonical.spec(name)]
    ties = [name for name in missing if len(search.candidates[name]) > 1]
    if ties:
        names = search.candidates[ties[0]]
        raise LayoutError(
            f"{comparison.source}: tensors with the same values fit {len(ties)} tensors of {comparison.target} "
            f"equally well: {' and '.join(map(repr, names[:4]))} for {ties[0]!r}",
            "choose one of several copies with --prefix; untrained weights have too many equal tensors",
        )

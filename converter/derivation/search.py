"""Matches tensors of two checkpoints by their values.

Candidates are found by a hash that does not depend on the order of elements: a renamed, reshaped or transposed tensor
has the same hash as its source, and each part of a fused tensor has the same hash as the tensor it was made from.
Candidates are then compared element by element.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch

from converter.derivation.comparison import Comparison, TensorMatch, Tensors
from converter.derivation.operations import Ops, find_operations, mix
from converter.errors import LayoutError
from converter.layouts.match import outermost
from converter.tensors.dtypes import BY_NAME
from converter.tensors.evaluate import bit_view, evaluate
from converter.tensors.lazy_tensor import nbytes
from converter.tensors.ops import Fuse, Split

# For example, separate q, k and v for each of 21 heads.
_MAX_PARTS = 64
# Elements that are hashed at once, to bound the memory.
_NUM_HASHED = 1 << 20

# Element type, number of elements, and their hash.
Fingerprint = tuple[str, int, int]
ByFingerprint = dict[Fingerprint, list[str]]


class _Side:
    """The tensors of the source or of the target, their names by fingerprint, and the names that have a match."""

    def __init__(self, tensors: Tensors, on_bytes: Callable[[int], None], prefix: str | None = None) -> None:
        self.tensors = tensors
        self.matched: set[str] = set()
        names: ByFingerprint = {}
        for name, value in tensors.items():
            if value.dtype.name in BY_NAME:  # unlike sparse tensors, which no encoder has
                names.setdefault(_fingerprint(self.load(name), value.dtype.name), []).append(name)
                on_bytes(nbytes(value))
        self.names = {key: outermost(equal, prefix) for key, equal in names.items()}

    def load(self, name: str) -> torch.Tensor:
        """Read a tensor and return its elements as integers in the same shape."""
        return bit_view(evaluate(self.tensors[name]))


def match_by_values(comparison: Comparison, on_bytes: Callable[[int], None]) -> list[TensorMatch]:
    """Match tensors by their values; LayoutError if several source tensors match equally well.

    `on_bytes` is called with the size of each tensor that was read, in bytes.
    """
    source, target = _Side(comparison.selected, on_bytes, comparison.prefix), _Side(comparison.expected, on_bytes)
    search = _Search(source, target)
    search.match_single()
    search.match_parts(target, source)
    search.match_parts(source, target)
    missing = [name for name in comparison.missing(search.matches) if comparison.canonical.spec(name)]
    ties = [name for name in missing if len(search.candidates[name]) > 1]
    if ties:
        names = search.candidates[ties[0]]
        raise LayoutError(
            f"{comparison.source}: tensors with the same values fit {len(ties)} tensors of {comparison.target} "
            f"equally well: {' and '.join(map(repr, names[:4]))} for {ties[0]!r}",
            "choose one of several copies with --prefix; untrained weights have too many equal tensors",
        )
    return sorted(search.matches, key=lambda match: match.targets)


def _fingerprint(tensor: torch.Tensor, dtype: str) -> Fingerprint:
    # A sum of the elements themselves would be the same for many tensors of similar 16-bit numbers.
    pieces = tensor.reshape(-1).chunk(1 + tensor.numel() // _NUM_HASHED)
    return dtype, tensor.numel(), sum(int(mix(elements).sum()) for elements in pieces)


class _Search:
    """The state of a search: both sides, the matches, and all sources that fit a target."""

    def __init__(self, source: _Side, target: _Side) -> None:
        self.source, self.target = source, target
        self.matches: list[TensorMatch] = []
        self.candidates = {name: source.names.get(key, []) for key, names in target.names.items() for name in names}

    def _add(self, sources: tuple[str, ...], targets: tuple[str, ...], ops: Ops | None) -> bool:
        """Add a match, if operations were found; return whether they were."""
        if ops is not None:
            self.matches.append(TensorMatch(sources, targets, ops))
            self.source.matched.update(sources)
            self.target.matched.update(targets)
        return ops is not None

    def match_single(self) -> None:
        """Match tensors with a fingerprint that is unique on both sides."""
        for key, targets in self.target.names.items():
            sources = self.source.names.get(key, [])
            if len(targets) == len(sources) == 1:
                ops = find_operations(self.source.load(sources[0]), self.target.load(targets[0]))
                self._add((sources[0],), (targets[0],), ops)

    def match_parts(self, wholes: _Side, parts: _Side) -> None:
        """Match the tensors of one side whose equal parts are tensors of the other, in any order."""
        pool = {key: names for key, names in parts.names.items() if key not in wholes.names}
        for key, names in wholes.names.items():
            for whole in names if key not in parts.names else ():
                tensor = wholes.load(whole)
                for dim, found in _equal_splits(tensor, key[0], pool):
                    # Every part has one name without a match, and all are different.
                    only = dict.fromkeys(part[0] for part in found if len(part) == 1 and part[0] not in parts.matched)
                    chosen = tuple(only) if len(names) == 1 and len(only) == len(found) else ()
                    values = [parts.load(name) for name in chosen]
                    if wholes is self.target:
                        is_match = self._add(chosen, (whole,), _fuse(values, tensor))
                        candidates = dict.fromkeys(names, max(found, key=len))
                    else:
                        is_match = self._add((whole,), chosen, _split(tensor, values, dim))
                        candidates = dict.fromkeys(itertools.chain(*found), names)
                    if is_match:
                        break
                    self.candidates.update(candidates if all(found) else {})


def _fuse(parts: list[torch.Tensor], target: torch.Tensor) -> Ops | None:
    """Return the operations that fuse parts into a target, or None."""
    for dim in range(parts[0].dim() if len({part.shape for part in parts}) == 1 else 0):
        ops = find_operations(torch.cat(parts, dim), target)
        if ops is not None:
            return (Fuse(len(parts), dim), *ops)
    return None


def _split(source: torch.Tensor, targets: list[torch.Tensor], dim: int) -> Ops | None:
    """Return the operations that split a source along a dimension into targets, or None."""
    found = set(map(find_operations, source.chunk(len(targets), dim), targets)) if targets else {None}
    ops = found.pop()
    return None if found or ops is None else (Split(len(targets), dim), *ops)


def _equal_splits(tensor: torch.Tensor, dtype: str, pool: ByFingerprint) -> Iterator[tuple[int, list[list[str]]]]:
    """Yield the ways to split a tensor equally: the dimension, and for each part the names with its fingerprint."""
    sizes = sorted({size for name, size, _ in pool if size and name == dtype}, reverse=True)
    for size, dim in itertools.product(sizes, range(tensor.dim())):
        num_parts, remainder = divmod(tensor.numel(), size)
        if not remainder and 1 < num_parts <= _MAX_PARTS and tensor.shape[dim] % num_parts == 0:
            yield dim, [pool.get(_fingerprint(part, dtype), []) for part in tensor.chunk(num_parts, dim)]

"""Matches tensors of two checkpoints by their values.

Candidates are found by a hash that does not depend on the order of elements: a renamed, reshaped or transposed tensor
has the same hash as its source, and each part of a fused tensor has the same hash as the tensor it was made from.
Candidates are then compared element by element.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from converter.derivation.comparison import Comparison, TensorMatch, Tensors
from converter.derivation.operations import Ops, find_operations, mix
from converter.errors import LayoutError
from converter.layouts.match import without_inner_copies
from converter.tensors.dtypes import BY_NAME
from converter.tensors.evaluate import bit_view, evaluate
from converter.tensors.lazy_tensor import nbytes
from converter.tensors.ops import Fuse, Split

# For example, separate q, k and v for each of 21 heads.
_MAX_PARTS = 64
# Number of elements that are hashed at once, to bound the memory.
_HASH_CHUNK_SIZE = 1 << 20


class Fingerprint(NamedTuple):
    """The properties that a tensor shares with its renamed, reshaped and permuted copies."""

    dtype: str
    numel: int
    hash: int  # A hash of the elements in any order


NamesByFingerprint = dict[Fingerprint, list[str]]


class _Side:
    """The tensors of the source or of the target, by name and by fingerprint, and the names that have a match."""

    def __init__(self, tensors: Tensors, on_bytes: Callable[[int], None], prefix: str | None = None) -> None:
        self.tensors = tensors
        self.matched: set[str] = set()
        by_fingerprint: NamesByFingerprint = {}
        for name, value in tensors.items():
            if value.dtype.name in BY_NAME:  # unlike sparse tensors, which no encoder has
                by_fingerprint.setdefault(_fingerprint(self.load(name), value.dtype.name), []).append(name)
                on_bytes(nbytes(value))
        self.by_fingerprint = {key: without_inner_copies(names, prefix) for key, names in by_fingerprint.items()}

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
    chunks = tensor.reshape(-1).chunk(1 + tensor.numel() // _HASH_CHUNK_SIZE)
    return Fingerprint(dtype, tensor.numel(), sum(int(mix(elements).sum()) for elements in chunks))


class _Search:
    """The state of a search: both sides, the matches, and the sources that fit each target."""

    def __init__(self, source: _Side, target: _Side) -> None:
        self.source, self.target = source, target
        self.matches: list[TensorMatch] = []
        self.candidates: dict[str, list[str]] = {}
        for fingerprint, names in target.by_fingerprint.items():
            self.candidates |= dict.fromkeys(names, source.by_fingerprint.get(fingerprint, []))

    def _add(self, sources: tuple[str, ...], targets: tuple[str, ...], ops: Ops | None) -> bool:
        """Add a match, if operations were found; return whether they were."""
        if ops is not None:
            self.matches.append(TensorMatch(sources, targets, ops))
            self.source.matched.update(sources)
            self.target.matched.update(targets)
        return ops is not None

    def match_single(self) -> None:
        """Match tensors with a fingerprint that is unique on both sides."""
        for fingerprint, targets in self.target.by_fingerprint.items():
            sources = self.source.by_fingerprint.get(fingerprint, [])
            if len(targets) == len(sources) == 1:
                ops = find_operations(self.source.load(sources[0]), self.target.load(targets[0]))
                self._add((sources[0],), (targets[0],), ops)

    def match_parts(self, wholes: _Side, parts: _Side) -> None:
        """Match tensors of one side that consist of equal parts: tensors of the other side, in any order."""
        # Tensors that are equal on both sides are neither wholes nor parts.
        pool = {key: names for key, names in parts.by_fingerprint.items() if key not in wholes.by_fingerprint}
        for fingerprint, names in wholes.by_fingerprint.items():
            if fingerprint not in parts.by_fingerprint:
                for name in names:
                    self._match_whole(name, names, wholes, parts, pool)

    def _match_whole(
        self, name: str, equal_names: list[str], wholes: _Side, parts: _Side, pool: NamesByFingerprint
    ) -> None:
        """Match a tensor with its parts, or update the candidates; `equal_names` have the tensor's fingerprint."""
        tensor = wholes.load(name)
        for dim, names_by_part in _equal_splits(tensor, wholes.tensors[name].dtype.name, pool):
            chosen = _choose_parts(names_by_part, parts.matched) if len(equal_names) == 1 else ()
            values = [parts.load(part) for part in chosen]
            if wholes is self.target:
                is_match = self._add(chosen, (name,), _fuse(values, tensor))
                candidates = dict.fromkeys(equal_names, max(names_by_part, key=len))
            else:
                is_match = self._add((name,), chosen, _split(tensor, values, dim))
                candidates = dict.fromkeys(itertools.chain(*names_by_part), equal_names)
            if is_match:
                return
            if all(names_by_part):
                self.candidates.update(candidates)


def _choose_parts(names_by_part: list[list[str]], matched: set[str]) -> tuple[str, ...]:
    """Return the name of each part; empty unless each part has exactly one name, without a match, and all differ."""
    names = [names[0] for names in names_by_part if len(names) == 1 and names[0] not in matched]
    return tuple(names) if len(set(names)) == len(names_by_part) else ()


def _fuse(parts: list[torch.Tensor], target: torch.Tensor) -> Ops | None:
    """Return the operations that fuse parts into a target, or None."""
    if len({part.shape for part in parts}) != 1:
        return None
    for dim in range(parts[0].dim()):
        ops = find_operations(torch.cat(parts, dim), target)
        if ops is not None:
            return (Fuse(len(parts), dim), *ops)
    return None


def _split(source: torch.Tensor, targets: list[torch.Tensor], dim: int) -> Ops | None:
    """Return the operations that split a source along a dimension into targets, or None."""
    if not targets:
        return None
    parts = source.chunk(len(targets), dim)
    ops = find_operations(parts[0], targets[0])
    # A rule applies the same operations to every part.
    others = zip(parts[1:], targets[1:], strict=True)
    if ops is None or any(find_operations(part, target) != ops for part, target in others):
        return None
    return (Split(len(targets), dim), *ops)


def _equal_splits(tensor: torch.Tensor, dtype: str, pool: NamesByFingerprint) -> Iterator[tuple[int, list[list[str]]]]:
    """Yield the ways to split a tensor equally: the dimension, and for each part the names with its fingerprint."""
    sizes = {fingerprint.numel for fingerprint in pool if fingerprint.numel and fingerprint.dtype == dtype}
    for size, dim in itertools.product(sorted(sizes, reverse=True), range(tensor.dim())):
        num_parts, remainder = divmod(tensor.numel(), size)
        if not remainder and 1 < num_parts <= _MAX_PARTS and tensor.shape[dim] % num_parts == 0:
            yield dim, [pool.get(_fingerprint(part, dtype), []) for part in tensor.chunk(num_parts, dim)]

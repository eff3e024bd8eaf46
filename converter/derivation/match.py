"""Which tensors of a source a target's tensors are made of, found by their values.

What is looked up is the sum of a tensor's elements, which no reordering changes: a renamed, reshaped or transposed
tensor has its source's sum, and each part of a fused one the sum of the tensor it was. Whatever a sum suggests is then
compared element by element.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterator

import torch

from converter.derivation.chain import chain
from converter.derivation.found import ALIKE, VALUES, Found, Named, made_of
from converter.derivation.likeness import labels, likeness, meaning, pair
from converter.tensors.evaluate import evaluate
from converter.tensors.lazy_tensor import LazyTensor, nbytes
from converter.tensors.ops import Deinterleave, Fuse, Op, Split

# Elements are compared as integers: a NaN equals itself, and 0.0 is not -0.0.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Into so many a tensor may be cut: q, k and v of each of 21 heads.
_MOST_PARTS = 64

# Type, number of elements and their sum: what stays the same when elements change places.
Sum = tuple[str, int, int]
Told = Callable[[int], None]


def by_values(source: Named, target: Named, told: Told) -> tuple[list[Found], list[tuple[str, ...]]]:
    """What makes the target's tensors; those that nothing makes are in no result. `told` hears of bytes read.

    Then the source's tensors that seem to be copies of each other and were left for it: what is fused of them cannot
    be told.
    """
    search = _Search(source, target, told)
    search.whole()
    search.fused()
    search.split()
    search.siblings()
    search.alike()
    return sorted(search.found, key=lambda entry: entry.sources), search.copies()


def _load(value: LazyTensor) -> torch.Tensor:
    """A tensor's elements as integers, in its shape."""
    return evaluate(value).contiguous().view(_INTEGERS[value.dtype.itemsize])


def _sum(tensor: torch.Tensor, value: LazyTensor) -> Sum:
    """The sum of elements that are `value`'s, or some of them."""
    # Modulo 2**32: torch would first copy what it is to sum as a wider type.
    return value.dtype.name, tensor.numel(), int(tensor.sum(dtype=torch.int32))


def _by_sum(values: Named, told: Told) -> dict[Sum, list[str]]:
    """The names of tensors, by their sums."""
    held: dict[Sum, list[str]] = defaultdict(list)
    for name, value in values.items():
        held[_sum(_load(value), value)].append(name)
        told(nbytes(value))
    return dict(held)


class _Search:
    """The state of one search: what is found, and what of both sides is left."""

    def __init__(self, source: Named, target: Named, told: Told) -> None:
        self.source, self.target = source, target
        self.found: list[Found] = []
        self.left, self.wanted = dict.fromkeys(source), dict.fromkeys(target)
        self.source_labels = labels({name: value.shape for name, value in source.items()})
        self.target_labels = labels({name: value.shape for name, value in target.items()})
        ours, theirs = _by_sum(source, told), _by_sum(target, told)
        self.equals = [(ours[key], theirs[key]) for key in theirs if key in ours]
        # What is cut or put together, if anything is.
        self.ours = {key: names for key, names in ours.items() if key not in theirs}
        self.theirs = {key: names for key, names in theirs.items() if key not in ours}

    def whole(self) -> None:
        """Targets with all elements of one source: one of its kind on both sides."""
        for sources, targets in self.equals:
            if len(sources) == len(targets) == 1:
                self._take_whole(sources[0], targets[0])

    def _take_whole(self, source: str, target: str, how: str = VALUES, rivals: tuple[str, ...] = ()) -> bool:
        ops = chain(_load(self.source[source]), _load(self.target[target]))
        if ops is not None:
            self._take(Found((source,), (target,), ops, how, rivals))
        return ops is not None

    def _take(self, entry: Found) -> None:
        self.found.append(entry)
        for name in entry.sources:
            self.left.pop(name)
        for name in entry.targets:
            self.wanted.pop(name)

    def fused(self) -> None:
        """Targets whose equal parts each are one source."""
        for name in itertools.chain(*self.theirs.values()):
            for _, sources in _cut(self.target[name], self.ours, self.left):
                if ops := self._fuse(sources, name):
                    self._take(Found(sources, (name,), ops))
                    break

    def _fuse(self, parts: tuple[str, ...], name: str) -> tuple[Op, ...] | None:
        """What fuses these sources to a target."""
        values = [_load(self.source[part]) for part in parts]
        if len({value.shape for value in values}) > 1:
            return None
        wanted = _load(self.target[name])
        for dim in range(values[0].dim()):
            ops = chain(torch.cat(values, dim), wanted)
            if ops is not None:
                return (Fuse(len(parts), dim), *ops)
        return None

    def split(self) -> None:
        """Sources whose equal parts each are one target."""
        for source in itertools.chain(*self.ours.values()):
            if source in self.left:
                for dim, targets in _cut(self.source[source], self.theirs, self.wanted):
                    parts = _load(self.source[source]).chunk(len(targets), dim)
                    chains = {chain(part, _load(self.target[t])) for part, t in zip(parts, targets, strict=True)}
                    ops = chains.pop()
                    if not chains and ops is not None:
                        self._take(Found((source,), targets, (Split(len(parts), dim), *ops)))
                        break

    def siblings(self) -> None:
        """What sources that are alike leave open and a sibling settles: biases of zeros go where their weights go."""
        makers = {self.target_labels[entry.targets[0]].parent: entry for entry in self.found if _rearranges(entry)}
        for name in list(self.wanted):
            maker = makers.get(self.target_labels[name].parent)
            if maker is None:
                continue
            before, after = self.target_labels[maker.targets[0]].leaf, self.target_labels[name].leaf
            parts = tuple(part for of in maker.sources for part in self._sibling(of, before, after))
            if len(parts) != len(maker.sources):
                continue
            ops = self._fuse(parts, name) if len(parts) > 1 else maker.ops[-1:]
            if ops and self._holds(entry := Found(parts, (name,), ops, ALIKE)):
                self._take(entry)

    def _sibling(self, name: str, before: str, after: str) -> list[str]:
        """The source that is to `name` what the target's `after` (bias) is to `before` (weight)."""
        words = Counter(meaning(name))
        words.subtract(meaning(before))
        words.update(meaning(after))
        return [other for other in self.left if Counter(meaning(other)) == words][:1]

    def _holds(self, entry: Found) -> bool:
        """Whether the target's elements are what the operations make of the sources."""
        try:
            made = made_of(entry, self.source)
        except ValueError:
            return False
        return all(torch.equal(_load(value), _load(self.target[name])) for name, value in made)

    def copies(self) -> list[tuple[str, ...]]:
        """Sources that nothing was made of, each with those that have its sum."""
        left = (tuple(name for name in names if name in self.left) for names in self.ours.values())
        return [names for names in left if len(names) > 1]

    def alike(self) -> None:
        """Targets that several sources equal, by their names and by what is certain of their neighbours."""
        certain = [
            (self.source_labels[s], self.target_labels[t]) for e in self.found for s in e.sources for t in e.targets
        ]
        taught = {same for a, b in certain for same in ((a.parent, b.parent), (a.leaf, b.leaf))}
        rivals = {target: sources for sources, targets in self.equals for target in targets if target in self.wanted}
        scored = [
            (likeness(self.source_labels[source], self.target_labels[target], taught), source, target)
            for target, sources in rivals.items()
            for source in sources
            if source in self.left
        ]
        pair(scored, lambda s, t: self._take_whole(s, t, ALIKE, tuple(other for other in rivals[t] if other != s)))


def _cut(value: LazyTensor, pool: dict[Sum, list[str]], free: Container[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Each way to cut a tensor into equal parts that have the sums of free tensors of a pool: dimension and names."""
    tensor = _load(value)
    sizes = sorted({size for _, size, _ in pool if size}, reverse=True)
    for size, dim in itertools.product(sizes, range(tensor.dim())):
        number, rest = divmod(tensor.numel(), size)
        if rest or not 1 < number <= _MOST_PARTS or tensor.shape[dim] % number:
            continue
        rivals = [[n for n in pool.get(_sum(part, value), ()) if n in free] for part in tensor.chunk(number, dim)]
        names = tuple(itertools.chain(*rivals))
        # Parts that are alike (all zeros) are told apart by their siblings, later.
        if {len(one) for one in rivals} == {1} and len(set(names)) == number:
            yield dim, names


def _rearranges(entry: Found) -> bool:
    return len(entry.sources) > 1 or any(isinstance(op, Deinterleave) for op in entry.ops)

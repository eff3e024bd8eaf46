"""Which tensors of a source a target's tensors are made of, found by their values.

Bytes first: equal checksums. What is left over is looked for by sums of elements, which no reordering changes: a
transposed tensor has its source's sum, and each part of a fused one the sum of the tensor it was. Whatever a checksum
or a sum suggests is then compared element by element.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor

import torch

from converter.derivation.chain import chain, reshaping
from converter.derivation.found import ALIKE, VALUES, Found, Named, made_of
from converter.derivation.likeness import known, labels, likeness, meaning, pair
from converter.derivation.values import Checksum, Sum, checksum, cuts, divides, equal, load, sum_of
from converter.mapping.expr import Expr, nbytes
from converter.mapping.ops import Deinterleave, Fuse, Op, Split

# Tensors read and compared at a time.
_THREADS = 2

Told = Callable[[int], None]


def by_values(source: Named, target: Named, told: Told) -> list[Found]:
    """What makes the target's tensors; those that nothing makes are in no result. `told` hears of bytes read."""
    return _Search(source, target, told).run()


class _Search:
    """The state of one search: what is found, and what of both sides is left."""

    def __init__(self, source: Named, target: Named, told: Told) -> None:
        self.source, self.target, self.told = source, target, told
        self.found: list[Found] = []
        self.unproved: set[Found] = set()
        self.left, self.wanted = dict.fromkeys(source), dict.fromkeys(target)
        self.source_labels = labels({name: value.shape for name, value in source.items()})
        self.target_labels = labels({name: value.shape for name, value in target.items()})

    def run(self) -> list[Found]:
        same = self._same_bytes()
        for name, rivals in same.items():
            # One of its kind on both sides.
            if len(rivals) == 1 and sum(other == rivals for other in same.values()) == 1:
                self._take_same(rivals[0], name)
        sums = self._sums(same)
        if sums:
            for name in sorted(self.wanted.keys() - same.keys()):
                self._reordered(name, sums)
            for name in sorted(self.wanted.keys() - same.keys()):
                self._fused(name, sums)
            self._split(self.wanted.keys() - same.keys(), sums)
        self._siblings()
        self._alike(same)
        with ThreadPoolExecutor(_THREADS) as pool:
            held = pool.map(lambda entry: entry not in self.unproved or self._holds(entry), self.found)
            sure = [entry for entry, holds in zip(self.found, held, strict=True) if holds]
        return sorted(sure, key=lambda entry: entry.sources)

    def _take_same(self, source: str, name: str, how: str = VALUES, rivals: tuple[str, ...] = ()) -> None:
        """Take a source for its checksum; its elements are compared at the end."""
        ops = reshaping(self.source[source].shape, self.target[name].shape)
        entry = Found((source,), (name,), ops, how, rivals)
        self.unproved.add(entry)
        self._take(entry)

    def _take(self, entry: Found) -> None:
        self.found.append(entry)
        for name in entry.sources:
            self.left.pop(name)
        for name in entry.targets:
            self.wanted.pop(name)

    def _same_bytes(self) -> dict[str, list[str]]:
        """The sources with the checksum of each target that has any."""
        held: dict[Checksum, list[str]] = defaultdict(list)
        for name, key in self._checksums(self.source).items():
            held[key].append(name)
        return {name: held[key] for name, key in self._checksums(self.target).items() if key in held}

    def _checksums(self, values: Named) -> dict[str, Checksum]:
        """The checksum of each tensor: the file's own where it has one."""

        def asked(value: Expr) -> Checksum:
            found = checksum(value)
            self.told(nbytes(value))
            return found

        with ThreadPoolExecutor(_THREADS) as pool:
            return dict(zip(values, pool.map(asked, values.values()), strict=True))

    def _sums(self, same: dict[str, list[str]]) -> dict[Sum, list[str]]:
        """What is left of the source, by sum: all that can be a part of what is left of the target, or hold it."""
        used = {name for rivals in same.values() for name in rivals}
        counts = {math.prod(self.target[name].shape) or 1 for name in self.wanted.keys() - same.keys()}
        held: dict[Sum, list[str]] = defaultdict(list)
        for name in sorted(self.left.keys() - used):
            count = math.prod(self.source[name].shape) or 1
            if any(divides(count, other) or divides(other, count) for other in counts):
                held[sum_of(load(self.source[name]), self.source[name])].append(name)
        return held

    def _reordered(self, name: str, sums: dict[Sum, list[str]]) -> None:
        """A target with all elements of one source in another order."""
        tensor = load(self.target[name])
        for rival in self._available(sums, sum_of(tensor, self.target[name])):
            ops = chain(load(self.source[rival]), tensor)
            if ops is not None:
                self._take(Found((rival,), (name,), ops))
                return

    def _fused(self, name: str, sums: dict[Sum, list[str]]) -> None:
        """A target whose equal parts each are one source."""
        value = self.target[name]
        for _, parts in cuts(value, {key.size for key in sums}):
            rivals = [self._available(sums, sum_of(part, value)) for part in parts]
            names = tuple(names[0] for names in rivals if len(names) == 1)
            # Parts that are alike (all zeros) are told apart by their siblings, later.
            if len(set(names)) == len(parts) and (ops := self._fuse(names, name)):
                self._take(Found(names, (name,), ops))
                return

    def _fuse(self, parts: tuple[str, ...], name: str) -> tuple[Op, ...] | None:
        """What fuses these sources to a target."""
        values = [load(self.source[part]) for part in parts]
        if len({value.shape for value in values}) > 1:
            return None
        wanted = load(self.target[name])
        for dim in range(values[0].dim()):
            ops = chain(torch.cat(values, dim), wanted)
            if ops is not None:
                return (Fuse(len(parts), dim), *ops)
        return None

    def _split(self, wanted: AbstractSet[str], sums: dict[Sum, list[str]]) -> None:
        """Sources whose equal parts each are one target."""
        held: dict[Sum, str] = {}
        for name in sorted(wanted):
            held[sum_of(load(self.target[name]), self.target[name])] = name
        for source in [name for names in sums.values() for name in names if name in self.left]:
            value = self.source[source]
            for dim, parts in cuts(value, {key.size for key in held}):
                names = (held.get(sum_of(part, value), "") for part in parts)
                targets = tuple(name for name in names if name in self.wanted)
                if len(set(targets)) < len(parts):
                    continue
                chains = {chain(part, load(self.target[t])) for part, t in zip(parts, targets, strict=True)}
                ops = chains.pop()
                if not chains and ops is not None:
                    self._take(Found((source,), targets, (Split(len(parts), dim), *ops)))
                    break

    def _available(self, sums: dict[Sum, list[str]], key: Sum) -> list[str]:
        return [name for name in sums.get(key, []) if name in self.left]

    def _siblings(self) -> None:
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
            if ops and self._holds(Found(parts, (name,), ops)):
                self._take(Found(parts, (name,), ops, ALIKE))

    def _sibling(self, name: str, before: str, after: str) -> list[str]:
        """The source that is to `name` what the target's `after` (bias) is to `before` (weight)."""
        if name.endswith(before) and (swapped := name[: -len(before)] + after) in self.left:
            return [swapped]
        parent, wanted = self.source_labels[name].parent, meaning(after)
        labels = ((other, self.source_labels[other]) for other in self.left)
        return [other for other, label in labels if label.parent == parent and meaning(label.leaf) == wanted][:1]

    def _alike(self, same: dict[str, list[str]]) -> None:
        """Targets that several sources equal, by their names and by what is certain of their neighbours."""
        taught = known(
            (self.source_labels[s], self.target_labels[t]) for e in self.found for s in e.sources for t in e.targets
        )
        scored = [
            (likeness(self.source_labels[source], self.target_labels[name], taught), source, name)
            for name, rivals in same.items()
            if name in self.wanted
            for source in rivals
            if source in self.left
        ]
        for source, name, _ in pair(scored):
            self._take_same(source, name, ALIKE, tuple(other for other in same[name] if other != source))

    def _holds(self, entry: Found) -> bool:
        """Whether the target's bytes are what the operations make of the sources."""
        try:
            made = made_of(entry, self.source)
        except ValueError:
            return False
        return all(equal(value, self.target[name]) for name, value in made)


def _rearranges(entry: Found) -> bool:
    return len(entry.sources) > 1 or any(isinstance(op, Deinterleave) for op in entry.ops)

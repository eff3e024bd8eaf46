"""Which tensors of a source a layout's tensors are made of, where no weights of that layout are there to compare."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from functools import cache

from converter.derivation.found import NAME, Found, Named
from converter.derivation.likeness import labels, likeness, pair
from converter.layouts import registry
from converter.layouts.claims import claim
from converter.layouts.shapes import Dim, Shape, Sizes, fits
from converter.layouts.spec import CanonicalLayout, Rule, invert
from converter.plan.apply import apply
from converter.tensors.dtypes import FLOAT32
from converter.tensors.lazy_tensor import Generated, LazyTensor

# Of two that a person would call alike; a source that alone has a shape needs no likeness.
_ENOUGH = 1.3
# Names under one prefix, at least, to be a model.
_FEWEST = 10
# Sizes so odd that a dimension tells which of them it is a multiple of.
_PRIMES = (10007, 10009, 10037, 10039, 10061, 10067, 10069, 10079, 10091, 10093, 10099, 10103)
_ANY = 10111


class Symbols:
    """The canonical tensors with a prime for each size: what is done to a shape can be read back from the numbers."""

    def __init__(self, canonical: CanonicalLayout, depth: int) -> None:
        names = dict.fromkeys(dim.name for spec in canonical.tensors for dim in spec.shape if dim.name)
        self._sizes = dict(zip(names, _PRIMES, strict=False))
        self.tensors = {
            # Of these, shapes alone are looked at.
            name: Generated(FLOAT32, tuple(self._number(dim) for dim in spec.shape), bytes)
            for spec in canonical.tensors
            for name in spec.name.names(depth)
        }

    def _number(self, dim: Dim) -> int:
        return dim.factor * self._sizes[dim.name] if dim.name else dim.factor or _ANY

    def shape(self, value: LazyTensor) -> Shape:
        """The shape of something made of these tensors, in the canonical names."""
        return tuple(map(self._dim, value.shape))

    def _dim(self, size: int) -> Dim:
        if size == _ANY:
            return Dim(0, None)
        named = next((name for name, prime in self._sizes.items() if size % prime == 0), None)
        return Dim(size // self._sizes[named], named) if named else Dim(size, None)


def depth_of(names: Iterable[str]) -> int:
    """How many layers names speak of: as many as most families of names have members."""
    sizes = Counter(Counter(re.sub("[0-9]+", "#", name, count=1) for name in names).values())
    return max(sizes, key=lambda size: (size * sizes[size], size), default=1)


def by_names(source: Named, canonical: CanonicalLayout, layout: str) -> list[Found]:
    """What makes the canonical tensors, by names and shapes as `layout` has them.

    The canonical layout itself means whichever fits best.
    A source that splits q, k and v is known by a layout that does so too, whose rules then lead on. Of a
    source that holds more than one model, the one under whose prefix most is found.
    """
    rules = {mapping.name: mapping.rules for mapping in registry.mappings(canonical.family)}
    chosen = [rules[layout]] if layout != canonical.name else [canonical.mapping.rules, *rules.values()]
    tried: list[tuple[tuple[int, int, int], list[Found]]] = []

    @cache
    def wanted(depth: int) -> tuple[int, list[dict[str, Shape]]]:
        symbols = Symbols(canonical, depth)
        return len(symbols.tensors), [_written(dialect, symbols) for dialect in chosen]

    for prefix in _prefixes(source):
        inside = {name: value for name, value in source.items() if name.startswith(prefix)}
        tensors, written = wanted(depth_of(inside))
        for dialect, shapes in zip(chosen, written, strict=True):
            found = list(_led_on(inside, shapes, dialect))
            made = sum(len(entry.targets) for entry in found)
            # What is missing weighs more: most of a deeper encoder beside it is no match for all of the right one.
            score = made - 3 * (tensors - made)
            tried.append(((score, -sum(len(entry.rivals) for entry in found), len(prefix)), found))
    return max(tried, key=lambda item: item[0])[1]


def _prefixes(names: Iterable[str]) -> list[str]:
    """What a model's names may begin with: whole segments, none of them a number; the longest of the same names."""
    dots = Counter(name[: dot.end()] for name in names for dot in re.finditer(r"\.", name))
    found = [prefix for prefix, count in dots.items() if count >= _FEWEST and not re.search("[0-9]", prefix)]
    shorter = {a for a in found for b in found if a != b and b.startswith(a) and dots[a] == dots[b]}
    return ["", *(prefix for prefix in found if prefix not in shorter)]


def _led_on(source: Named, wanted: Mapping[str, Shape], rules: tuple[Rule, ...]) -> Iterator[Found]:
    """The source's tensors taken for a layout's that are like them, and renamed by that layout's rules."""
    pairs = _pairs(source, wanted)
    claims = claim(rules, pairs)
    for (index, bound), parts in claims.groups.items():
        rule = rules[index]
        if len(parts) == len(rule.sources) and rule.targets:
            sources = tuple(pairs[parts[i]][0] for i in range(len(parts)))
            targets = tuple(target.fill(dict(bound)) for target in rule.targets)
            rivals = tuple(other for name in parts.values() for other in pairs[name][1])
            yield Found(sources, targets, rule.ops, NAME, rivals)


def _written(rules: tuple[Rule, ...], symbols: Symbols) -> dict[str, Shape]:
    """A layout's tensors, made of the canonical layout's: their shapes, in the canonical sizes."""
    inverted = invert(rules)
    claimed = {name for parts in claim(inverted, symbols.tensors).groups.values() for name in parts.values()}
    optional = tuple(rule._replace(optional=True) for rule in inverted)
    made = apply(
        optional, {name: value for name, value in symbols.tensors.items() if name in claimed}, "the canonical layout"
    )
    return {name: symbols.shape(value) for name, value in made.values.items()}


def _pairs(source: Named, target: Mapping[str, Shape]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """For each of a layout's names the source's that is like it and fits, and the others that are as like it."""
    ours = labels({name: len(value.shape) for name, value in source.items()})
    theirs = labels({name: len(shape) for name, shape in target.items()})
    sizes: Sizes = {}
    ranked: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, label in ours.items():
        ranked[label.rank, len(source[name].shape)].append(name)
    # None that differ in rank can be alike enough.
    scored = [
        (score, name, other)
        for other, label in theirs.items()
        for name in ranked[label.rank, len(target[other])]
        if (score := likeness(ours[name], label)) >= _ENOUGH
    ]
    made = pair(scored, lambda name, other: fits(target[other], source[name].shape, sizes))
    free = _by_shape(source, {name for name, _ in made.values()})
    for other in sorted(target.keys() - made.keys()):
        only = _only_one(target[other], free, sizes)
        if only:
            fits(target[other], only, sizes)
            made[other] = (free.pop(only)[0], ())
    return made


def _by_shape(source: Named, taken: Container[str]) -> dict[tuple[int, ...], list[str]]:
    """The floating-point tensors that are not taken, by their shapes: a model has many tensors and few shapes."""
    free: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, value in source.items():
        if name not in taken and value.dtype.is_float:
            free[value.shape].append(name)
    return dict(free)


def _only_one(wanted: Shape, free: Mapping[tuple[int, ...], list[str]], sizes: Sizes) -> tuple[int, ...] | None:
    """What no name tells: the shape of the one source that fits, if part of what is wanted is known; else None."""
    if not any(dim.name in sizes for dim in wanted):
        return None
    fitting = [shape for shape in free if fits(wanted, shape, dict(sizes))]
    return fitting[0] if len(fitting) == 1 and len(free[fitting[0]]) == 1 else None

"""Matches layouts with the tensors of a checkpoint: which layouts fit, and under which prefixes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import NamedTuple

from converter.layouts.marks import convolutions, has_vision_encoder
from converter.layouts.shapes import Sizes, match_shape
from converter.layouts.spec import LayoutSpec
from converter.layouts.template import any_match
from converter.tensors.tensor_info import TensorInfo

# No model has more encoders of one family, and each prefix costs a search through all names.
MAX_PREFIXES = 32


class LayoutMatch(NamedTuple):
    """A layout that the tensors under one prefix fit."""

    layout: LayoutSpec
    outer_prefix: str  # The part of the tensors' names before `prefix`, such as `model.`; often empty
    prefix: str  # The prefix from the layout's `prefixes` that the names have; empty if they have none of them

    @property
    def name(self) -> str:
        """The name of the layout."""
        return self.layout.name

    @property
    def full_prefix(self) -> str:
        """The prefix of the encoder's names in the checkpoint."""
        return self.outer_prefix + self.prefix

    @property
    def unknown_prefix(self) -> str:
        """The full prefix, or empty if the layout lists it."""
        return self.full_prefix if self.outer_prefix else ""

    @property
    def evidence(self) -> list[str]:
        """The tensors by which the layout was detected."""
        return [self.full_prefix + key for key in self.layout.detect]


def match_layouts(tensors: Mapping[str, TensorInfo], layouts: Iterable[LayoutSpec]) -> list[LayoutMatch]:
    """Return the best layout for each prefix under which one fits, in the order of the tensors.

    A layout may fit under any prefix. If a layout fits under a prefix that it lists, layouts that fit only under other
    prefixes are left out. Also left out are layouts that know less of the prefix than another one of the same tensors,
    and a language model next to an encoder of its family. At most MAX_PREFIXES prefixes are tried.
    """
    matches: dict[str, list[LayoutMatch]] = {}
    for layout in layouts:
        for prefix in islice(_fitting_prefixes(tensors, layout), MAX_PREFIXES):
            # The longest of the layout's prefixes that this one ends with.
            known = (end for end in layout.prefixes if f".{prefix}".endswith(f".{end}") or not end)
            layout_prefix = max(known, key=len, default="")
            outer_prefix = prefix.removesuffix(layout_prefix)
            matches.setdefault(prefix, []).append(LayoutMatch(layout, outer_prefix, layout_prefix))
    best = [_best(tensors, candidates) for candidates in islice(matches.values(), MAX_PREFIXES)]
    best = [match for match in best if not any(_is_superseded(match, by=other) for other in best)]
    best = [match for match in best if not match.layout.language_model] or best
    under_listed_prefix = [match for match in best if match.prefix in match.layout.prefixes]
    positions = {name: index for index, name in enumerate(tensors)}
    return sorted(under_listed_prefix or best, key=lambda match: positions[match.evidence[0]])


def without_language_models(matches: Iterable[LayoutMatch], names: Iterable[str]) -> list[LayoutMatch]:
    """Leave out matches with the language model of a checkpoint, if the names of its tensors show a vision encoder."""
    kept = list(matches)
    if any(match.layout.language_model for match in kept) and has_vision_encoder(names):
        return [match for match in kept if not match.layout.language_model]
    return kept


def without_inner_copies(names: Iterable[str], prefix: str | None) -> list[str]:
    """Leave out names (or prefixes) that end as the shortest one does after the prefix of --prefix.

    For `student.` and the names student.w and student.copy.w, return student.w. Return all if one has another end.
    """
    candidates = list(names)
    if prefix is None or not candidates:
        return candidates
    shortest = min(candidates, key=len)
    tail = "." + shortest.removeprefix(prefix)
    is_copied = all(name.endswith(tail) for name in candidates if name != shortest)
    return [shortest] if is_copied else candidates


def find_prefixes(tensors: Iterable[str], key: str, layout_prefixes: Iterable[str] = ()) -> Iterator[str]:
    """Yield the prefixes under which tensors have a name.

    Args:
        tensors: The names of the tensors.
        key: The name without a prefix.
        layout_prefixes: The prefixes of the layout, which need not end with a dot.
    """
    ends = (".", *filter(None, layout_prefixes))
    for name in tensors:
        if name.endswith(key) and (len(name) == len(key) or name[: -len(key)].endswith(ends)):
            yield name[: -len(key)]


def likely_prefixes(tensors: Iterable[str], layout: LayoutSpec) -> list[str]:
    """Return the prefixes under which most names of the layout's `detect` occur; shapes are not compared."""
    names = list(tensors)
    counts = Counter(prefix for key in layout.detect for prefix in find_prefixes(names, key))
    return [prefix for prefix, count in counts.items() if 2 * count > len(layout.detect)]


def _fitting_prefixes(tensors: Mapping[str, TensorInfo], layout: LayoutSpec) -> Iterator[str]:
    for prefix in find_prefixes(tensors, next(iter(layout.detect)), layout.prefixes):
        sizes: Sizes = {}
        if all(
            prefix + key in tensors and match_shape(shape, tensors[prefix + key].shape, sizes)
            for key, shape in layout.detect.items()
        ):
            yield prefix


def _best(tensors: Mapping[str, TensorInfo], matches: list[LayoutMatch]) -> LayoutMatch:
    """Return the match with the longest prefix that a layout lists.

    Among several, prefer the one with the fewest unknown names, then the one with the checkpoint's memory format of
    convolutions.
    """
    longest = max(len(match.prefix) for match in matches)
    matches = [match for match in matches if len(match.prefix) == longest]
    if len(matches) == 1:
        return matches[0]
    prefix = matches[0].full_prefix
    is_channels_last = _is_channels_last(tensors, prefix)
    names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]

    def rank(match: LayoutMatch) -> tuple[int, bool, bool]:
        templates = match.layout.templates("")
        num_unknown = sum(not any_match(templates, name) for name in names)
        return num_unknown, match.layout.is_channels_last != is_channels_last, "" not in match.layout.prefixes

    return min(matches, key=rank)


def _is_channels_last(tensors: Mapping[str, TensorInfo], prefix: str) -> bool:
    """Return whether convolutions are stored channels last.

    The tensors with the prefix decide; if their shapes do not show it, all tensors do.
    """
    channels_first, channels_last = convolutions({name: t for name, t in tensors.items() if name.startswith(prefix)})
    if not channels_first and not channels_last:
        channels_first, channels_last = convolutions(tensors)
    return len(channels_last) > len(channels_first)


def _is_superseded(match: LayoutMatch, by: LayoutMatch) -> bool:
    """Return whether the layout of `by` fits the same tensors and knows more of their prefix."""
    return len(by.outer_prefix) < len(match.outer_prefix) and not set(by.evidence).isdisjoint(match.evidence)

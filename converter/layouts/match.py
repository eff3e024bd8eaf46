"""Matching of layouts with tensors: which layouts fit, and under which prefixes."""

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

# A checkpoint with more encoders of one family is not a model. Each prefix costs a search through all names.
MAX_PREFIXES = 32


class LayoutMatch(NamedTuple):
    """A layout that fits some tensors."""

    layout: LayoutSpec
    wrapper: str  # What precedes the layout's own prefix in the tensors' names, such as `model.`; often empty
    prefix: str  # The prefix of the encoder's names: one of the layout's own, or empty where none of them occurs

    @property
    def name(self) -> str:
        """The name of the layout."""
        return self.layout.name

    @property
    def full_prefix(self) -> str:
        """The prefix of the encoder's names in the checkpoint."""
        return self.wrapper + self.prefix

    @property
    def unknown_prefix(self) -> str:
        """The full prefix; empty if it is one of the layout's prefixes."""
        return self.full_prefix if self.wrapper else ""

    @property
    def evidence(self) -> list[str]:
        """The tensors by which the layout was detected."""
        return [self.full_prefix + key for key in self.layout.detect]


def match_layouts(tensors: Mapping[str, TensorInfo], layouts: Iterable[LayoutSpec]) -> list[LayoutMatch]:
    """Return the layout that fits best under each prefix under which any fits, in the order of the tensors.

    Layouts fit under any prefix. If a layout fits under one of its prefixes, layouts that only fit under other prefixes
    are left out. So are a layout that knows fewer names of the same tensors than another, and a language model next to
    an encoder of its family. At most MAX_PREFIXES prefixes are tried.
    """
    matches: dict[str, list[LayoutMatch]] = {}
    for layout in layouts:
        for prefix in islice(_fitting_prefixes(tensors, layout), MAX_PREFIXES):
            # The prefix may end with one of the layout's prefixes; the longest one counts.
            endings = (end for end in layout.prefixes if f".{prefix}".endswith(f".{end}") or not end)
            layout_prefix = max(endings, key=len, default="")
            wrapper = prefix.removesuffix(layout_prefix)
            matches.setdefault(prefix, []).append(LayoutMatch(layout, wrapper, layout_prefix))
    best = [_best(tensors, candidates) for candidates in islice(matches.values(), MAX_PREFIXES)]
    best = [match for match in best if not any(_knows_more(other, match) for other in best)]
    best = [match for match in best if not match.layout.language_model] or best
    with_layout_prefix = [match for match in best if match.prefix in match.layout.prefixes]
    order = {name: index for index, name in enumerate(tensors)}
    return sorted(with_layout_prefix or best, key=lambda match: order[match.evidence[0]])


def without_language_models(matches: Iterable[LayoutMatch], names: Iterable[str]) -> list[LayoutMatch]:
    """Leave out language models if `names` show a vision encoder: they are the language model of that checkpoint."""
    listed = list(matches)
    if any(match.layout.language_model for match in listed) and has_vision_encoder(names):
        return [match for match in listed if not match.layout.language_model]
    return listed


def outermost(names: Iterable[str], prefix: str | None) -> list[str]:
    """Choose among names or prefixes that begin with `prefix`, which the user chose (--prefix).

    Returns:
        The one directly under `prefix`, if all others are copies of it under longer prefixes; else all of them.
    """
    listed = list(names)
    if prefix is None or not listed:
        return listed
    first = min(listed, key=len)
    tail = "." + first.removeprefix(prefix)
    return [first] if all(name.endswith(tail) for name in listed if name != first) else listed


def prefixes_of(tensors: Iterable[str], key: str, layout_prefixes: Iterable[str] = ()) -> Iterator[str]:
    """Yield the prefixes with which a name occurs in the names of tensors.

    Args:
        tensors: The names of the tensors.
        key: The name without a prefix.
        layout_prefixes: Prefixes that need not end with a dot.
    """
    ends = (".", *filter(None, layout_prefixes))
    for name in tensors:
        if name.endswith(key) and (len(name) == len(key) or name[: -len(key)].endswith(ends)):
            yield name[: -len(key)]


def likely_prefixes(tensors: Iterable[str], layout: LayoutSpec) -> list[str]:
    """Return the prefixes under which most of the tensors of the layout's `detect` are, whatever their shapes."""
    names = list(tensors)
    counts = Counter(prefix for key in layout.detect for prefix in prefixes_of(names, key))
    return [prefix for prefix, count in counts.items() if 2 * count > len(layout.detect)]


def _fitting_prefixes(tensors: Mapping[str, TensorInfo], layout: LayoutSpec) -> Iterator[str]:
    for prefix in prefixes_of(tensors, next(iter(layout.detect)), layout.prefixes):
        sizes: Sizes = {}
        if all(
            prefix + key in tensors and match_shape(shape, tensors[prefix + key].shape, sizes)
            for key, shape in layout.detect.items()
        ):
            yield prefix


def _best(tensors: Mapping[str, TensorInfo], matches: list[LayoutMatch]) -> LayoutMatch:
    """Return the match with the longest prefix of a layout.

    Of several, return the one that knows the most names, then the one with the checkpoint's order of convolutions.
    """
    longest = max(len(match.prefix) for match in matches)
    matches = [match for match in matches if len(match.prefix) == longest]
    if len(matches) == 1:
        return matches[0]
    prefix = matches[0].full_prefix
    is_channels_last = _is_channels_last(tensors, prefix)
    names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
    templates = {match.name: match.layout.templates("") for match in matches}
    return min(
        matches,
        key=lambda match: (
            sum(not any_match(templates[match.name], name) for name in names),
            match.layout.is_channels_last != is_channels_last,
            "" not in match.layout.prefixes,
        ),
    )


def _is_channels_last(tensors: Mapping[str, TensorInfo], prefix: str) -> bool:
    """Return whether convolutions are stored channels last.

    The tensors with the prefix decide, or all others if no shape among these shows it.
    """
    first, last = convolutions({name: tensor for name, tensor in tensors.items() if name.startswith(prefix)})
    if not first and not last:
        first, last = convolutions(tensors)
    return len(last) > len(first)


def _knows_more(other: LayoutMatch, match: LayoutMatch) -> bool:
    """Return whether both are of the same tensors, and more of their names is unknown to `match`."""
    return len(other.wrapper) < len(match.wrapper) and not set(other.evidence).isdisjoint(match.evidence)

"""How alike two tensors' names are, and pairs made of the most alike: what is left where values do not decide."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Mapping
from functools import cache
from typing import NamedTuple

# What programs call the same things. Words that every name of some layout has tell nothing: they become "".
_MEANING = {
    **dict.fromkeys(("ln", "layernorm", "layrnorm", "layer_norm", "gn", "bn"), "norm"),
    **dict.fromkeys(("attention", "self_attn", "self_attention", "mha"), "attn"),
    **dict.fromkeys(("lin", "linear", "dense", "ffn", "feed", "forward"), "fc"),
    **dict.fromkeys(("projection", "wo"), "proj"),
    **dict.fromkeys(("emb", "embed", "embedding", "embeddings", "embedder"), "embed"),
    **dict.fromkeys(("pos", "position", "positions", "positional"), "pos"),
    **dict.fromkeys(("class", "cls"), "cls"),
    **dict.fromkeys(("w", "kernel", "gamma", "scale"), "weight"),
    **dict.fromkeys(("b", "beta"), "bias"),
    **dict.fromkeys(("query", "wq"), "q"),
    **dict.fromkeys(("key", "wk"), "k"),
    **dict.fromkeys(("value", "wv"), "v"),
    **dict.fromkeys(
        ("layer", "layers", "block", "blocks", "resblocks", "blk", "h", "transformer", "encoder", "self"), ""
    ),
    **dict.fromkeys(("model", "module", "visual", "vision", "token", "c", "to", "in", "trunk"), ""),
}
_INDEX = re.compile(r"[0-9]+")


class Label(NamedTuple):
    """A name taken apart: `words` by meaning, and `rank`, which of its family it is; -1 where it has no number."""

    words: tuple[str, ...]
    rank: int
    parent: str
    leaf: str


def labels(shapes: Mapping[str, object]) -> dict[str, Label]:
    """The labels of names, given the tensors' shapes.

    A family are names that differ in their first number alone and whose shapes are equal: a layer counts the same from
    0 and from 1, and so do the 24 of one layout that another numbers 2, 4, 6.
    """
    families: dict[tuple[str, object], list[tuple[int, str]]] = defaultdict(list)
    for name, shape in shapes.items():
        found = _INDEX.search(name)
        family = _INDEX.sub("#", name, count=1)
        families[family, shape].append((int(found[0][:9]) if found else -1, name))
    result = {}
    for (family, _), members in families.items():
        words = meaning(family)
        for rank, (number, name) in enumerate(sorted(members)):
            parent, _, leaf = name.rpartition(".")
            result[name] = Label(words, -1 if number < 0 else rank, parent, leaf)
    return result


@cache
def meaning(name: str) -> tuple[str, ...]:
    """The words of a name, each as what it means; numbers stay."""
    text = name.lower().replace("layer_norm", "layernorm").replace("c_proj", "fc_2").replace("c_fc", "fc_1")
    words = (_MEANING.get(word, word) for word in re.findall("[a-z]+|[0-9]+", text))
    return tuple(sorted(word for word in words if word))


@cache
def _shared(a: tuple[str, ...], b: tuple[str, ...]) -> float:
    """Twice the words in common for each word of both: 1 where all are."""
    return 2 * (Counter(a) & Counter(b)).total() / max(len(a) + len(b), 1)


def likeness(a: Label, b: Label, taught: Container[tuple[str, str]] = ()) -> float:
    """From 0 to 2 by the names: half of it is that both are of the same rank.

    More where pairs that are certain have `taught` which modules and which last words stand for each other.
    """
    modules, leaves = (a.parent, b.parent) in taught, (a.leaf, b.leaf) in taught
    return _shared(a.words, b.words) + (a.rank == b.rank) + 2 * modules + 0.5 * leaves


def pair(
    scored: Iterable[tuple[float, str, str]], accept: Callable[[str, str], bool]
) -> dict[str, tuple[str, tuple[str, ...]]]:
    """For each target its source, and the other sources that would have done as well.

    Of (score, source, target) the best are taken first, each name once; `accept` may refuse a pair when it comes up.
    """
    order = sorted(scored, key=lambda item: (-item[0], item[2], item[1]))
    equals: dict[tuple[float, str], list[str]] = defaultdict(list)
    for score, source, target in order:
        equals[score, target].append(source)
    taken: set[str] = set()
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for score, source, target in order:
        if source not in taken and target not in found and accept(source, target):
            taken.add(source)
            found[target] = source, tuple(other for other in equals[score, target] if other != source)
    return found

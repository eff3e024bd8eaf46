"""The mapping files that ship, and which of them a checkpoint's tensors fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Mapping as MappingABC
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from converter.checkpoint import Tensor
from converter.errors import LayoutError, MappingError
from converter.files import check_ends
from converter.mapping.apply import claim
from converter.mapping.parse import FAMILIES, parse_mapping, parse_signature
from converter.mapping.rules import Layout, Mapping, Signature
from converter.mapping.shapes import Sizes, fits
from converter.mapping.yamltree import LARGEST

# Tensors of which all rules are tried to find the nearest layout: whole OCR models have 3,000.
MOST_COMPARED = 10_000


class Candidate(NamedTuple):
    """A layout that a checkpoint may have; `load` reads its rules, which takes longer than its signature."""

    name: str
    signature: Signature
    load: Callable[[], Mapping | Layout]


class Match(NamedTuple):
    """A layout that fits a checkpoint whose names carry `prefix`."""

    candidate: Candidate
    prefix: str

    @property
    def evidence(self) -> list[str]:
        """The tensors by which the layout was known."""
        return [self.prefix + key for key in self.candidate.signature.tensors]


@cache
def names() -> tuple[str, ...]:
    """The names of all layouts that ship, hubs first."""
    found = [path.stem for path in _folder().glob("*.yaml")]
    return tuple(sorted(found, key=lambda name: (not name.startswith("deepencoder-"), name)))


def _folder() -> Path:
    """Where the mapping files are. `importlib.resources` would tell too, for 8 ms of imports at every start."""
    return Path(import_module("converter.mappings").__path__[0])


def text(name: str) -> str:
    """The YAML of a layout that ships."""
    if name not in names():
        raise LayoutError(f"no layout is called {name!r}\nlayouts: {', '.join(names())}")
    return (_folder() / f"{name}.yaml").read_text(encoding="utf-8")


@cache
def load(name: str) -> Mapping | Layout:
    """A layout that ships."""
    return parse_mapping(text(name), f"{name}.yaml")


def load_file(path: Path) -> Mapping:
    """A user's own mapping file."""
    try:
        found = parse_mapping(_text_of(path), str(path))
        if isinstance(found, Layout):
            raise MappingError(f"{path}: describes a hub layout (`tensors`), not a mapping to it (`rules`)")
    except MappingError as error:
        raise MappingError(f"{error}\nread one that ships: dsocr-convert mapping show clip-hf") from error
    return found


def _text_of(path: Path) -> str:
    try:
        check_ends(path, MappingError)
        with path.open(encoding="utf-8") as file:
            # One more than is allowed, and so refused, however large the file.
            return file.read(LARGEST + 1)
    except OSError as error:
        raise MappingError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise MappingError(f"{path}: not UTF-8 text: not a mapping file") from error


def hub(family: str) -> Layout:
    """The family's hub layout, the DeepEncoder's own."""
    layout = load(f"deepencoder-{family}")
    assert isinstance(layout, Layout)
    return layout


def layouts_of(target: str) -> list[Mapping | Layout]:
    """The layouts of what a card calls its target: `deepencoder` is a whole one, of two."""
    return [hub(family) for family in FAMILIES] if target == "deepencoder" else [load(target)]


def mappings(family: str) -> list[Mapping]:
    """The family's mappings that ship. A file's name tells its family, so that only one family's are read."""
    found = (load(name) for name in names() if name.startswith(f"{family}-"))
    return [mapping for mapping in found if isinstance(mapping, Mapping)]


def candidates(family: str) -> list[Candidate]:
    """All that a checkpoint of the family can be recognised as."""
    ours = [name for name in names() if name.startswith(f"{family}-") or name == f"deepencoder-{family}"]
    return [Candidate(name, parse_signature(text(name), f"{name}.yaml"), partial(load, name)) for name in ours]


def only(mapping: Mapping) -> list[Candidate]:
    """A mapping that the user has chosen."""
    return [Candidate(mapping.name, mapping.signature, lambda: mapping)]


def recognise(tensors: MappingABC[str, Tensor], candidates: Iterable[Candidate]) -> list[Match]:
    """The layouts that fit, each with the first of its prefixes that does."""
    return [match for match in (_fit(tensors, candidate) for candidate in candidates) if match]


def _fit(tensors: MappingABC[str, Tensor], candidate: Candidate) -> Match | None:
    for prefix in candidate.signature.prefixes:
        sizes: Sizes = {}
        if all(
            prefix + key in tensors and fits(shape, tensors[prefix + key].shape, sizes)
            for key, shape in candidate.signature.tensors.items()
        ):
            return Match(candidate, prefix)
    return None


def count_known(family: str, tensors: MappingABC[str, Tensor]) -> int:
    """How many of the tensors have names of the family's hub layout."""
    templates = [spec.name for spec in hub(family).tensors]
    return sum(any(template.match(name) is not None for template in templates) for name in tensors)


class Nearest(NamedTuple):
    """The mapping that comes closest to tensors that fit none, and where it first differs from them."""

    mapping: Mapping
    prefix: str
    unclaimed: list[str]
    unmatched: list[str]


def nearest(tensors: MappingABC[str, Tensor], candidates: list[Mapping]) -> Nearest | None:
    """The mapping whose rules claim most of the tensors and are used most, or None where all claim nothing."""
    if len(tensors) > MOST_COMPARED:
        return None
    best: Nearest | None = None
    best_score = 0.0
    for mapping in candidates:
        for prefix in mapping.signature.prefixes:
            rules = mapping.rules_for(prefix)
            claims = claim(rules, tensors)
            alive = len({index for index, _ in claims.groups})
            claimed = sum(len(parts) for parts in claims.groups.values())
            # A mapping of few wide rules claims much by chance: both shares count.
            score = claimed / max(len(tensors), 1) * alive / len(rules)
            if score > best_score:
                dead = [rule.text for rule in claims.dead(rules)]
                best, best_score = Nearest(mapping, prefix, claims.unclaimed, dead), score
    return best

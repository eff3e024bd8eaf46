"""The mapping files that ship, and which of them a checkpoint's tensors fit."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from converter.checkpoint import Tensor
from converter.errors import LayoutError, MappingError
from converter.mapping.apply import claim
from converter.mapping.parse import FAMILIES, parse_mapping
from converter.mapping.rules import Layout, Mapping
from converter.mapping.shapes import Sizes, fits


@dataclass(frozen=True, slots=True)
class Match:
    """A layout that fits a checkpoint whose names carry `prefix`, and the tensors it was known by."""

    layout: Mapping | Layout
    prefix: str

    @property
    def evidence(self) -> list[str]:
        return [self.prefix + key for key in self.layout.recognise]


@cache
def names() -> tuple[str, ...]:
    """The names of all layouts that ship, hubs first."""
    found = [entry.name.removesuffix(".yaml") for entry in files("converter.mappings").iterdir()]
    layouts = [name for name in found if name.startswith(("deepencoder-", *(f"{family}-" for family in FAMILIES)))]
    return tuple(sorted(layouts, key=lambda name: (not name.startswith("deepencoder-"), name)))


def text(name: str) -> str:
    """The YAML of a layout that ships."""
    if name not in names():
        raise LayoutError(f"no layout is called {name!r}\nlayouts: {', '.join(names())}")
    return files("converter.mappings").joinpath(f"{name}.yaml").read_text(encoding="utf-8")


@cache
def load(name: str) -> Mapping | Layout:
    """A layout that ships."""
    return parse_mapping(text(name), f"{name}.yaml")


def load_file(path: Path) -> Mapping:
    """A user's own mapping file."""
    try:
        found = parse_mapping(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise MappingError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise MappingError(f"{path}: not UTF-8 text: not a mapping file") from error
    if isinstance(found, Layout):
        raise MappingError(f"{path}: describes a hub layout (`tensors`), not a mapping to it (`rules`)")
    return found


def hub(family: str) -> Layout:
    """The family's hub layout, the DeepEncoder's own."""
    layout = load(f"deepencoder-{family}")
    assert isinstance(layout, Layout)
    return layout


def mappings(family: str) -> list[Mapping]:
    """The family's mappings that ship. A file's name tells its family, so that only one family's are read."""
    found = (load(name) for name in names() if name.startswith(f"{family}-"))
    return [mapping for mapping in found if isinstance(mapping, Mapping)]


def layouts(family: str) -> list[Mapping | Layout]:
    """All that a checkpoint of the family can be recognised as."""
    return [hub(family), *mappings(family)]


def recognise(tensors: MappingABC[str, Tensor], layouts: Iterable[Mapping | Layout]) -> list[Match]:
    """The layouts that fit, each with the first of its prefixes that does."""
    return [match for match in (fit(tensors, layout) for layout in layouts) if match]


def fit(tensors: MappingABC[str, Tensor], layout: Mapping | Layout) -> Match | None:
    """The layout with the first of its prefixes under which all that it is recognised by is there, or None."""
    for prefix in layout.strip:
        sizes: Sizes = {}
        if all(
            prefix + key in tensors and fits(shape, tensors[prefix + key].shape, sizes)
            for key, shape in layout.recognise.items()
        ):
            return Match(layout, prefix)
    return None


@dataclass(frozen=True, slots=True)
class Nearest:
    """The mapping that comes closest to tensors that fit none, and where it first differs from them."""

    mapping: Mapping
    prefix: str
    unclaimed: list[str]
    unmatched: list[str]


def nearest(tensors: MappingABC[str, Tensor], candidates: list[Mapping]) -> Nearest | None:
    """The mapping whose rules claim most of the tensors and are used most, or None where all claim nothing."""
    best: Nearest | None = None
    best_score = 0.0
    for mapping in candidates:
        for prefix in mapping.strip:
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

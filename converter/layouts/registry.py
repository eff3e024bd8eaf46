"""Layouts by name: the mapping files that ship with this package, and those of users."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from converter.errors import LayoutError, MappingError
from converter.layouts.parse import parse_canonical, parse_layout, parse_signature, text_digest
from converter.layouts.spec import CanonicalLayout, LayoutMapping, LayoutSpec, Signature
from converter.layouts.yaml_tree import LARGEST, Tree, parse
from converter.storage.local_file import require_regular_file
from converter.tensors.tensor_info import TensorInfo

# What the names of canonical layouts begin with; all other names begin with the family.
_CANONICAL = "deepencoder-"
_EXAMPLE = "for an example, run: dsocr-convert mapping show clip-hf"


class LayoutEntry(NamedTuple):
    """A layout that a checkpoint may have; `load` parses its rules, which takes longer than its signature."""

    name: str
    signature: Signature
    load: Callable[[], LayoutSpec]


@cache
def layout_names() -> tuple[str, ...]:
    """The names of all layouts that ship, canonical ones first."""
    found = [file.name for file in files("converter.mappings").iterdir()]
    names = [name.removesuffix(".yaml") for name in found if name.endswith(".yaml")]
    return tuple(sorted(names, key=lambda name: (not name.startswith(_CANONICAL), name)))


def names_of_family(family: str) -> list[str]:
    """The names of a family's layouts, the canonical one first."""
    return [name for name in layout_names() if name.startswith(f"{family}-") or name == _CANONICAL + family]


def text(name: str) -> str:
    """The YAML of a layout that ships; LayoutError for unknown names."""
    if name not in layout_names():
        raise LayoutError(f"unknown layout {name!r}", f"layouts: {', '.join(layout_names())}")
    return (files("converter.mappings") / f"{name}.yaml").read_text(encoding="utf-8")


@cache
def _tree(name: str) -> Tree:
    return parse(text(name), f"{name}.yaml")


@cache
def load(name: str) -> LayoutSpec:
    """A layout that ships; LayoutError for unknown names."""
    if name in layout_names() and name.startswith(_CANONICAL):
        return canonical(name.removeprefix(_CANONICAL))
    return parse_layout(_tree(name), text_digest(text(name)))


@cache
def canonical(family: str) -> CanonicalLayout:
    """The canonical layout of a family; LayoutError for unknown families."""
    name = _CANONICAL + family
    return parse_canonical(_tree(name), text_digest(text(name)))


@cache
def families() -> tuple[str, ...]:
    """The families of layouts that ship, in the order of their encoders in the model."""
    layouts = [canonical(name.removeprefix(_CANONICAL)) for name in layout_names() if name.startswith(_CANONICAL)]
    return tuple(layout.family for layout in sorted(layouts, key=lambda layout: (layout.encoder_order, layout.name)))


def encoder_prefix(family: str) -> str:
    """The prefix of a family's encoder in DeepSeek-OCR's model."""
    return canonical(family).encoder_prefix


def read_file(path: Path) -> LayoutSpec:
    """Read a user's file, of a mapping or of a canonical layout; MappingError if it is not valid."""
    try:
        content = _text_of(path)
        tree = parse(content, str(path))
        spec = parse_layout(tree, text_digest(content))
        if not spec.is_canonical and spec.family not in families():
            family = tree.fields("a mapping file")["family"]
            raise family.error(f"expected one of the families {', '.join(families())}, found {spec.family!r}")
    except MappingError as error:
        raise MappingError(str(error), _EXAMPLE) from error
    return spec


def load_file(path: Path) -> LayoutMapping:
    """Read a user's mapping file; MappingError if it is not valid or describes a canonical layout."""
    spec = read_file(path)
    if spec.is_canonical:
        raise MappingError(f"{path}: describes a canonical layout (`tensors`), not a mapping to it (`rules`)", _EXAMPLE)
    return spec.mapping


def _text_of(path: Path) -> str:
    try:
        require_regular_file(path, MappingError)
        with path.open(encoding="utf-8") as file:
            # One character more than allowed is enough for the parser to refuse the file.
            return file.read(LARGEST + 1)
    except OSError as error:
        raise MappingError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise MappingError(f"{path}: not UTF-8 text: not a mapping file") from error


def schema() -> str:
    """The JSON Schema of mapping files."""
    return (files("converter.layouts") / "mapping.schema.json").read_text(encoding="utf-8")


def layouts_of(target: str) -> list[LayoutSpec]:
    """The layouts of a conversion record's target: those of all families for `deepencoder`, else the one named."""
    return [canonical(family) for family in families()] if target == "deepencoder" else [load(target)]


def mappings(family: str) -> list[LayoutMapping]:
    """The mappings of a family that ship."""
    return [spec.mapping for spec in map(load, names_of_family(family)) if not spec.is_canonical]


def entries(family: str) -> list[LayoutEntry]:
    """All layouts of a family that a checkpoint may have."""
    return [LayoutEntry(name, parse_signature(_tree(name)), partial(load, name)) for name in names_of_family(family)]


def entry_of(mapping: LayoutMapping) -> list[LayoutEntry]:
    """The one entry for a mapping that the user has chosen."""
    return [LayoutEntry(mapping.name, mapping.signature, lambda: mapping)]


def count_known(family: str, tensors: Mapping[str, TensorInfo]) -> int:
    """How many of the tensors have names of the family's canonical layout."""
    return sum(canonical(family).spec(name) is not None for name in tensors)

"""Loads layouts: those that ship with this package, by name, and those in mapping files of users."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from converter.errors import LayoutError, MappingError
from converter.layouts.parse import parse_layout, parse_mapping
from converter.layouts.spec import CanonicalLayout, LayoutMapping, LayoutSpec
from converter.layouts.yaml_tree import MAX_FILE_CHARS, parse
from converter.storage.local_file import require_regular_file

if TYPE_CHECKING:
    from importlib.abc import Traversable

# The prefix of the encoder in DeepSeek-OCR's checkpoint.
MODEL_PREFIX = "model."
# The prefix of canonical layouts' names. The names of all other layouts begin with the family.
_CANONICAL = "deepencoder-"
_EXAMPLE = "for an example, run: dsocr-convert mapping show clip-hf"


@cache
def _folder() -> Traversable:
    """The folder of mapping files: a part of the installed package, or next to the package in a checkout."""
    try:
        return files("converter.mappings")
    except ModuleNotFoundError:
        return Path(__file__).parents[2] / "mappings"


@cache
def layout_names() -> tuple[str, ...]:
    """Return the names of all layouts that ship, canonical ones first."""
    names = [file.name.removesuffix(".yaml") for file in _folder().iterdir() if file.name.endswith(".yaml")]
    return tuple(sorted(names, key=lambda name: (not name.startswith(_CANONICAL), name)))


def names_of_family(family: str) -> list[str]:
    """Return the names of a family's layouts, the canonical one first."""
    return [name for name in layout_names() if name.startswith(f"{family}-") or name == _CANONICAL + family]


def yaml_text(name: str) -> str:
    """Return the YAML of a layout that ships; LayoutError for unknown names."""
    if name not in layout_names():
        raise LayoutError(f"unknown layout {name!r}", f"layouts: {', '.join(layout_names())}")
    return _folder().joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def schema() -> str:
    """Return the JSON Schema of mapping files."""
    return (files("converter.layouts") / "mapping.schema.json").read_text(encoding="utf-8")


@cache
def load(name: str) -> LayoutSpec:
    """Return a layout that ships; LayoutError for unknown names."""
    return parse_mapping(yaml_text(name), f"{name}.yaml")


def layouts(family: str) -> list[LayoutSpec]:
    """Return all layouts of a family that ship, the canonical one first."""
    return [load(name) for name in names_of_family(family)]


def mappings(family: str) -> list[LayoutMapping]:
    """Return the mappings of a family that ship."""
    return [spec.mapping for spec in layouts(family) if not spec.is_canonical]


def find(family: str, name: str) -> LayoutSpec | None:
    """Return the layout of a family that has a name or an alias, or None."""
    if name in names_of_family(family):
        return load(name)
    return next((layout for layout in mappings(family) if name in layout.aliases), None)


def canonical(family: str) -> CanonicalLayout:
    """Return the canonical layout of a family; LayoutError for unknown families."""
    spec = load(_CANONICAL + family)
    assert isinstance(spec, CanonicalLayout)
    return spec


def encoder_prefix(family: str) -> str:
    """Return the prefix of a family's encoder in DeepSeek-OCR's model."""
    return canonical(family).encoder_prefix


def count_known(family: str, names: Iterable[str]) -> int:
    """Return how many of the names are in the family's canonical layout."""
    return sum(canonical(family).spec(name) is not None for name in names)


@cache
def families() -> tuple[str, ...]:
    """Return the families of layouts that ship, in the order of their encoders in the model."""
    canonicals = [canonical(name.removeprefix(_CANONICAL)) for name in layout_names() if name.startswith(_CANONICAL)]
    return tuple(layout.family for layout in sorted(canonicals, key=lambda layout: (layout.encoder_order, layout.name)))


def versions() -> list[list[str]]:
    """Return the families of each version of DeepSeek-OCR, such as [sam, clip], which differ in the last encoder."""
    last_order = max(canonical(family).encoder_order for family in families())
    shared = [family for family in families() if canonical(family).encoder_order < last_order]
    return [[*shared, family] for family in families() if family not in shared]


def read_layout_file(path: Path) -> LayoutSpec:
    """Read a user's YAML file of a mapping or of a canonical layout; MappingError if it is not valid."""
    try:
        require_regular_file(path, MappingError)
        with path.open(encoding="utf-8") as file:
            # One character more than allowed is enough for the parser to refuse the file.
            content = file.read(MAX_FILE_CHARS + 1)
        node = parse(content, str(path))
        spec = parse_layout(node, content)
        if not spec.is_canonical and spec.family not in families():
            family = node.as_dict("a mapping file")["family"]
            raise family.error(f"expected one of the families {', '.join(families())}, found {spec.family!r}")
    except OSError as error:
        raise MappingError(f"{path}: cannot be read: {error.strerror}", _EXAMPLE) from error
    except UnicodeDecodeError as error:
        raise MappingError(f"{path}: not UTF-8 text: not a mapping file", _EXAMPLE) from error
    except MappingError as error:
        raise MappingError(str(error), _EXAMPLE) from error
    return spec


def load_mapping_file(path: Path) -> LayoutMapping:
    """Read a user's mapping file; MappingError if it is not valid or describes a canonical layout."""
    spec = read_layout_file(path)
    if spec.is_canonical:
        raise MappingError(f"{path}: describes a canonical layout (`tensors`), not a mapping to it (`rules`)", _EXAMPLE)
    return spec.mapping

"""The mapping files that ship, and those that a user gives."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping as Mapping
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from converter.errors import LayoutError, MappingError
from converter.layouts.parse import FAMILIES, parse_mapping, parse_signature
from converter.layouts.spec import CanonicalLayout, LayoutMapping, Signature
from converter.layouts.yaml_tree import LARGEST
from converter.storage.local_file import require_regular_file
from converter.tensors.tensor_info import TensorInfo

_EXAMPLE = "read one that ships: dsocr-convert mapping show clip-hf"


class LayoutEntry(NamedTuple):
    """A layout that a checkpoint may have; `load` reads its rules, which takes longer than its signature."""

    name: str
    signature: Signature
    load: Callable[[], LayoutMapping | CanonicalLayout]


@cache
def layout_names() -> tuple[str, ...]:
    """The names of all layouts that ship, canonical ones first."""
    found = [path.stem for path in _folder().glob("*.yaml")]
    return tuple(sorted(found, key=lambda name: (not name.startswith("deepencoder-"), name)))


def names_of_family(family: str) -> list[str]:
    """The names of a family's layouts, the canonical one first."""
    return [name for name in layout_names() if name.startswith(f"{family}-") or name == f"deepencoder-{family}"]


def _folder() -> Path:
    """Where the mapping files are. `importlib.resources` would tell too, for 8 ms of imports at every start."""
    return Path(import_module("converter.mappings").__path__[0])


def text(name: str) -> str:
    """The YAML of a layout that ships; LayoutError where none is called so."""
    if name not in layout_names():
        raise LayoutError(f"no layout is called {name!r}", f"layouts: {', '.join(layout_names())}")
    return (_folder() / f"{name}.yaml").read_text(encoding="utf-8")


@cache
def load(name: str) -> LayoutMapping | CanonicalLayout:
    """A layout that ships; LayoutError where none is called so."""
    return parse_mapping(text(name), f"{name}.yaml")


def read_file(path: Path) -> LayoutMapping | CanonicalLayout:
    """A user's own file, of a mapping or of a canonical layout."""
    try:
        return parse_mapping(_text_of(path), str(path))
    except MappingError as error:
        raise MappingError(f"{error}", _EXAMPLE) from error


def load_file(path: Path) -> LayoutMapping:
    """A user's own mapping file; MappingError where it is none, or not a valid one."""
    found = read_file(path)
    if isinstance(found, CanonicalLayout):
        raise MappingError(
            f"{path}: describes a canonical layout (`tensors`), not a mapping to it (`rules`)", f"{_EXAMPLE}"
        )
    return found


def _text_of(path: Path) -> str:
    try:
        require_regular_file(path, MappingError)
        with path.open(encoding="utf-8") as file:
            # One more than is allowed, and so refused, however large the file.
            return file.read(LARGEST + 1)
    except OSError as error:
        raise MappingError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise MappingError(f"{path}: not UTF-8 text: not a mapping file") from error


def canonical(family: str) -> CanonicalLayout:
    """The family's canonical layout, the DeepEncoder's own."""
    layout = load(f"deepencoder-{family}")
    assert isinstance(layout, CanonicalLayout)
    return layout


def layouts_of(target: str) -> list[LayoutMapping | CanonicalLayout]:
    """The layouts of what a card calls its target: `deepencoder` is a whole one, of two."""
    return [canonical(family) for family in FAMILIES] if target == "deepencoder" else [load(target)]


def mappings(family: str) -> list[LayoutMapping]:
    """The family's mappings that ship."""
    return [found for found in map(load, names_of_family(family)) if isinstance(found, LayoutMapping)]


def entries(family: str) -> list[LayoutEntry]:
    """All that a checkpoint of the family can be recognised as."""
    signatures = {name: parse_signature(text(name), f"{name}.yaml") for name in names_of_family(family)}
    return [LayoutEntry(name, signature, partial(load, name)) for name, signature in signatures.items()]


def entry_of(mapping: LayoutMapping) -> list[LayoutEntry]:
    """A mapping that the user has chosen."""
    return [LayoutEntry(mapping.name, mapping.signature, lambda: mapping)]


def count_known(family: str, tensors: Mapping[str, TensorInfo]) -> int:
    """How many of the tensors have names of the family's canonical layout."""
    templates = [spec.name for spec in canonical(family).tensors]
    return sum(any(template.match(name) is not None for template in templates) for name in tensors)

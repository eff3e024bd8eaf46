"""Imports between packages go down, lazy ones included; docs/architecture.md names every package."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "converter"
# From the top of the picture in docs/architecture.md to the bottom. A package imports from lower rows, or from itself.
ROWS = (
    "cli",
    "api",
    "reports",
    "verification assembly comparison derivation",
    "output",
    "plan",
    "layouts",
    "checkpoint",
    "formats",
    "tensors encoders",
    "hub",
    "storage",
    "options",
    "errors",
)
DEPTH = {package: depth for depth, row in enumerate(ROWS) for package in row.split()}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, wherever the statement is."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in names)


def package(module: str) -> str:
    return module.split(".")[1]


# The package itself re-exports the API; anybody may import its version, and the command line its functions.
IMPORTS = [(a, b) for a, path in MODULES.items() for b in imported(path) if "." in a and "." in b]


def test_every_room_has_a_row() -> None:
    assert {package(module) for module in MODULES if "." in module} == DEPTH.keys()


def test_imports_go_down() -> None:
    wrong = [
        f"{a} imports {b}" for a, b in IMPORTS if package(a) != package(b) and DEPTH[package(a)] >= DEPTH[package(b)]
    ]
    assert not wrong


def test_no_two_modules_import_each_other() -> None:
    graph: dict[str, set[str]] = {}
    for a, b in IMPORTS:
        # A package contains the module, and may re-export it.
        if not a.startswith(f"{b}."):
            graph.setdefault(a, set()).add(b)
    graphlib.TopologicalSorter(graph).prepare()


def test_the_page_names_every_package_and_nothing_that_is_gone() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`([a-z_]+)(?:\.py|/)`", page))
    assert DEPTH.keys() <= named
    for path in re.findall(r"`([\w/*-]+(?:\.py|\.yaml|\.toml|\.json|/))`", page):
        places = (ROOT, PACKAGE, ROOT / "mappings")
        assert any(list(place.glob(path.rstrip("/"))) for place in places), path


def test_the_picture_shows_every_room() -> None:
    picture = (ROOT / "docs" / "architecture.svg").read_text()
    assert DEPTH.keys() <= {word.rstrip("/") for word in re.findall(r">([a-z_/]+)<", picture)}

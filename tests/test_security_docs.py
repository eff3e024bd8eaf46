"""The table of bounds in docs/security.md, held against the code."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = (ROOT / "docs" / "security.md").read_text()
BOUNDS = re.findall(r"^\| `([\w.]+)\.(\w+)` \| .+ \| ([0-9]+) \|$", DOCUMENT, re.MULTILINE)


@pytest.mark.parametrize(("module", "name", "value"), BOUNDS)
def test_a_bound_is_what_the_code_says(module: str, name: str, value: str) -> None:
    assert getattr(import_module(module), name) == int(value)


def test_the_places_that_are_named_exist() -> None:
    assert len(BOUNDS) >= 15
    (table,) = re.findall(r"\| guarantee .*?\n\n", DOCUMENT, re.DOTALL)
    for path in re.findall(r"`([\w/*]+(?:\.py|/))`", table):
        assert list((ROOT / "converter").glob(path)) or list((ROOT / "tests").glob(path)), path

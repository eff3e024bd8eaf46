"""YAML documents as trees that know their lines, so that errors name the line and what was expected there."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TypeVar

import yaml

from converter.errors import MappingError
from converter.layouts.spec import Place

# The C parser is ten times faster; PyYAML without libyaml has only the Python one.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Characters of a mapping file, and levels of nesting.
LARGEST = 1 << 20
_DEEPEST = 16
# torch's own limit.
MOST_DIMENSIONS = 64
# Keys of mapping files by their former names.
_RENAMED = {
    "strip": "prefix",
    "recognise": "detect",
    "beside": "other_rules",
    "elsewhere": "drop_rest",
    "beyond": "extra_tensors",
    "fill": "generate",
}

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Tree:
    """A node of a YAML document: a scalar, a list (`elements`), or a mapping (`entries`, pairs of key and value).

    The methods that return a value raise MappingError, with file and line, if the node is of another kind. Their
    parameter `what` names the expected value in the message.
    """

    place: Place
    scalar: str | None = None
    quoted: bool = False
    elements: list[Tree] | None = None
    entries: list[tuple[Tree, Tree]] | None = None

    def error(self, message: str) -> MappingError:
        """A MappingError with the file and line of this node."""
        return MappingError(f"{self.place}: {message}")

    @property
    def is_text(self) -> bool:
        return self.scalar is not None

    @property
    def is_map(self) -> bool:
        return self.entries is not None

    def text(self, what: str) -> str:
        """The scalar as written, without YAML's conversion to numbers or flags; an empty one must be quoted."""
        if self.scalar is None or not (self.scalar or self.quoted):
            raise self.error(f"expected {what}, found {self._kind()}")
        return self.scalar

    def items(self, what: str) -> list[Tree]:
        """The elements of a list."""
        if self.elements is None:
            raise self.error(f"expected {what}, found {self._kind()}")
        return self.elements

    def fields(self, what: str, allowed: Collection[str] | None = None) -> dict[str, Tree]:
        """The values of a mapping by key; keys that are repeated or not `allowed` are errors."""
        if self.entries is None:
            raise self.error(f"expected {what}, found {self._kind()}")
        values: dict[str, Tree] = {}
        for key_tree, value in self.entries:
            key = key_tree.text("a key")
            if allowed is not None and key not in allowed:
                raise key_tree.error(_unknown_key(key, allowed))
            if key in values:
                raise key_tree.error(f"duplicate key {key!r}")
            values[key] = value
        return values

    def words(self, what: str) -> list[str]:
        """One scalar, or a list of scalars."""
        return [self.text(what)] if self.is_text else [item.text(what) for item in self.items(what)]

    def flag(self) -> bool:
        """`true` or `false`; YAML's other spellings are errors."""
        text = self.text("true or false")
        if text not in ("true", "false"):
            raise self.error(f"expected true or false, found {text!r}")
        return text == "true"

    def number(self, what: str) -> int:
        """A whole number from 0 with at most nine digits."""
        text = self.text(what)
        # A leading zero would mean octal to some YAML parsers and decimal to others.
        if not re.fullmatch("0|[1-9][0-9]{0,8}", text):
            raise self.error(f"expected {what}, found {text!r}")
        return int(text)

    def numbers(self, what: str) -> tuple[int, ...]:
        """One number, or a list of at most as many numbers as a tensor can have dimensions."""
        items = [self] if self.is_text else self.items(what)
        if len(items) > MOST_DIMENSIONS:
            raise self.error(f"expected {what}, found {len(items)} numbers: no tensor has more than {MOST_DIMENSIONS}")
        return tuple(item.number(what) for item in items)

    def checked(self, make: Callable[[], T]) -> T:
        """Call `make` and turn its ValueError into a MappingError with this line."""
        try:
            return make()
        except ValueError as error:
            raise self.error(str(error)) from error

    def _kind(self) -> str:
        if self.scalar is not None:
            return repr(self.scalar) if self.scalar else "nothing"
        return "a mapping" if self.is_map else "a list"


def _unknown_key(key: str, allowed: Collection[str]) -> str:
    if _RENAMED.get(key) in allowed:
        return f"the key {key!r} is now called {_RENAMED[key]!r}"
    return f"unknown key {key!r}; expected one of {', '.join(sorted(allowed))}"


def parse(text: str, file: str) -> Tree:
    """Parse one plain YAML document and return its root; MappingError for anything else.

    Trees are built from the parser's events, and each event is checked first: a few lines of aliases can expand to a
    billion nodes, and libyaml's own composer overflows the stack on deep nesting.
    """
    if len(text) > LARGEST:
        raise MappingError(f"{file}: larger than {LARGEST} characters: not a mapping file")
    try:
        return _document(yaml.parse(text, Loader=_Loader), file)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = Place(file, mark.line + 1) if mark else file
        raise MappingError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error


def _document(events: Iterator[yaml.Event], file: str) -> Tree:
    next(events)
    if isinstance(next(events), yaml.StreamEndEvent):
        raise MappingError(f"{file}: empty")
    root = _build(next(events), events, file, 1)
    next(events)
    event = next(events)
    if not isinstance(event, yaml.StreamEndEvent):
        raise MappingError(f"{_place(event, file)}: expected one YAML document, found another one")
    return root


def _build(event: yaml.Event, events: Iterator[yaml.Event], file: str, depth: int) -> Tree:
    """Build the node that starts with `event`; the events of its children follow in `events`."""
    place = _place(event, file)
    if problem := _not_allowed(event, depth):
        raise MappingError(f"{place}: {problem}")
    if isinstance(event, yaml.ScalarEvent):
        return Tree(place, scalar=event.value, quoted=bool(event.style))
    children = []
    while not isinstance(child := next(events), yaml.CollectionEndEvent):
        children.append(_build(child, events, file, depth + 1))
    if isinstance(event, yaml.SequenceStartEvent):
        return Tree(place, elements=children)
    return Tree(place, entries=list(zip(children[::2], children[1::2], strict=True)))


def _not_allowed(event: yaml.Event, depth: int) -> str:
    if getattr(event, "anchor", None):
        return "YAML anchors and aliases are not allowed in a mapping file"
    if tag := getattr(event, "tag", None):
        return f"the YAML tag {tag!r} is not allowed in a mapping file"
    return "nested too deeply" if depth > _DEEPEST and isinstance(event, yaml.CollectionStartEvent) else ""


def _place(event: yaml.Event, file: str) -> Place:
    assert event.start_mark is not None
    return Place(file, event.start_mark.line + 1)

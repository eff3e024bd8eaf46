"""YAML documents as trees of nodes with line numbers, so that errors name the line and the expected value."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TypeVar

import yaml

from converter.errors import MappingError
from converter.layouts.spec import Location

# The C parser is ten times faster; PyYAML without libyaml has only the Python one.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MAX_FILE_CHARS = 1 << 20
# Levels of nesting.
_MAX_DEPTH = 16
# The limit of torch.
MAX_DIMS = 64
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
class YamlNode:
    """A node of a YAML document.

    The `as_...` methods raise MappingError with file and line if the node is of another kind. Their parameter `what`
    names the expected value in the message.
    """

    location: Location
    scalar: str | None = None  # The text of a scalar, else None
    quoted: bool = False  # Whether the scalar is quoted
    elements: list[YamlNode] | None = None  # The nodes of a list, else None
    entries: list[tuple[YamlNode, YamlNode]] | None = None  # Pairs of key and value of a mapping, else None

    def error(self, message: str) -> MappingError:
        """Return a MappingError with the file and line of this node."""
        return MappingError(f"{self.location}: {message}")

    @property
    def is_scalar(self) -> bool:
        return self.scalar is not None

    @property
    def is_map(self) -> bool:
        return self.entries is not None

    def as_str(self, what: str) -> str:
        """Return a scalar as written, without YAML's conversion to numbers or bools. An empty string must be quoted."""
        if self.scalar is None or not (self.scalar or self.quoted):
            raise self.error(f"expected {what}, found {self._describe()}")
        return self.scalar

    def as_list(self, what: str) -> list[YamlNode]:
        """Return the nodes of a list."""
        if self.elements is None:
            raise self.error(f"expected {what}, found {self._describe()}")
        return self.elements

    def as_dict(self, what: str, allowed: Collection[str] | None = None) -> dict[str, YamlNode]:
        """Return the values of a mapping by key. Repeated keys and keys that are not `allowed` are errors."""
        if self.entries is None:
            raise self.error(f"expected {what}, found {self._describe()}")
        values: dict[str, YamlNode] = {}
        for key_node, value in self.entries:
            key = key_node.as_str("a key")
            if allowed is not None and key not in allowed:
                raise key_node.error(_unknown_key(key, allowed))
            if key in values:
                raise key_node.error(f"duplicate key {key!r}")
            values[key] = value
        return values

    def as_str_list(self, what: str) -> list[str]:
        """Return a list of scalars. A single scalar is a list of one."""
        return [self.as_str(what)] if self.is_scalar else [item.as_str(what) for item in self.as_list(what)]

    def as_bool(self) -> bool:
        """Return the bool that `true` or `false` stands for. Other spellings of YAML are errors."""
        text = self.as_str("true or false")
        if text not in ("true", "false"):
            raise self.error(f"expected true or false, found {text!r}")
        return text == "true"

    def as_int(self, what: str) -> int:
        """Return an integer from 0 with at most nine digits."""
        text = self.as_str(what)
        # A leading zero would mean octal to some YAML parsers and decimal to others.
        if not re.fullmatch("0|[1-9][0-9]{0,8}", text):
            raise self.error(f"expected {what}, found {text!r}")
        return int(text)

    def as_str_or_number(self, what: str) -> str | int | float:
        """Return an integer or a finite float if the scalar is one, else its text."""
        text = self.as_str(what)
        if re.fullmatch("0|[1-9][0-9]{0,8}", text):
            return int(text)
        number = re.fullmatch(r"[0-9]+\.[0-9]+|[0-9]+(\.[0-9]+)?e-?[0-9]{1,2}", text)
        return float(text) if number and not self.quoted else text

    def as_int_tuple(self, what: str) -> tuple[int, ...]:
        """Return one integer, or a list of at most MAX_DIMS integers."""
        items = [self] if self.is_scalar else self.as_list(what)
        if len(items) > MAX_DIMS:
            raise self.error(f"expected {what}, found {len(items)} numbers: no tensor has more than {MAX_DIMS}")
        return tuple(item.as_int(what) for item in items)

    def checked(self, make: Callable[[], T]) -> T:
        """Call `make` and turn its ValueError into a MappingError with this line."""
        try:
            return make()
        except ValueError as error:
            raise self.error(str(error)) from error

    def _describe(self) -> str:
        if self.scalar is not None:
            return repr(self.scalar) if self.scalar else "nothing"
        return "a mapping" if self.is_map else "a list"


def _unknown_key(key: str, allowed: Collection[str]) -> str:
    if _RENAMED.get(key) in allowed:
        return f"the key {key!r} is now called {_RENAMED[key]!r}"
    return f"unknown key {key!r}; expected one of {', '.join(sorted(allowed))}"


def parse(text: str, file: str) -> YamlNode:
    """Parse one plain YAML document and return its root; MappingError for anything else.

    Trees are built from the parser's events, and each event is checked first: a few lines of aliases can expand to a
    billion nodes, and libyaml's own composer overflows the stack on deep nesting.
    """
    if len(text) > MAX_FILE_CHARS:
        raise MappingError(f"{file}: larger than {MAX_FILE_CHARS} characters: not a mapping file")
    try:
        return _document(yaml.parse(text, Loader=_Loader), file)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = Location(file, mark.line + 1) if mark else file
        raise MappingError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error


def _document(events: Iterator[yaml.Event], file: str) -> YamlNode:
    next(events)  # StreamStartEvent
    if isinstance(next(events), yaml.StreamEndEvent):  # Else DocumentStartEvent.
        raise MappingError(f"{file}: empty")
    root = _build(next(events), events, file, 1)
    next(events)  # DocumentEndEvent
    event = next(events)
    if not isinstance(event, yaml.StreamEndEvent):
        raise MappingError(f"{_location(event, file)}: expected one YAML document, found another one")
    return root


def _build(event: yaml.Event, events: Iterator[yaml.Event], file: str, depth: int) -> YamlNode:
    """Build the node that starts with `event`; the events of its children follow in `events`."""
    location = _location(event, file)
    if problem := _not_allowed(event, depth):
        raise MappingError(f"{location}: {problem}")
    if isinstance(event, yaml.ScalarEvent):
        return YamlNode(location, scalar=event.value, quoted=bool(event.style))
    children = []
    while not isinstance(child := next(events), yaml.CollectionEndEvent):
        children.append(_build(child, events, file, depth + 1))
    if isinstance(event, yaml.SequenceStartEvent):
        return YamlNode(location, elements=children)
    return YamlNode(location, entries=list(zip(children[::2], children[1::2], strict=True)))


def _not_allowed(event: yaml.Event, depth: int) -> str:
    if getattr(event, "anchor", None):
        return "YAML anchors and aliases are not allowed in a mapping file"
    if tag := getattr(event, "tag", None):
        return f"the YAML tag {tag!r} is not allowed in a mapping file"
    return "nested too deeply" if depth > _MAX_DEPTH and isinstance(event, yaml.CollectionStartEvent) else ""


def _location(event: yaml.Event, file: str) -> Location:
    assert event.start_mark is not None
    return Location(file, event.start_mark.line + 1)

"""YAML documents as trees of nodes with line numbers, so that errors name the line and the expected value."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple, TypeVar

import yaml

from converter.errors import MappingError
from converter.layouts.spec import Location

MAX_FILE_CHARS = 1 << 20
_MAX_DEPTH = 16  # Levels of nesting
MAX_DIMS = 64  # The limit of torch
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


class YamlNode(NamedTuple):
    """A node of a YAML document.

    The `as_...` methods raise MappingError with file and line if the node is of another kind. `what` describes the
    expected value in the message.
    """

    location: Location
    value: str | list[YamlNode] | tuple[tuple[YamlNode, YamlNode], ...]  # A scalar, a list, or pairs of key and value
    quoted: bool = False  # Whether it is a scalar in quotes

    def error(self, message: str) -> MappingError:
        """Return a MappingError with the file and line of this node."""
        return MappingError(f"{self.location}: {message}")

    def _expected(self, what: str) -> MappingError:
        found = "a list" if isinstance(self.value, list) else "a mapping"
        if self.is_scalar:
            found = repr(self.value) if self.value else "nothing"
        return self.error(f"expected {what}, found {found}")

    @property
    def is_scalar(self) -> bool:
        return isinstance(self.value, str)

    def as_str(self, what: str) -> str:
        """Return a scalar as written, without YAML's conversion to numbers or bools. An empty string must be quoted."""
        if not isinstance(self.value, str) or not (self.value or self.quoted):
            raise self._expected(what)
        return self.value

    def as_line(self, what: str) -> str:
        """Return a scalar with all whitespace as single spaces."""
        return " ".join(self.as_str(what).split())

    def as_list(self, what: str) -> list[YamlNode]:
        """Return the nodes of a list."""
        if not isinstance(self.value, list):
            raise self._expected(what)
        return self.value

    def as_dict(
        self, what: str, allowed: Collection[str] | None = None, required: Collection[str] = ()
    ) -> dict[str, YamlNode]:
        """Return the values of a mapping by key. Repeated, missing and unknown keys are errors.

        Args:
            what: The expected value, for messages.
            allowed: The known keys; None for any.
            required: The keys that must be present.
        """
        if not isinstance(self.value, tuple):
            raise self._expected(what)
        values: dict[str, YamlNode] = {}
        for key_node, value in self.value:
            key = key_node.as_str("a key")
            if allowed is not None and key not in allowed:
                if _RENAMED.get(key) in allowed:
                    raise key_node.error(f"the key {key!r} is now called {_RENAMED[key]!r}")
                raise key_node.error(f"unknown key {key!r}; expected one of {', '.join(sorted(allowed))}")
            if key in values:
                raise key_node.error(f"duplicate key {key!r}")
            values[key] = value
        for key in required:
            if key not in values:
                raise self.error(f"the key {key!r} is missing")
        return values

    def as_str_list(self, what: str) -> list[str]:
        """Return a list of scalars. A single scalar is a list of one."""
        return [self.as_str(what)] if self.is_scalar else [item.as_str(what) for item in self.as_list(what)]

    def as_bool(self) -> bool:
        """Return the bool of `true` or `false`. Other spellings, such as YAML's `yes`, are errors."""
        if self.as_str("true or false") not in ("true", "false"):
            raise self._expected("true or false")
        return self.value == "true"

    def as_int(self, what: str) -> int:
        """Return an integer of at most nine digits, which is not negative."""
        text = self.as_str(what)
        # A leading zero would mean octal to some YAML parsers and decimal to others.
        if not re.fullmatch("0|[1-9][0-9]{0,8}", text):
            raise self._expected(what)
        return int(text)

    def as_str_or_number(self, what: str) -> str | int | float:
        """Return an int or a finite float if the text of the scalar is one, else the text."""
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

    def checked(self, make: Callable[..., T], *args: object) -> T:
        """Call `make` and turn its ValueError into a MappingError with this line."""
        try:
            return make(*args)
        except ValueError as error:
            raise self.error(str(error)) from error


def parse(text: str, file: str) -> YamlNode:
    """Parse one plain YAML document and return its root; MappingError for anything else.

    Trees are built from the parser's events, and each event is checked first: a few lines of aliases can expand to a
    billion nodes, and libyaml's own composer overflows the stack on deep nesting.
    """
    if len(text) > MAX_FILE_CHARS:
        raise MappingError(f"{file}: larger than {MAX_FILE_CHARS} characters: not a mapping file")
    # The C parser is ten times faster; PyYAML without libyaml has only the Python one.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        events: Iterator[yaml.Event] = yaml.parse(text, Loader=loader)
        next(events)  # StreamStartEvent
        if isinstance(next(events), yaml.StreamEndEvent):  # Else DocumentStartEvent.
            raise MappingError(f"{file}: empty")
        root = _build(next(events), events, file, 1)
        next(events)  # DocumentEndEvent
        if not isinstance(event := next(events), yaml.StreamEndEvent):
            raise MappingError(f"{_location(event, file)}: expected one YAML document, found another one")
        return root
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = Location(file, mark.line + 1) if mark else file
        raise MappingError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error


def _build(event: yaml.Event, events: Iterator[yaml.Event], file: str, depth: int) -> YamlNode:
    """Build the node that starts with `event`; the events of its children follow in `events`."""
    location = _location(event, file)
    if getattr(event, "anchor", None):
        raise MappingError(f"{location}: YAML anchors and aliases are not allowed in a mapping file")
    if tag := getattr(event, "tag", None):
        raise MappingError(f"{location}: the YAML tag {tag!r} is not allowed in a mapping file")
    if isinstance(event, yaml.ScalarEvent):
        return YamlNode(location, event.value, quoted=bool(event.style))
    if depth > _MAX_DEPTH:
        raise MappingError(f"{location}: nested too deeply")
    children = []
    while not isinstance(child := next(events), yaml.CollectionEndEvent):
        children.append(_build(child, events, file, depth + 1))
    if isinstance(event, yaml.SequenceStartEvent):
        return YamlNode(location, children)
    return YamlNode(location, tuple(zip(children[::2], children[1::2], strict=True)))


def _location(event: yaml.Event, file: str) -> Location:
    assert event.start_mark is not None
    return Location(file, event.start_mark.line + 1)

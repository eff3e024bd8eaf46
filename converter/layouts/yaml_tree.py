"""YAML as a tree that remembers its lines, so that complaints name the line and what was expected there."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import TypeVar

import yaml

from converter.errors import MappingError
from converter.layouts.spec import Place

# The C parser is ten times as fast; a PyYAML built without libyaml has only the other.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
LARGEST = 1 << 20
_DEEPEST = 16
# torch's own limit.
_MOST_DIMENSIONS = 64

T = TypeVar("T")


class Tree:
    """One node of a YAML document; what reads it raises MappingError, with the line, where it is not as expected."""

    def __init__(self, node: yaml.Node, file: str) -> None:
        self._node = node
        self.place = Place(file, node.start_mark.line + 1)

    def fail(self, message: str) -> MappingError:
        """The error that `message` makes at this line."""
        return MappingError(f"{self.place}: {message}")

    @property
    def is_text(self) -> bool:
        return isinstance(self._node, yaml.ScalarNode)

    @property
    def is_map(self) -> bool:
        return isinstance(self._node, yaml.MappingNode)

    def text(self, what: str) -> str:
        """The scalar as it is written, whatever YAML would make of it; an empty one must be quoted."""
        if not isinstance(self._node, yaml.ScalarNode) or not (self._node.value or self._node.style):
            raise self.fail(f"expected {what}, found {self._kind()}")
        return str(self._node.value)

    def items(self, what: str) -> list[Tree]:
        """The elements of a list."""
        if not isinstance(self._node, yaml.SequenceNode):
            raise self.fail(f"expected {what}, found {self._kind()}")
        return [Tree(node, self.place.file) for node in self._node.value]

    def fields(self, what: str, allowed: Collection[str] | None = None) -> dict[str, Tree]:
        """The entries of a mapping, by key; unknown and repeated keys are errors."""
        if not isinstance(self._node, yaml.MappingNode):
            raise self.fail(f"expected {what}, found {self._kind()}")
        found: dict[str, Tree] = {}
        for key_node, value_node in self._node.value:
            key_tree = Tree(key_node, self.place.file)
            key = key_tree.text("a key")
            if allowed is not None and key not in allowed:
                raise key_tree.fail(f"unknown key {key!r}; expected one of {', '.join(sorted(allowed))}")
            if key in found:
                raise key_tree.fail(f"the key {key!r} stands here twice")
            found[key] = Tree(value_node, self.place.file)
        return found

    def words(self, what: str) -> list[str]:
        """One scalar, or a list of scalars."""
        return [self.text(what)] if self.is_text else [item.text(what) for item in self.items(what)]

    def flag(self) -> bool:
        """`true` or `false`, of which YAML has more spellings."""
        text = self.text("true or false")
        if text not in ("true", "false"):
            raise self.fail(f"expected true or false, found {text!r}")
        return text == "true"

    def number(self, what: str) -> int:
        """A number of nine digits at most, from 0."""
        text = self.text(what)
        # YAML's octal 010 would be eight to some, and ten to others.
        if not re.fullmatch("0|[1-9][0-9]{0,8}", text):
            raise self.fail(f"expected {what}, found {text!r}")
        return int(text)

    def numbers(self, what: str) -> tuple[int, ...]:
        """One number, or a list of numbers: no more than a tensor may have dimensions."""
        items = [self] if self.is_text else self.items(what)
        if len(items) > _MOST_DIMENSIONS:
            raise self.fail(f"expected {what}, found {len(items)} numbers: no tensor has more than {_MOST_DIMENSIONS}")
        return tuple(item.number(what) for item in items)

    def checked(self, make: Callable[[], T]) -> T:
        """`make()`, its ValueError told with this line."""
        try:
            return make()
        except ValueError as error:
            raise self.fail(str(error)) from error

    def _kind(self) -> str:
        if isinstance(self._node, yaml.ScalarNode):
            return f"{self._node.value!r}" if self._node.value else "nothing"
        return "a list" if isinstance(self._node, yaml.SequenceNode) else "a mapping"


def parse(text: str, file: str) -> Tree:
    """The document's root; MappingError for anything that is not one plain YAML document."""
    if len(text) > LARGEST:
        raise MappingError(f"{file}: larger than {LARGEST} characters: not a mapping file")
    try:
        _check_plain(text, file)
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = Place(file, mark.line + 1) if mark else file
        raise MappingError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if node is None:
        raise MappingError(f"{file}: empty")
    return Tree(node, file)


def _check_plain(text: str, file: str) -> None:
    """Refuse what a mapping file has no use for: tags, anchors, aliases, deep nesting.

    Asked of the parser's events, before nodes are made of them: a few lines of aliases can stand for a billion nodes,
    and libyaml's composer overflows the stack on deep nesting.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        problem = ""
        if getattr(event, "anchor", None):
            problem = "YAML anchors and aliases are not allowed in a mapping file"
        elif tag := getattr(event, "tag", None):
            problem = f"the YAML tag {tag!r} is not allowed in a mapping file"
        elif depth > _DEEPEST:
            problem = "nested too deeply"
        if problem:
            assert event.start_mark is not None
            raise MappingError(f"{Place(file, event.start_mark.line + 1)}: {problem}")

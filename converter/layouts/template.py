"""Tensor-name templates with typed variables, `layers.{layer}.self_attn.{proj}_proj.{param}`.

A template matches full names only, and has an exact inverse: filling it with the matched values gives the name again,
and matching a filled name gives the values again. Ambiguous templates are errors: two variables never touch, a segment
with an open-ended variable has no other, and at most one variable spans dots.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import NamedTuple

# Longer numbers than this are not layer indices, and Python's int() takes quadratic time on them.
_INT = "0|[1-9][0-9]{0,5}"
# Combinations of words in one segment that are compared with each other: more would only make a parser hang.
_MAX_READINGS = 1000
# Characters of a tensor's name, of a template, and of one of its words: nesting gives a few hundred at most, and longer
# ones could make matching take minutes.
MAX_NAME_CHARS, MAX_WORD_CHARS = 1000, 100
_FIELD = re.compile(r"\{([a-z][a-z_0-9]*)(?:([+-])([0-9]{1,3}))?\}")

# What a variable may stand for: "int" a layer index, "name" one segment, "path" one or more segments, or one of the
# listed words.
Kind = str | tuple[str, ...]
Bindings = dict[str, str]


class Field(NamedTuple):
    """A variable in a template; `{layer+1}` has offset 1: it matches 1 where the variable is 0."""

    name: str
    offset: int
    kind: Kind

    def choices(self, layers: int) -> tuple[str, ...]:
        """Return the values that the variable can have with a number of layers; none for open-ended variables."""
        if self.kind == "int":
            return tuple(map(str, range(layers - self.offset)))
        return self.kind if isinstance(self.kind, tuple) else ()


class Template:
    """A pattern for tensor names: literal text and fields in turn."""

    def __init__(self, parts: tuple[str | Field, ...]) -> None:
        self.parts = parts

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Template) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)

    def __repr__(self) -> str:
        return f"Template({self.text!r})"

    @classmethod
    def parse(cls, text: str, variables: Mapping[str, Kind]) -> Template:
        """Parse a template; ValueError for unknown variables and ambiguous templates."""
        if len(text) > MAX_NAME_CHARS:
            raise ValueError(f"{text[:20]!r}... has {len(text)} characters; the limit is {MAX_NAME_CHARS}")
        parts: list[str | Field] = []
        end = 0
        for found in _FIELD.finditer(text):
            parts.append(text[end : found.start()])
            name, sign, offset = found.groups()
            if name not in variables:
                raise ValueError(f"{text!r} uses the variable {name!r}, which `variables` does not list")
            if offset and variables[name] != "int":
                raise ValueError(f"{text!r} adds to {name!r}, which is not an int")
            parts.append(Field(name, int(sign + offset) if offset else 0, variables[name]))
            end = found.end()
        parts.append(text[end:])
        template = cls(tuple(parts))
        template._check(text)
        return template

    def _check(self, text: str) -> None:
        if any("{" in part or "}" in part for part in self.parts if isinstance(part, str)):
            raise ValueError(f"{text!r} has a brace that does not enclose a variable (write {{name}})")
        names = [field.name for field in self.fields]
        if len(set(names)) < len(names):
            raise ValueError(f"{text!r} uses a variable twice")
        for between in self.parts[2:-2:2]:
            if not isinstance(between, str) or not between.strip("0123456789"):
                raise ValueError(f"{text!r} has two variables with nothing but digits between them")
        if sum(field.kind == "path" for field in self.fields) > 1:
            raise ValueError(f"{text!r} has two variables that span dots")
        for segment in self._segments():
            _check_segment(segment, text)

    def _segments(self) -> list[list[str | Field]]:
        """Return the template split at its dots."""
        segments: list[list[str | Field]] = [[]]
        for part in self.parts:
            if isinstance(part, Field):
                segments[-1].append(part)
                continue
            first, *rest = part.split(".")
            segments[-1].append(first)
            segments.extend([[text] for text in rest])
        return segments

    @property
    def fields(self) -> tuple[Field, ...]:
        """The variables from left to right."""
        return tuple(part for part in self.parts if isinstance(part, Field))

    @cached_property
    def text(self) -> str:
        """The template as text."""
        return "".join(part if isinstance(part, str) else _written(part) for part in self.parts)

    @property
    def size(self) -> int:
        """Number of characters of the template and of all words of its variables."""
        words = (field.kind for field in self.fields if isinstance(field.kind, tuple))
        return len(self.text) + sum(len(word) for listed in words for word in listed)

    @cached_property
    def head(self) -> str:
        """The literal text before the first variable."""
        return next((part for part in self.parts if isinstance(part, str)), "")

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        # `name` and `path` cannot make it backtrack: each segment has at most one open-ended group.
        segments = [re.escape(part) if isinstance(part, str) else f"({_pattern(part.kind)})" for part in self.parts]
        return re.compile("".join(segments), re.DOTALL)

    def match(self, name: str) -> Bindings | None:
        """Return the values of the variables if the full name matches, or None.

        Names of more than MAX_NAME_CHARS never match.
        """
        # Most names fail at the first letters, and most templates never need their expression compiled.
        fits = name.startswith(self.head) and len(name) <= MAX_NAME_CHARS
        found = self._regex.fullmatch(name) if fits else None
        if found is None:
            return None
        bindings = {}
        for field, value in zip(self.fields, found.groups(), strict=True):
            if field.offset:
                if int(value) < field.offset:
                    return None
                value = str(int(value) - field.offset)
            bindings[field.name] = value
        return bindings

    def fill(self, bindings: Mapping[str, str]) -> str:
        """Return the name with these values; ValueError if an index would be negative."""
        return "".join(part if isinstance(part, str) else _filled(part, bindings[part.name]) for part in self.parts)

    def names(self, layers: int) -> Iterator[str]:
        """Yield all names that the template can match with a number of layers."""
        fields = self.fields
        for values in itertools.product(*(field.choices(layers) for field in fields)):
            yield self.fill({field.name: value for field, value in zip(fields, values, strict=True)})

    def bind(self, name: str, value: str) -> Template:
        """Return the template with one variable replaced by its value."""
        return self._rebuilt([value if isinstance(p, Field) and p.name == name else p for p in self.parts])

    def prefixed(self, prefix: str) -> Template:
        """Return the template with literal text before it."""
        return self._rebuilt([prefix, *self.parts])

    @staticmethod
    def _rebuilt(parts: list[str | Field]) -> Template:
        """Return a template of these parts, with adjacent literals joined so that literals and fields alternate."""
        joined: list[str | Field] = [""]
        for part in parts:
            last = joined[-1]
            if isinstance(part, Field):
                joined += [part, ""]
            elif isinstance(last, str):
                joined[-1] = last + part
        return Template(tuple(joined))


def any_match(templates: Iterable[Template], name: str) -> bool:
    """Return whether a full name matches one of the templates."""
    return any(template.match(name) is not None for template in templates)


def _written(field: Field) -> str:
    return f"{{{field.name}{field.offset:+d}}}" if field.offset else f"{{{field.name}}}"


def _filled(field: Field, value: str) -> str:
    if not field.offset:
        return value
    shifted = int(value) + field.offset
    if shifted < 0:
        raise ValueError(f"{_written(field)} is negative where {field.name} is {value}")
    return str(shifted)


def _pattern(kind: Kind) -> str:
    if isinstance(kind, tuple):
        return "|".join(re.escape(word) for word in sorted(kind, key=len, reverse=True))
    return {"int": _INT, "name": "[^.]+", "path": ".+"}[kind]


def _check_segment(segment: list[str | Field], text: str) -> None:
    fields = [part for part in segment if isinstance(part, Field)]
    if len(fields) < 2:
        return
    if any(field.kind in ("name", "path") for field in fields):
        raise ValueError(f"{text!r} has a variable next to one of kind name or path, with no dot between them")
    # Words and numbers in one segment: all combinations must differ. A 0 represents all numbers, which is wrong next to
    # several words that contain digits.
    listed = [field.kind for field in fields if isinstance(field.kind, tuple)]
    if 1 < len(listed) < len(fields) and any(re.search("[0-9]", word) for words in listed for word in words):
        raise ValueError(f"{text!r} has a number next to words with digits, with no dot between them")
    choices = [_choices(part) for part in segment]
    if math.prod(map(len, choices)) > _MAX_READINGS:
        raise ValueError(f"{text!r} has more than {_MAX_READINGS} combinations of words in one segment")
    readings = ["".join(words) for words in itertools.product(*choices)]
    if len(set(readings)) < len(readings):
        raise ValueError(f"{text!r} can match one name in two ways")


def _choices(part: str | Field) -> tuple[str, ...]:
    if isinstance(part, str):
        return (part,)
    return part.kind if isinstance(part.kind, tuple) else ("0",)

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
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

# The parser compares all combinations of words in one segment with each other. More would take too long.
_MAX_COMBINATIONS = 1000
# The limits for a tensor's name or a template, and for a word of a variable. Real names have at most a few hundred
# characters; longer ones could make matching take minutes.
MAX_NAME_CHARS, MAX_WORD_CHARS = 1000, 100

# What a variable matches: "int" an index, "name" one segment, "path" one or more segments, a tuple one of its words
Kind = str | tuple[str, ...]
Bindings = dict[str, str]


class Field(NamedTuple):
    """A variable in a template. `{layer+1}` has offset 1: it matches the text 1 if `layer` is 0."""

    name: str
    offset: int
    kind: Kind

    @property
    def text(self) -> str:
        """The variable as it is written in a template."""
        return f"{{{self.name}{self.offset:+d}}}" if self.offset else f"{{{self.name}}}"

    @property
    def pattern(self) -> str:
        """The regular expression of its values."""
        if isinstance(self.kind, tuple):
            return "|".join(re.escape(word) for word in sorted(self.kind, key=len, reverse=True))
        # Longer numbers are not layer indices, and Python's int() takes quadratic time on them.
        return {"int": "0|[1-9][0-9]{0,5}", "name": "[^.]+", "path": ".+"}[self.kind]

    def choices(self, layers: int) -> tuple[str, ...]:
        """Return the values that the variable can have in a model of so many layers; none for kinds name and path."""
        if self.kind == "int":
            return tuple(map(str, range(layers - self.offset)))
        return self.kind if isinstance(self.kind, tuple) else ()

    def fill(self, value: str) -> str:
        """Return the text for a value of the variable; ValueError if an index would be negative."""
        if not self.offset:
            return value
        shifted = int(value) + self.offset
        if shifted < 0:
            raise ValueError(f"{self.text} is negative where {self.name} is {value}")
        return str(shifted)


def _interleaved(literals: Iterable[str], values: Iterable[str]) -> str:
    """Join literals with a value between each two."""
    return "".join(itertools.chain.from_iterable(zip(literals, (*values, ""), strict=True)))


@dataclass(frozen=True)
class Template:
    """A pattern for tensor names: literals with a field between each two."""

    literals: tuple[str, ...]
    fields: tuple[Field, ...] = ()

    @classmethod
    def parse(cls, text: str, variables: Mapping[str, Kind]) -> Template:
        """Parse a template; ValueError for unknown variables and ambiguous templates."""
        if len(text) > MAX_NAME_CHARS:
            raise ValueError(f"{text[:20]!r}... has {len(text)} characters; the limit is {MAX_NAME_CHARS}")
        template = cls._split(text, variables)
        if any("{" in literal or "}" in literal for literal in template.literals):
            raise ValueError(f"{text!r} has a brace that does not enclose a variable (write {{name}})")
        if len({field.name for field in template.fields}) < len(template.fields):
            raise ValueError(f"{text!r} uses a variable twice")
        if not all(between.strip("0123456789") for between in template.literals[1:-1]):
            raise ValueError(f"{text!r} has two variables with nothing but digits between them")
        if sum(field.kind == "path" for field in template.fields) > 1:
            raise ValueError(f"{text!r} has two variables that span dots")
        for segment in text.split("."):
            if segment.count("{") > 1:
                cls._split(segment, variables)._check_segment(text)
        return template

    @classmethod
    def _split(cls, text: str, variables: Mapping[str, Kind]) -> Template:
        first, *rest = re.split(r"\{([a-z][a-z_0-9]*)([+-][0-9]{1,3})?\}", text)
        names, offsets, literals = rest[::3], rest[1::3], rest[2::3]
        for name, offset in zip(names, offsets, strict=True):
            if name not in variables:
                raise ValueError(f"{text!r} uses the variable {name!r}, which `variables` does not list")
            if offset and variables[name] != "int":
                raise ValueError(f"{text!r} adds to {name!r}, which is not an int")
        fields = (Field(name, int(offset or 0), variables[name]) for name, offset in zip(names, offsets, strict=True))
        return cls((first, *literals), tuple(fields))

    def _check_segment(self, text: str) -> None:
        """Raise ValueError if a segment with several variables is ambiguous; `text` is the whole template."""
        if any(field.kind in ("name", "path") for field in self.fields):
            raise ValueError(f"{text!r} has a variable next to one of kind name or path, with no dot between them")
        # All combinations of words and numbers must differ. A 0 represents all numbers, which is wrong next to several
        # variables whose words contain digits.
        words = [field.kind if isinstance(field.kind, tuple) else ("0",) for field in self.fields]
        lists = [field.kind for field in self.fields if isinstance(field.kind, tuple)]
        if 1 < len(lists) < len(words) and any(re.search("[0-9]", word) for kind in lists for word in kind):
            raise ValueError(f"{text!r} has a number next to words with digits, with no dot between them")
        num_combinations = math.prod(map(len, words))
        if num_combinations > _MAX_COMBINATIONS:
            raise ValueError(f"{text!r} has more than {_MAX_COMBINATIONS} combinations of words in one segment")
        if len({_interleaved(self.literals, chosen) for chosen in itertools.product(*words)}) < num_combinations:
            raise ValueError(f"{text!r} can match one name in two ways")

    @cached_property
    def text(self) -> str:
        """The template as text."""
        return _interleaved(self.literals, (field.text for field in self.fields))

    @property
    def size(self) -> int:
        """The number of characters of the template and of all words of its variables."""
        lists = (field.kind for field in self.fields if isinstance(field.kind, tuple))
        return len(self.text) + sum(len(word) for words in lists for word in words)

    @property
    def head(self) -> str:
        """The literal text before the first variable."""
        return self.literals[0]

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        # `name` and `path` cannot make it backtrack: each segment has at most one open-ended group.
        groups = (f"({field.pattern})" for field in self.fields)
        return re.compile(_interleaved(map(re.escape, self.literals), groups), re.DOTALL)

    def match(self, name: str) -> Bindings | None:
        """Return the values of the variables if the full name matches, or None.

        Names of more than MAX_NAME_CHARS never match.
        """
        # Most names already differ at the beginning or the end, so that most templates need no compiled expression.
        may_match = name.startswith(self.literals[0]) and name.endswith(self.literals[-1])
        match = self._regex.fullmatch(name) if may_match and len(name) <= MAX_NAME_CHARS else None
        if match is None:
            return None
        bindings = {}
        for field, value in zip(self.fields, match.groups(), strict=True):
            if field.offset:
                if int(value) < field.offset:
                    return None
                value = str(int(value) - field.offset)
            bindings[field.name] = value
        return bindings

    def fill(self, bindings: Mapping[str, str]) -> str:
        """Return the name with these values; ValueError if an index would be negative."""
        return _interleaved(self.literals, (field.fill(bindings[field.name]) for field in self.fields))

    def names(self, layers: int) -> Iterator[str]:
        """Yield all names that the template can match in a model of so many layers."""
        for values in itertools.product(*(field.choices(layers) for field in self.fields)):
            filled = (field.fill(value) for field, value in zip(self.fields, values, strict=True))
            yield _interleaved(self.literals, filled)

    def bind(self, name: str, value: str) -> Template:
        """Return the template with one variable replaced by its value."""
        i = [field.name for field in self.fields].index(name)
        literals, fields = list(self.literals), list(self.fields)
        literals[i : i + 2] = [literals[i] + value + literals[i + 1]]
        del fields[i]
        return Template(tuple(literals), tuple(fields))

    def prefixed(self, prefix: str) -> Template:
        """Return the template with literal text before it."""
        return Template((prefix + self.literals[0], *self.literals[1:]), self.fields)


def any_match(templates: Iterable[Template], name: str) -> bool:
    """Return whether a full name matches one of the templates."""
    return any(template.match(name) is not None for template in templates)

"""Merges rules for single tensors into rules with templates, such as an index for layers."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from converter.layouts.template import Kind, Template
from converter.tensors.ops import Op

_TOKEN = re.compile(r"\{[^}]*\}|[A-Za-z]+|[0-9]+")
_INDICES = ("layer", "i", "j", "k", "l")
# Usual names of variables, and the order of their words, by the words in alphabetical order.
_USUAL = {("bias", "weight"): ("param", ("weight", "bias")), ("k", "q", "v"): ("proj", ("q", "k", "v"))}

Variables = dict[str, Kind]


@dataclass(frozen=True, slots=True)
class DerivedRule:
    """A rule of a mapping file."""

    action: str  # The key of the rule: rename, fuse, split or drop
    source: str  # The template of the source
    target: str  # The template of the target; empty for a drop
    source_names: frozenset[str]  # All names that `source` matches
    target_names: frozenset[str]  # All names that `target` matches
    ops: tuple[Op, ...] = ()
    parts: tuple[str, tuple[str, ...]] | None = None  # The variable of a fuse or split, and its words in order
    optional: bool | str = False
    reason: str = ""


class _Gap(NamedTuple):
    """A word or number in a rule's source and target that a variable may replace, described by the text around it."""

    source: tuple[str, str]  # The text before and after it in the source
    target: tuple[str, str]  # The text before and after it in the target; empty for a drop
    offset: int  # The number in the target minus the number in the source; 0 for words
    is_index: bool  # Whether it is a number that is a whole segment of a name

    def with_variable(self, variable: str) -> tuple[str, str]:
        """Return source and target with a variable in the gap. Its value is the lower number of the two."""
        lower, higher = f"{{{variable}}}", f"{{{variable}+{abs(self.offset)}}}"
        source = (higher if self.offset < 0 else lower).join(self.source)
        return source, (higher if self.offset > 0 else lower).join(self.target) if any(self.target) else ""


def words_variable(words: Iterable[str], variables: Variables) -> str:
    """Return the variable for a list of words, added to `variables` if it is new."""
    key = tuple(sorted(words))
    usual, ordered = _USUAL.get(key, ("n" if all(map(str.isdigit, key)) else "part", key))
    names = itertools.chain((usual,), (f"{usual}_{i}" for i in itertools.count(2)))
    name = next(name for name in names if variables.get(name, ordered) == ordered)
    variables[name] = ordered
    return name


def list_parts(names: tuple[str, ...], variables: Variables) -> tuple[str, tuple[str, tuple[str, ...]]] | None:
    """Return the template of names that differ in one word, its variable and the words; None if they differ in more."""
    rows = [re.split("([^a-zA-Z0-9]+)", name) for name in names]
    head = len(common_start([row[:-1] for row in rows]))
    tail = len(common_start([row[:head:-1] for row in rows]))
    words = tuple("".join(row[head : len(row) - tail]) for row in rows)
    if any("." in word or not word for word in words) or len(set(words)) < len(words):
        return None
    name, first = words_variable(words, variables), rows[0]
    return "".join([*first[:head], f"{{{name}}}", *first[len(first) - tail :]]), (name, words)


def common_start(rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the words that all rows begin with."""
    return [column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))]


def generalise(rules: list[DerivedRule], variables: Variables) -> list[DerivedRule]:
    """Merge rules without matching other names. New variables are added to `variables`.

    Rules are merged if their names differ only in an index, or in one word that is the same in source and target.
    """
    merger = _Merger(rules, variables)
    while (merged := merger.merge_some(rules)) is not None:
        first = next(i for i, rule in enumerate(rules) if rule.source_names <= merged.source_names)
        rules = [rule for rule in rules if not rule.source_names <= merged.source_names]
        rules.insert(first, merged)
    return rules


class _Merger:
    """Merges rules while their templates match none of the other names."""

    def __init__(self, rules: list[DerivedRule], variables: Variables) -> None:
        self.variables = variables
        self.sources = [name for rule in rules for name in rule.source_names]
        self.targets = [name for rule in rules for name in rule.target_names]

    def merge_some(self, rules: list[DerivedRule]) -> DerivedRule | None:
        """Return a rule that replaces several, or None.

        Gaps for an index are tried first, then gaps in the last segment of names, then gaps that most rules have.
        """
        groups: dict[tuple[_Gap, object], dict[str, DerivedRule]] = defaultdict(dict)
        for rule in rules:
            for word, gap in _gaps(rule):
                groups[gap, (rule.action, rule.ops, rule.parts, rule.optional, rule.reason)][word] = rule
        several = [(gap, group) for (gap, _), group in groups.items() if len(group) > 1]
        several.sort(key=lambda item: (not item[0].is_index, "." in item[0].source[1], -len(item[1]), item[0]))
        return next((merged for gap, group in several if (merged := self._merge(gap, group)) is not None), None)

    def _merge(self, gap: _Gap, group: dict[str, DerivedRule]) -> DerivedRule | None:
        """Return one rule for a group of rules by their words in the gap, or None if it would match other names."""
        variables = dict(self.variables)
        if gap.is_index and max(map(int, group)) - min(map(int, group)) < len(group):
            # No number is missing: an index would also stand for the tensors of missing numbers.
            variable = next((name for name in _INDICES if f"{{{name}" not in "".join(gap.source)), "")
            variables[variable] = "int"
        elif gap.offset == 0:
            variable = words_variable(group, variables)
        else:
            return None
        source, target = gap.with_variable(variable)
        source_names = frozenset(name for rule in group.values() for name in rule.source_names)
        target_names = frozenset(name for rule in group.values() for name in rule.target_names)
        try:
            matched = _matching(source, self.sources, variables), _matching(target, self.targets, variables)
        except ValueError:
            return None
        if matched != (source_names, target_names):
            return None
        self.variables.update(variables)
        return replace(
            next(iter(group.values())),
            source=source,
            target=target,
            source_names=source_names,
            target_names=target_names,
        )


def _matching(text: str, names: Iterable[str], variables: Variables) -> frozenset[str]:
    template = Template.parse(text, variables)
    return frozenset(name for name in names if template.match(name) is not None)


def _gaps(rule: DerivedRule) -> Iterator[tuple[str, _Gap]]:
    """Yield each word or number of the source that may vary, with its gap.

    In a drop, only indices and the last segment may vary, so that each dropped module is named.
    """
    for word, source in _words(rule.source):
        if not rule.target and (_is_segment(word, source) or "." not in source[1]):
            yield word, _Gap(source, ("", ""), 0, _is_segment(word, source))
        for other, target in _words(rule.target):
            if word.isdigit() and other.isdigit():
                # A number within a word on both sides belongs to that word.
                is_index = _is_segment(word, source) or _is_segment(other, target)
                yield word, _Gap(source, target, int(other) - int(word), is_index)
            elif word == other:
                yield word, _Gap(source, target, 0, False)


def _words(text: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield the words and numbers of a template outside its variables, with the text before and after each."""
    for found in _TOKEN.finditer(text):
        if found[0][0] != "{":
            yield found[0], (text[: found.start()], text[found.end() :])


def _is_segment(word: str, around: tuple[str, str]) -> bool:
    return word.isdigit() and around[0][-1:] in ("", ".") and around[1][:1] == "."

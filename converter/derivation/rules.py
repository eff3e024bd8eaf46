"""Merges rules for single tensors into rules with templates, such as an index for layers."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

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

    action: str  # The key of the rule: rename, fuse or split
    source: str  # The template of the source
    target: str  # The template of the target
    source_names: frozenset[str]  # All names that `source` matches
    target_names: frozenset[str]  # All names that `target` matches
    ops: tuple[Op, ...]
    parts: tuple[str, tuple[str, ...]] | None  # The variable of a fuse or split, and its words in order
    optional: bool | str


@dataclass(frozen=True, slots=True, order=True)
class _Gap:
    """A word or number in a rule's source and target that a variable may replace, described by the text around it."""

    source: tuple[str, str]  # The text before and after it in the source
    target: tuple[str, str]  # The text before and after it in the target
    offset: int  # The number in the target minus the number in the source; 0 for words
    is_index: bool  # Whether it is a number that is a whole segment of a name

    def with_variable(self, variable: str) -> tuple[str, str]:
        """Return source and target with a variable in the gap. Its value is the lower number of the two."""
        lower, higher = f"{{{variable}}}", f"{{{variable}+{abs(self.offset)}}}"
        source = (higher if self.offset < 0 else lower).join(self.source)
        return source, (higher if self.offset > 0 else lower).join(self.target)


# Rules that differ in nothing but a gap, by the word in it.
Group = dict[str, DerivedRule]


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


def generalise(rules: list[DerivedRule], names: list[str], variables: Variables) -> list[DerivedRule]:
    """Merge rules whose names differ only in an index, or in one word that is the same in source and target.

    Args:
        rules: The rules.
        names: All names that the rules apply to. A merged rule matches those of the rules that it replaces.
        variables: The variables of the rules; new ones are added.
    """
    targets = [name for rule in rules for name in rule.target_names]
    while True:
        merges = (_merge(gap, group, variables) for gap, group in _groups(rules))
        exact = ((rule, known) for rule, known in filter(None, merges) if _is_exact(rule, names, targets, known))
        merged, known = next(exact, (None, variables))
        if merged is None:
            return rules
        variables.update(known)
        first = next(i for i, rule in enumerate(rules) if rule.source_names <= merged.source_names)
        rules = [rule for rule in rules if not rule.source_names <= merged.source_names]
        rules.insert(first, merged)


def _groups(rules: list[DerivedRule]) -> list[tuple[_Gap, Group]]:
    """Return groups of rules that differ only in a gap.

    Gaps for an index come first, then gaps in the last segment of names, then gaps that most rules have.
    """
    groups: dict[tuple[_Gap, object], Group] = defaultdict(dict)
    for rule in rules:
        for word, gap in _gaps(rule):
            groups[gap, (rule.action, rule.ops, rule.parts, rule.optional)][word] = rule
    several = [(gap, group) for (gap, _), group in groups.items() if len(group) > 1]
    return sorted(several, key=lambda item: (not item[0].is_index, "." in item[0].source[1], -len(item[1]), item[0]))


def _merge(gap: _Gap, group: Group, variables: Variables) -> tuple[DerivedRule, Variables] | None:
    """Return one rule for a group of rules, and the variables with that of the gap; None if no variable fits."""
    known = dict(variables)
    if gap.is_index and max(map(int, group)) - min(map(int, group)) < len(group):
        # No number is missing: an index would also stand for the tensors of missing numbers.
        variable = next((name for name in _INDICES if f"{{{name}" not in "".join(gap.source)), "")
        known[variable] = "int"
    elif gap.offset == 0:
        variable = words_variable(group, known)
    else:
        return None
    source, target = gap.with_variable(variable)
    sources = frozenset(name for rule in group.values() for name in rule.source_names)
    targets = frozenset(name for rule in group.values() for name in rule.target_names)
    first = next(iter(group.values()))
    return replace(first, source=source, target=target, source_names=sources, target_names=targets), known


def _is_exact(rule: DerivedRule, sources: list[str], targets: list[str], variables: Variables) -> bool:
    """Return whether the templates of a rule are valid, and match no other names than its own."""
    for text, names, own in ((rule.source, sources, rule.source_names), (rule.target, targets, rule.target_names)):
        try:
            template = Template.parse(text, variables)
        except ValueError:
            return False
        if {name for name in names if template.match(name) is not None} != own:
            return False
    return True


def _gaps(rule: DerivedRule) -> Iterator[tuple[str, _Gap]]:
    """Yield each word or number of the source that may vary, with its gap."""
    for (word, source), (other, target) in itertools.product(_words(rule.source), _words(rule.target)):
        if word.isdigit() and other.isdigit():
            # A number between letters is part of their word.
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

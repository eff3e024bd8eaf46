"""Merges rules for single tensors into rules with templates, such as an index for layers."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from converter.layouts.template import Kind, Template

_INDICES = ("layer", "i", "j", "k", "l")
# Usual names of variables, and the order of their words, by the words in alphabetical order.
_USUAL = {("bias", "weight"): ("param", ("weight", "bias")), ("k", "q", "v"): ("proj", ("q", "k", "v"))}

Variables = dict[str, Kind]


class DerivedRule(NamedTuple):
    """A rule of a mapping file."""

    action: str  # The key of the rule: rename, fuse or split
    source: str  # The template of the source
    target: str  # The template of the target
    source_names: frozenset[str]  # All names that `source` matches
    target_names: frozenset[str]  # All names that `target` matches
    options: dict[str, Any]  # The other keys of the rule: parts, dim, then, optional

    def item(self, prefix: str) -> dict[str, Any]:
        """Return the rule as an item of `rules`, where source names lack the prefix."""
        source = self.source.removeprefix(prefix)
        if self.action == "rename" and source == self.target:
            return {"keep": source, **self.options}
        return {self.action: source, "to" if self.action == "rename" else "into": self.target, **self.options}


class _Gap(NamedTuple):
    """A word or number in a rule's source and target that a variable may replace, described by the text around it."""

    source: tuple[str, str]  # The text before and after it in the source
    target: tuple[str, str]  # The text before and after it in the target
    offset: int  # The number in the target minus the number in the source; 0 for words
    is_index: bool  # Whether it is a number that is a whole segment of a name


def words_variable(words: Iterable[str], variables: Variables) -> str:
    """Return the variable for a list of words, added to `variables` if it is new."""
    key = tuple(sorted(words))
    usual, ordered = _USUAL.get(key, ("n" if all(map(str.isdigit, key)) else "part", key))
    names = itertools.chain((usual,), (f"{usual}_{i}" for i in itertools.count(2)))
    name = next(name for name in names if variables.get(name, ordered) == ordered)
    variables[name] = ordered
    return name


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
        exact = ((rule, known) for rule, known in merges if _is_exact(rule, names, targets, known))
        merged, known = next(exact, (None, variables))
        if merged is None:
            return rules
        variables.update(known)
        first = next(i for i, rule in enumerate(rules) if rule.source_names <= merged.source_names)
        rules = [rule for rule in rules if not rule.source_names <= merged.source_names]
        rules.insert(first, merged)


def _groups(rules: list[DerivedRule]) -> list[tuple[_Gap, dict[str, DerivedRule]]]:
    """Return groups of rules that differ only in a gap.

    Gaps for an index come first, then gaps in the last segment of names, then gaps that most rules have.
    """
    groups: dict[tuple[_Gap, str, str], dict[str, DerivedRule]] = defaultdict(dict)
    for rule in rules:
        for word, gap in _gaps(rule):
            groups[gap, rule.action, str(rule.options)][word] = rule
    several = [(gap, group) for (gap, *_), group in groups.items() if len(group) > 1]
    return sorted(several, key=lambda item: (not item[0].is_index, "." in item[0].source[1], -len(item[1]), item[0]))


def _merge(gap: _Gap, group: dict[str, DerivedRule], variables: Variables) -> tuple[DerivedRule, Variables]:
    """Return one rule for a group, and the variables with that of the gap; its templates are invalid if none fits."""
    known, variable = dict(variables), ""
    if gap.is_index and max(map(int, group)) - min(map(int, group)) < len(group):
        # No number is missing: an index would also stand for the tensors of missing numbers.
        variable = next((name for name in _INDICES if f"{{{name}" not in "".join(gap.source)), "")
        known[variable] = "int"
    elif gap.offset == 0:
        variable = words_variable(group, known)
    # The value of the variable is the lower number of the two.
    lower, higher = f"{{{variable}}}", f"{{{variable}+{abs(gap.offset)}}}"
    first, *others = group.values()
    merged = first._replace(
        source=(higher if gap.offset < 0 else lower).join(gap.source),
        target=(higher if gap.offset > 0 else lower).join(gap.target),
        source_names=first.source_names.union(*(rule.source_names for rule in others)),
        target_names=first.target_names.union(*(rule.target_names for rule in others)),
    )
    return merged, known


def _is_exact(rule: DerivedRule, sources: list[str], targets: list[str], variables: Variables) -> bool:
    """Return whether the templates of a rule are valid, and match no other names than its own."""
    try:
        templates = [Template.parse(text, variables) for text in (rule.source, rule.target)]
    except ValueError:
        return False
    sides = zip(templates, (sources, targets), strict=True)
    matched = [{name for name in names if template.match(name) is not None} for template, names in sides]
    return matched == [rule.source_names, rule.target_names]


def _gaps(rule: DerivedRule) -> Iterator[tuple[str, _Gap]]:
    """Yield each word or number of the source that may vary, with its gap."""
    for (word, source), (other, target) in itertools.product(_words(rule.source), _words(rule.target)):
        if word.isdigit() and other.isdigit():
            # A number between letters is part of their word.
            is_index = any(start[-1:] in ("", ".") and end[:1] == "." for start, end in (source, target))
            yield word, _Gap(source, target, int(other) - int(word), is_index)
        elif word == other:
            yield word, _Gap(source, target, 0, False)


def _words(text: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield the words and numbers of a template outside its variables, with the text before and after each."""
    for found in re.finditer(r"\{[^}]*\}|[A-Za-z]+|[0-9]+", text):
        if found[0][0] != "{":
            yield found[0], (text[: found.start()], text[found.end() :])

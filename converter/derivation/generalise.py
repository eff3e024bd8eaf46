"""From pairs of names to the few rules with templates that a person would write for them."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from converter.layouts.template import Kind, Template
from converter.tensors.ops import Op

_NUMBER = re.compile(r"(?<![0-9])[0-9]{1,6}(?![0-9])")
# The names of variables, in the order in which they are taken.
_INTS = ("i", "j", "k", "l", "x", "y", "z")
_NUMBERS = ("n", "m")
_RESERVED = ("layer", "rest")
_ORDER = {("bias", "weight"): ("weight", "bias"), ("k", "q", "v"): ("q", "k", "v")}
# Of numbers within a word (norm1, norm2) so many are listed; more are an index.
_MOST_LISTED = 4


class Entry(NamedTuple):
    """One rule for the names it covers: at first one source and target each, then templates for many.

    `verb` is what a mapping file calls it, `parts` a fuse's or split's variable and its words in order. `covers` are
    the sources' names, `gives` the targets'. A drop has an empty target, and a `reason`.
    """

    verb: str
    source: str
    target: str
    covers: frozenset[str]
    gives: frozenset[str]
    ops: tuple[Op, ...] = ()
    parts: tuple[str, tuple[str, ...]] | None = None
    optional: str = ""
    notes: frozenset[str] = frozenset()
    reason: str = ""

    @property
    def kind(self) -> tuple[object, ...]:
        """What entries that become one rule have in common."""
        return self.verb, self.ops, self.parts, self.optional, self.reason


class Variables:
    """The variables that templates use, declared once for all of them."""

    def __init__(self) -> None:
        self.kinds: dict[str, Kind] = {}

    def number(self, usual: str, within: Collection[str]) -> str:
        """The variable for an index, of no name in `within`."""
        name = next(name for name in (usual, *_INTS) if name not in within)
        self.kinds[name] = "int"
        return name

    def words(self, words: Iterable[str], within: Collection[str] = ()) -> str:
        """The variable for some words, of no name in `within`."""
        kind = tuple(sorted(words))
        held = (name for name, words in self.kinds.items() if isinstance(words, tuple) and tuple(sorted(words)) == kind)
        known = next((name for name in held if name not in within), None)
        if known:
            return known
        initials = tuple(sorted(word[:1] for word in kind))
        usual = "param" if kind == ("bias", "weight") else "proj" if initials == ("k", "q", "v") else None
        kind = _ORDER.get(kind, kind)
        numbers = all(word.isdigit() for word in kind)
        names = (*_NUMBERS, "number") if numbers else (usual or "part",)
        later = (f"{names[-1]}_{i}" for i in itertools.count(2))
        taken = {*self.kinds, *_INTS, *_RESERVED}
        name = next(new for new in itertools.chain(names, later) if new not in taken)
        self.kinds[name] = kind
        return name


def listed(names: tuple[str, ...], variables: Variables) -> tuple[str, str, tuple[str, ...]] | None:
    """Names that differ in one part as template, variable and words; None where they differ in more."""
    # Whole words and numbers, and at least one of each name's.
    rows = [re.split("([^a-zA-Z0-9]+)", name) for name in names]
    head = _common([row[:-1] for row in rows])
    tail = _common([row[:head:-1] for row in rows])
    words = tuple("".join(row[head : len(row) - tail]) for row in rows)
    if any("." in word or not word for word in words) or len(set(words)) < len(words):
        return None
    name = variables.words(words)
    first = rows[0]
    return "".join([*first[:head], f"{{{name}}}", *first[len(first) - tail :]]), name, words


def _common(rows: list[list[str]]) -> int:
    """How many words rows have in common at their beginning."""
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    return sum(1 for _ in same)


def generalised(entries: list[Entry], variables: Variables) -> list[Entry]:
    """The fewest rules, of the kinds a person writes, that cover the same names."""
    work = _Generaliser(entries, variables)
    return work.words(work.numbers(work.subtrees(entries)))


class _Generaliser:
    """Templates are made wider only while they match no other name, in either direction."""

    def __init__(self, entries: list[Entry], variables: Variables) -> None:
        self.variables = variables
        self.sources = frozenset(name for entry in entries for name in entry.covers)
        self.targets = frozenset(name for entry in entries for name in entry.gives)

    def subtrees(self, entries: list[Entry]) -> list[Entry]:
        """Whole modules whose inner names stay the same, as one entry each: `blocks.{rest}`."""
        result = list(entries)
        prefixes = {name[: dot.end()] for name in self.sources for dot in re.finditer(r"\.", name)}
        for prefix in sorted(prefixes, key=lambda text: (text.count("."), text)):
            inside = [entry for entry in result if any(name.startswith(prefix) for name in entry.covers)]
            merged = self._subtree(prefix, inside)
            if merged is not None:
                result = [entry for entry in result if entry not in inside] + [merged]
        return result

    def _subtree(self, prefix: str, inside: list[Entry]) -> Entry | None:
        rests = {entry.source.removeprefix(prefix) for entry in inside}
        # Of a weight and a bias a person lists both.
        if len(inside) < 2 or not (any("." in rest for rest in rests) or len(rests) > 2):
            return None
        if any(entry.verb not in ("rename", "drop") or entry.ops or "{" in entry.source for entry in inside):
            return None
        if len({(entry.verb == "drop", entry.reason) for entry in inside}) > 1:
            return None
        first = inside[0]
        head = first.target.removesuffix(first.source.removeprefix(prefix))
        if first.verb != "drop":
            ours = {name for entry in inside for name in entry.gives}
            same = all(entry.target == head + entry.source.removeprefix(prefix) for entry in inside)
            if not same or not head.endswith(".") or {name for name in self.targets if name.startswith(head)} != ours:
                return None
        self.variables.kinds["rest"] = "path"
        return _merged(inside, prefix + "{rest}", head and head + "{rest}")

    def numbers(self, entries: list[Entry]) -> list[Entry]:
        """Entries that differ in numbers alone, with indices for them."""
        groups: dict[tuple[object, ...], list[Entry]] = defaultdict(list)
        for entry in entries:
            groups[_NUMBER.sub("#", entry.source), _NUMBER.sub("#", entry.target), entry.kind].append(entry)
        return [made for group in groups.values() for made in self._numbered(group)]

    def _numbered(self, group: list[Entry]) -> Iterator[Entry]:
        """One entry for all of a group, or for as many as one will do."""
        if len(group) == 1:
            yield group[0]
            return
        sources = [_numbers(entry.source) for entry in group]
        targets = [_numbers(entry.target) for entry in group]
        fields = _aligned(sources, targets) if group[0].target else [(i, -1, 0) for i in _varying(sources)]
        if fields is not None:
            merged = self._exact(group, *self._with_indices(group, sources, fields))
            if merged is not None:
                yield merged
                return
        # Too wide for one rule: one for each value of a number.
        side, at = next(((sources, i) for i in reversed(_varying(sources))), (targets, 0))
        parts: dict[int, list[Entry]] = defaultdict(list)
        for entry, numbers in zip(group, side, strict=True):
            parts[numbers[at]].append(entry)
        for part in parts.values():
            yield from self._numbered(part)

    def _with_indices(
        self, group: list[Entry], sources: list[tuple[int, ...]], fields: list[tuple[int, int, int]]
    ) -> tuple[str, str]:
        """Source and target of a group with variables for those numbers that differ."""
        source, target = group[0].source, group[0].target
        in_source: dict[int, str] = {}
        in_target: dict[int, str] = {}
        used = fields_of(source)
        for i, j, offset in fields:
            values = {str(numbers[i]) for numbers in sources}
            if not offset and _is_listed(source, i, values):
                name = self.variables.words(values, used)
            else:
                alone = _stands_alone(source, i) or (j >= 0 and _stands_alone(target, j))
                name = self.variables.number("layer" if alone else "i", used)
            used.add(name)
            # The variable is what the lower of both sides has.
            in_source[i] = f"{{{name}{-offset:+d}}}" if offset < 0 else f"{{{name}}}"
            in_target[j] = f"{{{name}{offset:+d}}}" if offset > 0 else f"{{{name}}}"
        return _replaced(source, in_source), _replaced(target, in_target)

    def words(self, entries: list[Entry]) -> list[Entry]:
        """Entries that differ in one word alone, the same on both sides, with a variable for it; repeated."""
        while True:
            groups: dict[tuple[object, ...], list[tuple[str, Entry]]] = defaultdict(list)
            for entry in entries:
                for rank, word, source, target in _gaps(entry):
                    groups[entry.kind, rank, source, target].append((word, entry))
            # The last words first (weight, bias), then whichever covers most.
            order = sorted(groups, key=lambda key: (-len(groups[key]), key[1], key[2]))
            order.sort(key=lambda key: key[1] != 0)
            merged = next((made for key in order if (made := self._worded(key, groups[key]))), None)
            if merged is None:
                return entries
            entries = [entry for entry in entries if not entry.covers <= merged.covers] + [merged]

    def _worded(self, key: tuple[object, ...], group: list[tuple[str, Entry]]) -> Entry | None:
        words = [word for word, _ in group]
        _, _, source, target = key
        if len(group) < 2 or len(set(words)) < len(words):
            return None
        assert isinstance(source, str) and isinstance(target, str)
        name = f"{{{self.variables.words(words, fields_of(source))}}}"
        return self._exact([entry for _, entry in group], source.replace("\0", name), target.replace("\0", name))

    def _exact(self, group: list[Entry], source: str, target: str) -> Entry | None:
        """The entries as one, if its templates match their names and no others."""
        merged = _merged(group, source, target)
        try:
            ours = _matches(source, self.sources, self.variables.kinds)
            theirs = _matches(target, self.targets, self.variables.kinds) if target else merged.gives
        except ValueError:
            return None
        return merged if (ours, theirs) == (merged.covers, merged.gives) else None


def _matches(text: str, names: Iterable[str], kinds: dict[str, Kind]) -> frozenset[str]:
    template = Template.parse(text, kinds)
    return frozenset(name for name in names if template.match(name) is not None)


def _merged(group: list[Entry], source: str, target: str) -> Entry:
    return group[0]._replace(
        source=source,
        target=target,
        covers=frozenset(name for entry in group for name in entry.covers),
        gives=frozenset(name for entry in group for name in entry.gives),
        notes=frozenset(note for entry in group for note in entry.notes),
        # As soon as one must be there, the rule must match.
        optional=min((entry.optional for entry in group), key=bool),
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, _NUMBER.findall(text)))


def _varying(rows: list[tuple[int, ...]]) -> list[int]:
    return [i for i, column in enumerate(zip(*rows, strict=True)) if len(set(column)) > 1]


def _aligned(sources: list[tuple[int, ...]], targets: list[tuple[int, ...]]) -> list[tuple[int, int, int]] | None:
    """Which number of a source is which of its target, and how much higher; None where some are not told by any."""
    ours, theirs = _varying(sources), _varying(targets)
    fields = []
    for i in ours:
        for j in theirs:
            offsets = {target[j] - source[i] for source, target in zip(sources, targets, strict=True)}
            if len(offsets) == 1:
                fields.append((i, j, offsets.pop()))
                theirs.remove(j)
                break
    return fields if len(fields) == len(ours) and not theirs else None


def _is_listed(text: str, nth: int, values: set[str]) -> bool:
    """Whether a number tells a few things apart (norm1, norm2) rather than counts layers."""
    end = list(_NUMBER.finditer(text))[nth].end()
    counted = "0" in values and len(values) > 2
    return not _stands_alone(text, nth) and len(values) <= _MOST_LISTED and text.count(".", end) < 2 and not counted


def _stands_alone(text: str, nth: int) -> bool:
    """Whether the nth number of a name is a whole segment."""
    found = list(_NUMBER.finditer(text))[nth]
    return (not found.start() or text[found.start() - 1] == ".") and text[found.end() :].startswith(".")


def _replaced(text: str, fields: dict[int, str]) -> str:
    """The text with some of its numbers, by their places, replaced."""
    nth = itertools.count()
    return _NUMBER.sub(lambda found: fields.get(next(nth), found[0]), text)


def fields_of(text: str) -> set[str]:
    """The variables that a template uses."""
    return set(re.findall(r"\{([a-z][a-z_0-9]*)[+}-]", text))


def _gaps(entry: Entry) -> Iterator[tuple[int, str, str, str]]:
    """Each word that source and target have once: its place from the end, and both texts with a gap for it.

    Whole modules stay apart, as do what drops have in common but for their last word: a person names each of them.
    """
    segments = entry.source.split(".")
    last = 0 if "{rest}" in entry.source else 1 if entry.verb == "drop" else len(segments)
    for rank, segment in enumerate(reversed(segments[len(segments) - last :])):
        if "{" in segment:
            continue
        for word in dict.fromkeys((segment, *segment.split("_"))):
            edge = "[a-zA-Z0-9_]" if word == segment else "[a-zA-Z0-9]"
            pattern = f"(?<!{edge}){re.escape(word)}(?!{edge})"
            at = len(segments) - 1 - rank
            source = ".".join([*segments[:at], re.sub(pattern, "\0", segment), *segments[at + 1 :]])
            target = re.sub(pattern, "\0", entry.target)
            if word and source.count("\0") == 1 and target.count("\0") == bool(entry.target):
                yield rank, word, source, target

"""Rules, the mappings that hold them, and the canonical layouts they lead to."""

from __future__ import annotations

from collections.abc import Mapping as Mapping
from typing import NamedTuple

from converter.errors import MappingError
from converter.layouts.shapes import Shape
from converter.layouts.template import Template
from converter.tensors.ops import Op, lossy_reason


class Place(NamedTuple):
    """A line in a mapping file, for messages."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Rule(NamedTuple):
    """Takes the tensors that `sources` match, applies `ops` in order, and gives them the names of `targets`.

    A rule without targets drops its tensors, because of `reason`. A rule that is not `optional` must match something;
    one that is `demanded` may match nothing when its layout is read, and must when it is written.
    """

    sources: tuple[Template, ...]
    targets: tuple[Template, ...]
    ops: tuple[Op, ...]
    optional: bool
    reason: str
    place: Place
    required_on_write: bool = False

    @property
    def text(self) -> str:
        """The rule on one line, for people."""
        names, made = (" + ".join(repr(name.text)[1:-1] for name in names) for names in (self.sources, self.targets))
        return f"{names} -> {made}" if self.targets else f"drop {names}"

    @property
    def lossy(self) -> str:
        """Why the rule cannot be undone, or nothing if it can."""
        if not self.targets:
            return f"dropped: {self.reason}"
        return "; ".join(why for op in self.ops if (why := lossy_reason(op)))

    def prefixed(self, prefix: str) -> Rule:
        """The rule for names that carry a prefix still."""
        return self._replace(sources=tuple(template.prefixed(prefix) for template in self.sources))

    def inverse(self) -> Rule:
        """The rule in the other direction; MappingError where an operation has no inverse."""
        if self.targets and self.lossy:
            raise MappingError(f"{self.place}: has no way back, so its layout cannot be written: {self.lossy}")
        ops = tuple(op.inverse() for op in reversed(self.ops))
        optional = self.optional and not self.required_on_write
        return self._replace(sources=self.targets, targets=self.sources, ops=ops, optional=optional)


class Signature(NamedTuple):
    """By what a layout is known: prefixes its names may carry, and some names (without prefix) with their shapes."""

    prefixes: tuple[str, ...]
    tensors: Mapping[str, Shape]


class LayoutMapping(NamedTuple):
    """How one layout becomes the family's canonical layout.

    `rules` match names without the prefix, `other_rules` the names that lack it. If `drop_rest` is set,
    it is why all names that lack it are dropped. `digest` is the SHA-256 of the text.
    """

    name: str
    family: str
    description: str
    signature: Signature
    rules: tuple[Rule, ...]
    other_rules: tuple[Rule, ...]
    drop_rest: str
    place: Place
    digest: str

    def rules_for(self, prefix: str) -> tuple[Rule, ...]:
        """All rules in terms of full names, for a checkpoint whose names carry `prefix`."""
        if not prefix:
            return self.rules
        return (*(rule.prefixed(prefix) for rule in self.rules), *self.other_rules)

    def lossy(self) -> list[tuple[Rule, str]]:
        """The rules that cannot be undone, and why."""
        return [(rule, why) for rule in (*self.rules, *self.other_rules) if (why := rule.lossy)]


def invert(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules from targets back to sources; drops vanish. MappingError where an operation has no inverse."""
    return tuple(rule.inverse() for rule in rules if rule.targets)


class TensorSpec(NamedTuple):
    """Tensors that a canonical layout has: name, shape, and element type where it is not the checkpoint's choice.

    `optional` says why they may be missing; `generate` says how they are made where the source has none.
    `positions` marks the table that `--image-size` resamples.
    """

    name: Template
    shape: Shape
    dtype: str = ""
    optional: str = ""
    generate: str = ""
    positions: bool = False


class CanonicalLayout(NamedTuple):
    """A canonical layout: the DeepEncoder's own tensors, its sizes, and the family's tensors `extra_tensors` it.

    Those have names, so that layouts that hold them can be converted into each other; the DeepEncoder drops them for
    the reason given.
    """

    name: str
    family: str
    description: str
    sizes: Mapping[str, int]
    signature: Signature
    tensors: tuple[TensorSpec, ...]
    extra_tensors: tuple[tuple[Template, str], ...]
    place: Place
    digest: str

    def spec(self, name: str) -> TensorSpec | None:
        """What the DeepEncoder's tensor of that name is to be, if it has one."""
        return next((spec for spec in self.tensors if spec.name.match(name) is not None), None)

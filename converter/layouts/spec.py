"""Specifications of layouts: mappings with their rules, and the canonical layouts that mappings lead to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from converter.layouts.shapes import Shape
from converter.layouts.template import Template
from converter.tensors.ops import Op


class Location(NamedTuple):
    """A line in a mapping file, for messages."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Rule(NamedTuple):
    """Takes the tensors that `sources` match, applies `ops` in order, and names the results by `targets`.

    A rule without targets drops its tensors for `reason`. A rule that is not `optional` must match something. With
    `required_on_write` it is optional when the layout is read, and required when it is written.
    """

    sources: tuple[Template, ...]
    targets: tuple[Template, ...]
    ops: tuple[Op, ...]
    optional: bool
    reason: str
    location: Location
    required_on_write: bool = False

    @property
    def text(self) -> str:
        """The rule on one line, for messages."""
        sources, targets = (
            " + ".join(repr(name.text)[1:-1] for name in names) for names in (self.sources, self.targets)
        )
        return f"{sources} -> {targets}" if self.targets else f"drop {sources}"

    def prefixed(self, prefix: str) -> Rule:
        """Return the rule for source names that begin with a prefix."""
        return self._replace(sources=tuple(template.prefixed(prefix) for template in self.sources))

    def inverse(self) -> Rule:
        """Return the rule from targets to sources."""
        ops = tuple(op.inverse() for op in reversed(self.ops))
        optional = self.optional and not self.required_on_write
        return self._replace(sources=self.targets, targets=self.sources, ops=ops, optional=optional)


def invert(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Invert rules; rules that drop tensors have no inverse and are left out."""
    return tuple(rule.inverse() for rule in rules if rule.targets)


class Signature(NamedTuple):
    """Identifies a layout: the prefixes that its names may have, and some names (without prefix) with their shapes."""

    prefixes: tuple[str, ...]
    tensors: Mapping[str, Shape]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutSpec:
    """Base of both kinds of layouts: name, family, description, signature, location and the SHA-256 of the YAML."""

    name: str
    family: str
    description: str
    signature: Signature
    location: Location
    digest: str

    @property
    def is_canonical(self) -> bool:
        """Whether this is the layout of the DeepEncoder itself."""
        raise NotImplementedError

    @property
    def mapping(self) -> LayoutMapping:
        """The mapping from this layout to the family's canonical layout."""
        raise NotImplementedError

    def templates(self, prefix: str) -> list[Template]:
        """Templates for all names that the layout can have, in a checkpoint whose names begin with `prefix`."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutMapping(LayoutSpec):
    """Rules that convert a layout to the family's canonical layout.

    `rules` match names without the prefix, `other_rules` names that do not begin with it. A nonempty `drop_rest` is
    the reason to drop all names that do not begin with it.
    """

    rules: tuple[Rule, ...]
    other_rules: tuple[Rule, ...] = ()
    drop_rest: str = ""

    @property
    def is_canonical(self) -> bool:
        return False

    @property
    def mapping(self) -> LayoutMapping:
        return self

    def templates(self, prefix: str) -> list[Template]:
        return [template for rule in self.rules_for(prefix) for template in rule.sources]

    def rules_for(self, prefix: str) -> tuple[Rule, ...]:
        """Return all rules, with full names, for a checkpoint whose names begin with `prefix`."""
        if not prefix:
            return self.rules
        return (*(rule.prefixed(prefix) for rule in self.rules), *self.other_rules)


class TensorSpec(NamedTuple):
    """Tensors of a canonical layout: a template for their names, and their shape.

    `dtype` is set if the checkpoint does not choose it. `optional` is the reason why the tensors may be missing.
    `generate` says how they are generated if the checkpoint has none. `positions` marks the table of position
    embeddings that `--image-size` resamples.
    """

    name: Template
    shape: Shape
    dtype: str = ""
    optional: str = ""
    generate: str = ""
    positions: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CanonicalLayout(LayoutSpec):
    """The tensors of the DeepEncoder itself, which all layouts of a family are converted through.

    `sizes` are those of DeepSeek-OCR. `extra_tensors` are names that other layouts of the family have and the
    DeepEncoder has not, each with the reason; they let such layouts be converted into each other. `encoder_prefix` is
    the prefix of the encoder in DeepSeek-OCR's model, and `encoder_order` its position among the model's encoders.
    """

    sizes: Mapping[str, int]
    tensors: tuple[TensorSpec, ...]
    extra_tensors: tuple[tuple[Template, str], ...]
    encoder_prefix: str
    encoder_order: int

    @property
    def is_canonical(self) -> bool:
        return True

    @property
    def mapping(self) -> LayoutMapping:
        """The identity: every name is kept."""
        any_name = Template.parse("{rest}", {"rest": "path"})
        return LayoutMapping(
            name=self.name,
            family=self.family,
            description=self.description,
            signature=Signature(("",), self.signature.tensors),
            location=self.location,
            digest=self.digest,
            rules=(Rule((any_name,), (any_name,), (), False, "", self.location),),
        )

    def templates(self, prefix: str) -> list[Template]:
        return [*(spec.name for spec in self.tensors), *(template for template, _ in self.extra_tensors)]

    def spec(self, name: str) -> TensorSpec | None:
        """Return the specification of a tensor, or None if the layout has no tensor of that name."""
        return next((spec for spec in self.tensors if spec.name.match(name) is not None), None)

    def extra_reason(self, name: str) -> str | None:
        """Return why the DeepEncoder has no tensor of that name, or None if the name is not among `extra_tensors`."""
        return next((reason for template, reason in self.extra_tensors if template.match(name) is not None), None)

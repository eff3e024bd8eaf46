"""Specifications of layouts: canonical layouts, and mappings with rules to a canonical layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from converter.layouts.shapes import Shape
from converter.layouts.template import Template
from converter.tensors.ops import Op, Permute


class Location(NamedTuple):
    """A line in a mapping file, for messages."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Rule(NamedTuple):
    """A rule that applies operations to tensors and renames the results."""

    sources: tuple[Template, ...]  # Templates of the source names
    targets: tuple[Template, ...]  # Templates of the new names; empty for a rule that drops tensors
    ops: tuple[Op, ...]
    location: Location
    optional: bool = False  # Whether the rule may match no tensor
    required_on_write: bool = False  # Whether the inverse rule is required, although this one is optional
    reason: str = ""  # Why the rule drops tensors

    @property
    def text(self) -> str:
        """The rule on one line, for messages."""
        # `repr` escapes control characters.
        sources = " + ".join(repr(template.text)[1:-1] for template in self.sources)
        targets = " + ".join(repr(template.text)[1:-1] for template in self.targets)
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
    """Return the inverse rules, without rules that drop tensors, which have no inverse."""
    return tuple(rule.inverse() for rule in rules if rule.targets)


@dataclass(frozen=True, kw_only=True, eq=False)
class LayoutSpec:
    """Base of canonical layouts and mappings."""

    name: str
    family: str
    description: str
    prefixes: tuple[str, ...] = ("",)  # The prefixes that the names of the layout may have
    detect: Mapping[str, Shape]  # The shapes of tensors that identify the layout, by their names without the prefix
    location: Location
    digest: str  # The SHA-256 of the YAML file
    is_canonical: ClassVar[bool]  # Whether this is the layout of the DeepEncoder itself
    language_model: bool = False  # Whether it is the layout of a language model, not of an encoder

    @property
    def mapping(self) -> LayoutMapping:
        """The mapping from this layout to the family's canonical layout."""
        raise NotImplementedError

    @property
    def is_channels_last(self) -> bool:
        """Whether convolutions are stored as [out, height, width, in], as in MLX."""
        return any(Permute((0, 3, 1, 2)) in rule.ops for rule in self.mapping.rules)

    def templates(self, prefix: str) -> list[Template]:
        """Return templates for all names that the layout can have, in a checkpoint whose names begin with `prefix`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, eq=False)
class LayoutMapping(LayoutSpec):
    """Rules that convert a layout to the family's canonical layout."""

    is_canonical = False
    rules: tuple[Rule, ...]  # The rules for names with the prefix; templates are without the prefix
    other_rules: tuple[Rule, ...] = ()  # The rules for names without the prefix
    drop_rest: str = ""  # The reason to drop all names without the prefix; empty if they are not dropped
    aliases: tuple[str, ...] = ()  # Other names of the layout, for other models that have it

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
    """The specification of one or more tensors of a canonical layout."""

    name: Template
    shape: Shape
    dtype: str = ""  # The required element type; empty if any floating-point type is allowed
    optional: str = ""  # The reason why the tensors may be missing; empty if they are required
    generate: str = ""  # How missing tensors are generated: "arange" or empty
    positions: str = ""  # The kind of position embeddings, which `--image-size` resamples; empty for other tensors


@dataclass(frozen=True, kw_only=True, eq=False)
class CanonicalLayout(LayoutSpec):
    """The tensors of the DeepEncoder. All conversions between layouts of a family go through this layout."""

    is_canonical = True
    sizes: Mapping[str, int]  # The sizes in DeepSeek-OCR by name
    # The number of layers with global attention, if the others have window attention. With 12 layers and 4 global ones,
    # these are layers 2, 5, 8 and 11.
    global_layers: int = 0
    # DeepSeek-OCR's values of what no tensor shows, such as `activation`. A name with a dot, such as
    # `text_model.activation`, belongs to another part of a full model.
    assumptions: Mapping[str, str | int | float] = field(default_factory=dict)
    tensors: tuple[TensorSpec, ...]
    # Templates of tensors that other layouts have and the DeepEncoder lacks, each with the reason. Conversions between
    # such layouts keep these tensors.
    extra_tensors: tuple[tuple[Template, str], ...] = ()
    encoder_prefix: str  # The prefix of the encoder in DeepSeek-OCR's model
    encoder_order: int  # The position of the encoder in DeepSeek-OCR's model
    model: str = ""  # A published model with this encoder, for messages

    @property
    def mapping(self) -> LayoutMapping:
        """The identity mapping, which keeps every name."""
        any_name = Template.parse("{rest}", {"rest": "path"})
        return LayoutMapping(
            name=self.name,
            family=self.family,
            description=self.description,
            detect=self.detect,
            location=self.location,
            digest=self.digest,
            rules=(Rule((any_name,), (any_name,), (), self.location),),
        )

    def templates(self, prefix: str) -> list[Template]:
        return [*(spec.name for spec in self.tensors), *(template for template, _ in self.extra_tensors)]

    def spec(self, name: str) -> TensorSpec | None:
        """Return the specification of a tensor, or None if the layout has no tensor of that name."""
        return next((spec for spec in self.tensors if spec.name.match(name) is not None), None)

    def is_optional(self, name: str) -> bool:
        """Return whether the tensor of that name may be missing."""
        spec = self.spec(name)
        return spec is not None and bool(spec.optional)

    def extra_reason(self, name: str) -> str | None:
        """Return why the DeepEncoder has no tensor of that name, or None if the name is not among `extra_tensors`."""
        return next((reason for template, reason in self.extra_tensors if template.match(name) is not None), None)

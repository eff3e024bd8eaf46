"""By what a derived layout is to be recognised."""

from __future__ import annotations

from collections.abc import Iterator

from converter.derivation.found import Found, Named
from converter.derivation.names import Symbols
from converter.layouts import registry
from converter.layouts.shapes import Dim, Shape
from converter.layouts.spec import CanonicalLayout
from converter.layouts.template import Template, any_match
from converter.tensors.lazy_tensor import LazyTensor
from converter.tensors.ops import Deinterleave, apply_op


def recognise(
    found: list[Found], prefix: str, tensors: Named, canonical: CanonicalLayout, symbols: Symbols
) -> dict[str, Shape]:
    """Three tensors of which no other layout has all: the canonical layout's signature, and more where needed."""
    made = {name: one for one in found for name in one.targets}
    telling = [made[name] for name in canonical.signature.tensors if name in made]
    others = [one for one in found if one not in telling and _is_telling(one, canonical)]
    chosen = {one.sources[0]: one for one in (telling + others)[:3]}
    for rules in _rule_sets(canonical):
        if all(any_match(rules, name) for name in chosen):
            alone = [one for one in others if not any_match(rules, one.sources[0])]
            chosen.update((one.sources[0], one) for one in alone[:1])
    return {name.removeprefix(prefix): _symbolic(one, symbols, tensors[name].shape) for name, one in chosen.items()}


def _is_telling(one: Found, canonical: CanonicalLayout) -> bool:
    """Whether every file of the layout has it: of the first block, or of none, and nothing optional."""
    spec = canonical.spec(one.targets[0])
    first = all(not part.isdigit() or part == "0" for part in one.targets[0].split("."))
    return spec is not None and first and not (spec.optional or spec.generate)


def _rule_sets(canonical: CanonicalLayout) -> Iterator[list[Template]]:
    """What names each shipped layout can have."""
    yield [spec.name for spec in canonical.tensors]
    for mapping in registry.mappings(canonical.family):
        for prefix in mapping.signature.prefixes:
            yield [template for rule in mapping.rules_for(prefix) for template in rule.sources]


def _symbolic(one: Found, symbols: Symbols, shape: tuple[int, ...]) -> Shape:
    """A source's shape in the canonical sizes, or in numbers where it does not follow from them."""
    values: tuple[LazyTensor, ...] = tuple(symbols.tensors[name] for name in one.targets if name in symbols.tensors)
    try:
        for op in reversed(one.ops):
            # Rows change places and the shape stays: nothing that primes could be divided by.
            values = values if isinstance(op, Deinterleave) else apply_op(op.inverse(), values)
        return symbols.shape(values[0])
    except (ValueError, IndexError):
        return tuple(Dim(size, None) for size in shape)

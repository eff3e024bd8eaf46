"""From what was found to the text of a mapping file, and the proof that it does what it is to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from textwrap import wrap
from typing import NamedTuple

from converter import catalogue
from converter.checkpoint import Tensor
from converter.derivation.found import ALIKE, NAME, Found, made_of
from converter.derivation.generalise import Entry, Variables, generalised, listed
from converter.derivation.signature import recognise
from converter.derivation.write import Draft, yaml_text
from converter.errors import LayoutError, MappingError
from converter.mapping.expr import Expr, sources
from converter.mapping.ops import Deinterleave, Reshaped
from converter.mapping.parse import parse_mapping
from converter.mapping.plan import make_plan
from converter.mapping.rules import Layout
from converter.mapping.rules import Mapping as Rules

_REMARKS = {
    ALIKE: "Several tensors have these very values: which is which was told by their names.",
    NAME: "Guessed by shape and name: no values were compared.",
}
_SIZED = "The numbers are this model's: larger ones need others."
# As many names as anybody reads in one line of reasons.
_NAMED = 4


class Composed(NamedTuple):
    """A mapping file: its text, what of the findings it says, and what could not be said."""

    layout: str
    text: str
    prefix: str
    found: list[Found]
    made: frozenset[str]
    dropped: list[str]
    rules: int
    notes: list[str]


def compose(
    found: list[Found],
    tensors: Mapping[str, Expr],
    hub: Layout,
    layout: str,
    source: str,
    target: str,
    wanted: Mapping[str, Expr],
) -> Composed:
    """The mapping file for what was found."""
    variables, notes = Variables(), list[str]()
    prefix = _prefix(found, hub)
    said: list[tuple[Found, Entry]] = []
    for one in found:
        entry = _entry(one, hub, variables, prefix)
        if entry is None:
            notes.append(f"{' + '.join(one.targets)} is in {' + '.join(one.sources)}, whose names no one rule can list")
        else:
            said.append((one, entry))
    used = {name for one, _ in said for name in one.sources}
    dropped = [name for name in tensors if name not in used]
    drops = [_drop(name, prefix, found) for name in dropped]
    inside = [e for e in (*(entry for _, entry in said), *drops) if all(name.startswith(prefix) for name in e.covers)]
    outside = [e for e in (*(entry for _, entry in said), *drops) if e not in inside]
    beside = outside if any(entry.verb != "drop" for entry in outside) else []
    elsewhere = _elsewhere(hub, [entry.source for entry in outside]) if outside and not beside else ""
    order = _order(hub, wanted)
    draft = Draft(
        remarks=wrap(
            f"Derived by `dsocr-convert mapping derive` from {_short(source)} and {_short(target)}.",
            118,
            break_on_hyphens=False,
        ),
        layout=layout,
        family=hub.family,
        description=_description(source),
        prefix=prefix,
        recognise=recognise([one for one, _ in said], prefix, tensors, hub),
        rules=sorted(generalised([_stripped(entry, prefix) for entry in inside], variables), key=order),
        beside=sorted(generalised(beside, variables), key=order),
        elsewhere=elsewhere,
        reason=f"nothing in {_short(target)} has these values" if wanted else f"{target} has nothing like them",
    )
    text = yaml_text(draft, variables)
    kept = [one for one, _ in said]
    made = frozenset(name for one in kept for name in one.targets)
    return Composed(layout, text, prefix, kept, made, dropped, len(draft.rules) + len(draft.beside), notes)


def proved(
    composed: Composed, tensors: Mapping[str, Expr], hub: Layout, wanted: Mapping[str, Expr], source: str
) -> None:
    """MappingError unless the text, read as any mapping file is and applied to the source, gives the target's bytes."""
    mapping = parse_mapping(composed.text, f"{composed.layout}.yaml")
    assert isinstance(mapping, Rules)
    matches = catalogue.recognise(_only_tensors(tensors), catalogue.only(mapping))
    if not matches:
        raise LayoutError(f"{source}: is not recognised by what was derived from it: this is a bug")
    plan = make_plan(mapping, matches[0].prefix, hub, tensors, source)
    given = {**plan.outputs, **plan.beyond}
    expected = {name: value for one in composed.found for name, value in made_of(one, tensors)}
    for name, value in expected.items():
        made = given.get(name)
        # What the search compared need not be read again, if the rules make the same of the same tensors.
        if made != value and (made is None or name not in wanted or not _equal(made, wanted[name])):
            raise MappingError(f"{source}: the rules derived make another {name!r} than was found: this is a bug")


def _equal(a: Expr, b: Expr) -> bool:
    from converter.derivation.values import equal

    return equal(a, b)


def _prefix(found: list[Found], hub: Layout) -> str:
    """What the names of all tensors that lead to the hub's own begin with: whole segments."""
    names = [
        name
        for one in found
        for name in one.sources
        if any(spec.name.match(target) is not None for spec in hub.tensors for target in one.targets)
    ]
    if not names:
        return ""
    first, last = min(names).split("."), max(names).split(".")
    same = 0
    while same < min(len(first), len(last)) - 1 and first[same] == last[same]:
        same += 1
    return "".join(f"{segment}." for segment in first[:same])


def _entry(one: Found, hub: Layout, variables: Variables, prefix: str) -> Entry | None:
    """The rule for one finding; None where names of parts differ in more than a word."""
    verb, parts, source, target = "rename", None, one.sources[0], one.targets[0]
    if len(one.sources) > 1 or len(one.targets) > 1:
        verb, many = ("fuse", one.sources) if len(one.sources) > 1 else ("split", one.targets)
        template = listed(many, variables)
        if template is None:
            return None
        text, name, words = template
        parts = name, words
        source, target = (text, target) if verb == "fuse" else (source, text)
    notes = {_REMARKS[one.how]} if one.how in _REMARKS else set()
    if any(isinstance(op, Reshaped | Deinterleave) for op in one.ops):
        notes.add(_SIZED)
    optional = _optional(one.targets[0], hub, source.startswith(prefix))
    return Entry(
        verb, source, target, frozenset(one.sources), frozenset(one.targets), one.ops, parts, optional, frozenset(notes)
    )


def _optional(target: str, hub: Layout, inside: bool) -> str:
    """Whether other files of the layout may lack what this target is made of."""
    spec = next((spec for spec in hub.tensors if spec.name.match(target) is not None), None)
    if spec is None:
        return "reading" if inside else "true"
    return "true" if spec.fill else ""


def _drop(name: str, prefix: str, found: list[Found]) -> Entry:
    twin = next((one.sources[0] for one in found if one.rivals == (name,) and one.how == ALIKE), None)
    notes = frozenset({f"the same tensor as {twin}"} if twin else ())
    return Entry("drop", name, "", frozenset({name}), frozenset(), optional="true", notes=notes)


def _stripped(entry: Entry, prefix: str) -> Entry:
    covers = frozenset(name.removeprefix(prefix) for name in entry.covers)
    return entry._replace(source=entry.source.removeprefix(prefix), covers=covers)


def _elsewhere(hub: Layout, names: list[str]) -> str:
    heads = sorted({name.partition(".")[0] for name in names})
    more = f", {len(heads) - _NAMED} more" if len(heads) > _NAMED else ""
    return f"not part of {hub.family.upper()} ({', '.join(heads[:_NAMED])}{more})"


def _description(source: str) -> str:
    return f"the layout of {_short(source)}"[:100]


def _short(source: str) -> str:
    """A path's last part, and the folder where every checkpoint's file is called so."""
    *_, folder, name = ("", *source.rstrip("/").split("/"))
    return f"{folder}/{name}" if folder and name.startswith(("model.", "pytorch_model.")) else name


def _order(hub: Layout, wanted: Mapping[str, Expr]) -> Callable[[Entry], tuple[int, str]]:
    """Rules in the order of the hub's tensors; those that lead beyond them later, drops last."""
    beyond = {name: len(hub.tensors) + i for i, name in enumerate(wanted)}

    def place(entry: Entry) -> tuple[int, str]:
        places = (
            next((i for i, spec in enumerate(hub.tensors) if spec.name.match(name) is not None), beyond.get(name, 0))
            for name in entry.gives
        )
        return min(places, default=len(hub.tensors) + len(beyond)), entry.source

    return place


def _only_tensors(tensors: Mapping[str, Expr]) -> dict[str, Tensor]:
    return {name: tensor for name, value in tensors.items() for tensor in sources(value)}

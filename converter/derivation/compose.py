"""From what was found to the text of a mapping file, and the proof that it does what it is to do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from converter.derivation.found import ALIKE, NAME, Found, Job, made_of
from converter.derivation.generalise import Entry, Variables, generalised, listed
from converter.derivation.names import Symbols, depth_of
from converter.derivation.signature import recognise
from converter.derivation.write import Draft, yaml_text
from converter.errors import LayoutError, MappingError
from converter.layouts import detect, registry
from converter.layouts.parse import parse_mapping
from converter.layouts.spec import CanonicalLayout
from converter.layouts.template import any_match
from converter.plan.plan import make_plan
from converter.tensors.lazy_tensor import source_tensors
from converter.tensors.ops import Deinterleave, Reshaped

_REMARKS = {
    ALIKE: "Several tensors have these very values: which is which was told by their names.",
    NAME: "Guessed by shape and name: no values were compared.",
}
_SIZED = "The numbers are this model's: larger ones need others."


class Composed(NamedTuple):
    """A mapping file: its text, what of the findings it says, what makes nothing or is not made, and what to tell."""

    text: str
    found: list[Found]
    unmatched: list[str]
    dropped: list[str]
    rules: int
    notes: list[str]


def compose(job: Job, found: list[Found], name: str) -> Composed:
    """The mapping file for what was found; `name` is the layout's. MappingError for a name that none can write."""
    prefix = _common_prefix(found, job.canonical)
    symbols = Symbols(job.canonical, depth_of(job.wanted or [key for key in job.tensors if key.startswith(prefix)]))
    variables = Variables()
    made = [(one, _entry(one, job.canonical, variables, prefix)) for one in found]
    said = [one for one, entry in made if entry]
    used = {name for one in said for name in one.sources}
    dropped = [name for name in job.tensors if name not in used]
    entries = [*(entry for _, entry in made if entry), *(_drop(name, job, found) for name in dropped)]
    inside = [entry for entry in entries if all(name.startswith(prefix) for name in entry.covers)]
    _check_names(name for entry in inside for name in entry.covers)
    outside = [entry for entry in entries if entry not in inside]
    beside = outside if any(entry.verb != "drop" for entry in outside) else []
    order = list(dict.fromkeys((*symbols.tensors, *job.wanted)))
    draft = Draft(
        remark=f"Derived by `dsocr-convert mapping derive` from {_short(job.source)} and {_short(job.target)}.",
        layout=name,
        family=job.canonical.family,
        description=f"the layout of {_short(job.source)}"[:100],
        prefix=prefix,
        recognise=recognise(said, prefix, job.tensors, job.canonical, symbols),
        rules=_rules([_stripped(entry, prefix) for entry in inside], variables, order),
        other_rules=_rules(beside, variables, order),
        drop_rest=f"not part of {job.canonical.family.upper()}" if outside and not beside else "",
    )
    return Composed(
        text=yaml_text(draft, variables),
        found=said,
        unmatched=_unmatched(job, said, symbols),
        dropped=dropped,
        rules=len(draft.rules) + len(draft.other_rules),
        notes=[_unsaid(one) for one, entry in made if entry is None],
    )


def _rules(entries: list[Entry], variables: Variables, order: list[str]) -> list[Entry]:
    """The fewest rules, in the order of the targets' names, drops last."""
    places = {name: i for i, name in enumerate(order)}
    made = generalised(entries, variables)
    return sorted(made, key=lambda e: (min((places[n] for n in e.gives), default=len(places)), e.source))


def _unsaid(one: Found) -> str:
    return f"{' + '.join(one.targets)} is in {' + '.join(one.sources)}, whose names no one rule can list"


def _unmatched(job: Job, found: list[Found], symbols: Symbols) -> list[str]:
    """The target's tensors that something must make, and nothing does."""
    made = {name for one in found for name in one.targets}
    spare = [spec.name for spec in job.canonical.tensors if spec.generate or (spec.optional and not job.wanted)]
    return [name for name in job.wanted or symbols.tensors if name not in made and not any_match(spare, name)]


def _check_names(names: Iterable[str]) -> None:
    """MappingError for a name that no template can write."""
    braced = next((name for name in names if set(name) & {"{", "}"}), None)
    if braced is not None:
        raise MappingError(
            f"{braced!r} has a brace in its name, which mapping files write variables with: no rule can name it",
            "rename it in the checkpoint, without braces, and derive again",
        )


def prove(job: Job, composed: Composed, name: str) -> None:
    """MappingError unless the text, read as any mapping file is and applied to the source, makes what was found."""
    mapping = parse_mapping(composed.text, f"{name}.yaml").mapping
    tensors = {name: tensor for name, value in job.tensors.items() for tensor in source_tensors(value)}
    matches = detect.match_layouts(tensors, registry.entry_of(mapping))
    if not matches:
        raise LayoutError(f"{job.source}: is not recognised by what was derived from it: this is a bug")
    plan = make_plan(mapping, matches[0].prefix, job.canonical, job.tensors, job.source)
    given = {**plan.outputs, **plan.extra_tensors}
    for name, value in (made for one in composed.found for made in made_of(one, job.tensors)):
        # The search has compared these with the target: their bytes need not be read again.
        if given.get(name) != value:
            raise MappingError(f"{job.source}: the rules derived make another {name!r} than was found: this is a bug")


def _common_prefix(found: list[Found], canonical: CanonicalLayout) -> str:
    """What the names of all tensors that lead to the canonical layout's own begin with: whole segments."""
    names = [name for one in found if any(map(canonical.spec, one.targets)) for name in one.sources]
    if not names:
        return ""
    first, last = min(names).split("."), max(names).split(".")
    same = 0
    while same < min(len(first), len(last)) - 1 and first[same] == last[same]:
        same += 1
    return "".join(f"{segment}." for segment in first[:same])


def _entry(one: Found, canonical: CanonicalLayout, variables: Variables, prefix: str) -> Entry | None:
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
    optional = _optional(one.targets[0], canonical, source.startswith(prefix))
    return Entry(
        verb, source, target, frozenset(one.sources), frozenset(one.targets), one.ops, parts, optional, frozenset(notes)
    )


def _optional(target: str, canonical: CanonicalLayout, inside: bool) -> str:
    """Whether other files of the layout may lack what this target is made of."""
    spec = canonical.spec(target)
    if spec is None:
        return "on_read" if inside else "true"
    return "true" if spec.generate else ""


def _drop(name: str, job: Job, found: list[Found]) -> Entry:
    by_values, by_names = "nothing in {} has these values", "not matched with anything of {} by name and shape"
    nothing = by_values.format(_short(job.target)) if job.wanted else by_names.format(job.target)
    twin = next((one.sources[0] for one in found if one.rivals == (name,) and one.how == ALIKE), None)
    reason = f"the same tensor as {twin}" if twin else nothing
    return Entry("drop", name, "", frozenset({name}), frozenset(), optional="true", reason=reason)


def _stripped(entry: Entry, prefix: str) -> Entry:
    covers = frozenset(name.removeprefix(prefix) for name in entry.covers)
    return entry._replace(source=entry.source.removeprefix(prefix), covers=covers)


def _short(source: str) -> str:
    """A path's last part, and the folder where every checkpoint's file is called so."""
    *_, folder, name = ("", *source.rstrip("/").split("/"))
    return f"{folder}/{name}" if folder and name.startswith(("model.", "pytorch_model.")) else name

"""Whole DeepEncoders: put together from a SAM, a compressor and a CLIP, or taken out of a DeepSeek-OCR checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

from converter import catalogue
from converter.assemble.compressor import NAMES as NETS
from converter.assemble.compressor import check_compressor, find_compressor, seeded
from converter.assemble.replace import PLACES, Copy, output_of_copy, plan_copy
from converter.cards.card import count_dtypes
from converter.cards.files import CardFiles
from converter.errors import LayoutError, UsageError
from converter.hubs.address import Access
from converter.mapping.expr import Expr, nbytes, read, sources
from converter.mapping.ops import CastTo
from converter.mapping.plan import in_order
from converter.planning import DTYPES, Planned, Wish, check_choices, to_hub
from converter.report import Card
from converter.source import Progress, Source, open_source
from converter.version import __version__
from converter.write import Outputs
from converter.writing import Output, format_for, output_of, write

PREFIX = "model."
# What leads from the encoder to the language model, by DeepSeek's names, misspelling included, and by transformers'.
_PROJECTOR = {
    "projector.layers.weight": "multi_modal_projector.weight",
    "projector.layers.bias": "multi_modal_projector.bias",
    "image_newline": "image_newline",
    "view_seperator": "view_separator",
}
_CONSTANT = "a constant that the model makes itself; DeepSeek-OCR's own checkpoint lacks it"


class Parts(NamedTuple):
    """A DeepEncoder before it is written: `outputs` by the names that it has inside of DeepSeek-OCR's model.

    position_ids, a constant that DeepSeek's checkpoint lacks, is among them. `filled` and `dropped` are the card's.
    """

    opened: list[Source]
    plans: dict[str, Planned]
    outputs: dict[str, Expr]
    filled: dict[str, str]
    dropped: dict[str, str]

    @property
    def constants(self) -> set[str]:
        """Those of the outputs that are written only where they replace one."""
        specs = {place + spec.name.text: spec for f, place in PLACES.items() for spec in catalogue.hub(f).tensors}
        return {name for name, spec in specs.items() if spec.fill}


def encoder(
    source: str | Path | None = None,
    *,
    sam: str | Path | None = None,
    clip: str | Path | None = None,
    compressor: str | Path | None = None,
    with_projector: bool = False,
    prefix: str = PREFIX,
    into: str | Path | None = None,
    out: str | Path | None = None,
    dtype: str = "keep",
    format: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    card: str | Path | Sequence[str | Path] = (),
    sign: str | Path | None = None,
    revision: str | None = None,
    hub: str | None = None,
    download: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Card:
    """Write one checkpoint with a whole DeepEncoder, `sam_model.*` and `vision_model.*`, and return its card.

    Either `source` is a checkpoint that holds both encoders (DeepSeek-OCR, Unlimited-OCR), which are taken out of it;
    `with_projector` takes the projector, image_newline and view_seperator along. Or `sam` and `clip` are two
    checkpoints of any layout, and `compressor` a third one that was trained with net_2 [2*neck, neck, 3, 3] and net_3
    [CLIP's width, 2*neck, 3, 3]: a DeepSeek-OCR, a GOT-OCR2 or a Vary. `random:SEED` is an untrained one (see
    `converter.assemble.compressor.seeded`), in SAM's type. A `sam` that holds one needs none.

    `prefix` comes before all names: with `model.` they are those of DeepSeek-OCR's checkpoint, which lacks
    position_ids. `out` defaults to `deepencoder.<format>`; `dtype` casts. `revision`, `hub` and `download` are
    `source`'s; for other sources, write the revision behind the name, `org/name@revision`.

    With `into`, a DeepSeek-OCR checkpoint on this machine, a copy of it is written to `out`, with this encoder in the
    place of its own: a folder for a folder, a file for a file. Shards, index, order of names and all other files are
    kept, and so are types unless `dtype` is given.

    `card` and `sign` are as in `convert`; the card of a copy is of all its tensors.

    Raises a DsocrError: UsageError where options or sizes contradict each other, LayoutError where a checkpoint is not
    of its kind or there is no compressor. Whatever stood at `out` stands there still then.
    """
    check_choices(dtype=(dtype, DTYPES))
    if not re.fullmatch(r"([\w-]+\.)*", prefix):
        raise UsageError(f"--prefix {prefix!r}: expected names that each end in a dot, such as model.")
    _refuse("does not go with --into", format=into is not None and format)
    format = format_for(None if into is not None else out, format)
    files = CardFiles(card, sign)
    with ExitStack() as stack:

        def open_(name: str | Path, access: Access = Access()) -> Source:  # noqa: B008 (a tuple)
            return stack.enter_context(closing(open_source(name, access)))

        if source is not None:
            _refuse("does not go with SOURCE, which holds it", sam=sam, clip=clip, compressor=compressor)
            parts = _taken(open_(source, Access(revision, hub, download)), with_projector)
        elif sam is None or clip is None:
            raise UsageError("name a checkpoint that holds both encoders, or one for each, with --sam and --clip")
        else:
            _refuse("is for a SOURCE that holds both encoders", with_projector=with_projector)
            _refuse("is for a SOURCE: write hf://org/name@REV", revision=revision, hub=hub, download=download)
            # One that is given twice is opened once: what of it is used is known by its files.
            opened = open_(sam)
            parts = _put_together(opened, opened if sam == clip else open_(clip), str(compressor or ""), open_)
        if into is not None:
            _refuse("does not go with --into", prefix=prefix != PREFIX)
            if out is None:
                raise UsageError("--into: name what to write with --output")
            copy = plan_copy(Path(into), open_, parts.outputs, parts.constants, dtype)
            record = _card_of_copy(_card(parts, copy.names, copy.replaced, Path(out), format, dtype), copy, into)
            if dry_run:
                return record
            return write(output_of_copy(copy), record, [*parts.opened, copy.opened], files, force, progress)
        names = {name: prefix + name for name in parts.outputs if name not in parts.constants}
        outputs = in_order({new: parts.outputs[name] for name, new in names.items()}, dtype)
        record = _card(parts, names, outputs, Path(out or f"deepencoder.{format}"), format, dtype)
        if dry_run:
            return record
        return write(_output_of(outputs, record), record, parts.opened, files, force, progress)


def _refuse(why: str, **options: object) -> None:
    """UsageError for the first option that is given."""
    for name, value in options.items():
        if value:
            raise UsageError(f"--{name.replace('_', '-')}: {why}")


def _put_together(sam: Source, clip: Source, wanted: str, open_: Callable[[str], Source]) -> Parts:
    """The encoder of two checkpoints and a compressor: `wanted` is its SOURCE, random:SEED, or empty for SAM's own."""
    plans = {"sam": to_hub(sam, Wish("sam")), "clip": to_hub(clip, Wish("clip"))}
    neck, width = plans["sam"].plan.sizes["neck"], plans["clip"].plan.sizes["width"]
    opened, nets, filled = [sam] if clip is sam else [sam, clip], {}, {}
    if wanted.startswith("random:"):
        cast = CastTo(plans["sam"].plan.outputs["neck.2.weight"].dtype.name)
        nets = {name: cast.one(value) for name, value in seeded(wanted, neck, width).items()}
        filled = {name: f"{wanted}: untrained, uniform within 1/sqrt({9 * net.shape[1]})" for name, net in nets.items()}
    elif wanted:
        opened.append(open_(wanted))
        nets = find_compressor(opened[-1])
    outputs = {**_placed(plans), **{PLACES["sam"] + name: value for name, value in nets.items()}}
    check_compressor(_nets(outputs), neck, width, wanted or sam.name)
    own = [plans["sam"].plan.outputs[name] for name in nets if name in plans["sam"].plan.outputs]
    replaced = {tensor.key: f"--compressor {wanted} gives another" for net in own for tensor in sources(net)}
    return Parts(
        opened,
        plans,
        outputs,
        {PLACES["sam"] + name: how for name, how in filled.items()},
        {**_dropped(plans, outputs), **replaced},
    )


def _taken(opened: Source, with_projector: bool) -> Parts:
    """The encoder, and the projector if wanted, out of a checkpoint that holds both encoders."""
    try:
        plans = {family: to_hub(opened, Wish(family)) for family in PLACES}
    except LayoutError as error:
        raise LayoutError(
            f"{error}\nan encoder is taken out of a checkpoint with both SAM and CLIP; "
            "to put one together, give them with --sam and --clip"
        ) from None
    outputs = _placed(plans)
    sizes = plans["sam"].plan.sizes["neck"], plans["clip"].plan.sizes["width"]
    check_compressor(_nets(outputs), *sizes, opened.name)
    if with_projector:
        outputs |= _projector(opened, plans["sam"])
    no_family = {planned.plan.mapping.elsewhere for planned in plans.values()}
    elsewhere = f"not part of the DeepEncoder (language model{'' if with_projector else ', projector'})"
    dropped = {key: elsewhere if why in no_family else why for key, why in _dropped(plans, outputs).items()}
    return Parts([opened], plans, outputs, {}, dropped)


def _dropped(plans: dict[str, Planned], outputs: dict[str, Expr]) -> dict[str, str]:
    """What of the two checkpoints, which may be one, is in none of the outputs, and why."""
    used = {(tensor.storage.file, tensor.key) for value in outputs.values() for tensor in sources(value)}
    dropped: dict[str, str] = {}
    for known, plan in plans.values():
        files = {tensor.key: tensor.storage.file for tensor in known.tensors.values()}
        for key, why in plan.dropped.items():
            if why != plan.mapping.elsewhere:
                dropped[key] = why
            elif (files.get(key), key) not in used:
                # The other family may know more of it.
                dropped.setdefault(key, why)
    return dropped


def _placed(plans: dict[str, Planned]) -> dict[str, Expr]:
    return {PLACES[family] + name: value for family in plans for name, value in plans[family].plan.outputs.items()}


def _projector(opened: Source, sam: Planned) -> dict[str, Expr]:
    """The tensors of `_PROJECTOR`; LayoutError names those that are not there."""
    base = PREFIX if sam.known.match.prefix.startswith(PREFIX) else ""
    tensors = sam.known.tensors
    found = {name: tensors.get(base + name) or tensors.get(base + other) for name, other in _PROJECTOR.items()}
    lacking = [base + name for name, tensor in found.items() if tensor is None]
    if lacking:
        raise LayoutError(f"{opened.name}: --with-projector: holds no {', '.join(lacking)}\nleave the option out")
    return {name: read(tensor) for name, tensor in found.items() if tensor}


def _nets(outputs: dict[str, Expr]) -> dict[str, Expr]:
    return {name: outputs[PLACES["sam"] + name] for name in NETS if PLACES["sam"] + name in outputs}


def _card(parts: Parts, names: dict[str, str], outputs: dict[str, Expr], target: Path, format: str, dtype: str) -> Card:
    """The card of what has not been written yet: `outputs` have the names to which `names` leads from those inside.

    Where several sources have something to say, their words are joined by a plus.
    """
    known = [planned.known for planned in parts.plans.values()]
    plans = {family: planned.plan for family, planned in parts.plans.items()}
    seeds = dict.fromkeys(how.partition(": ")[0] for how in parts.filled.values())
    commits = [source.commit for source in parts.opened if source.commit]
    all_on_hubs = len(commits) == len(parts.opened)
    unwritten = [value for name, value in parts.outputs.items() if name not in names]
    absent = {PLACES[family] + name: why for family, plan in plans.items() for name, why in plan.missing.items()}
    return Card(
        tool=f"dsocr-convert {__version__}",
        source=" + ".join([*(source.name for source in parts.opened), *seeds]),
        files={file.name: file.size for source in parts.opened for file in source.files},
        containers=sorted({container for source in parts.opened for container in source.containers}),
        state_dict=_joined(entry.state_dict.path for entry in known),
        wrapper=_joined(entry.wrapper for entry in known),
        family="deepencoder",
        mapping=" + ".join(plan.mapping.name for plan in plans.values()),
        mapping_sha256=" + ".join(plan.mapping.digest for plan in plans.values()),
        target="deepencoder",
        output=str(target),
        format=format,
        dtype=dtype,
        tensors=len(outputs),
        nbytes=sum(map(nbytes, outputs.values())),
        dtypes=count_dtypes(list(outputs.values())),
        converted={new: _made_of(name, parts) for name, new in names.items()},
        filled={new: parts.filled[name] for name, new in names.items() if name in parts.filled},
        missing={name: why for name, why in absent.items() if name not in parts.outputs},
        dropped={**parts.dropped, **{tensor.key: _CONSTANT for value in unwritten for tensor in sources(value)}},
        sizes={f"{family} {name}": size for family, plan in plans.items() for name, size in plan.sizes.items()},
        unusual={f"{family} {name}": [*pair] for family, plan in plans.items() for name, pair in plan.unusual.items()},
        commit=" + ".join(commits) if all_on_hubs else "",
        notes=[
            *(note for source in parts.opened for note in source.notes),
            *(f"{one.name}: commit {one.commit}" for one in parts.opened if one.commit and not all_on_hubs),
        ],
    )


def _joined(words: Iterable[str]) -> str:
    return " + ".join(dict.fromkeys(word for word in words if word))


def _made_of(name: str, parts: Parts) -> list[str]:
    return [] if name in parts.filled else [tensor.key for tensor in sources(parts.outputs[name])]


def _card_of_copy(card: Card, copy: Copy, into: str | Path) -> Card:
    """The encoder's card, made to speak of the whole checkpoint that it goes into."""
    tensors = list(copy.tensors.values())
    return card._replace(
        source=f"{card.source} into {into}",
        files={**card.files, **{file.name: file.size for file in copy.opened.files}},
        tensors=len(tensors),
        nbytes=sum(map(nbytes, tensors)),
        dtypes=count_dtypes(tensors),
        notes=[*copy.notes, *card.notes],
    )


def _output_of(outputs: Outputs, card: Card) -> Output:
    """A file of the tensors, which says where it is untrained."""
    untrained = {"compressor": min(card.filled.values())} if card.filled else {}
    return output_of(outputs, card, {**card.metadata(), **untrained})

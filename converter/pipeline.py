"""The straight line of a conversion: locate, open, plan, write, card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from pathlib import Path

from converter.cards.card import make_card
from converter.cards.files import CardFiles
from converter.errors import OutputError
from converter.hubs.address import Access
from converter.mapping.expr import sources
from converter.mapping.plan import Plan
from converter.planning import Wish, check_choices, planned
from converter.pretrained.folder import folder_files, staged_pretrained, wants_folder
from converter.report import Card
from converter.source import Progress, Source, open_source
from converter.stage import check_folder, check_target, staged
from converter.write import write_safetensors

FORMATS = ("safetensors", "pth")


def convert(
    source: str | Path,
    family: str,
    *,
    out: str | Path | None = None,
    to: str = "",
    whole: bool = False,
    fill_from: str | Path | None = None,
    mapping: str | Path | None = None,
    dtype: str = "keep",
    image_size: int | None = None,
    format: str = "safetensors",
    state_dict: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    card: str | Path | Sequence[str | Path] = (),
    sign: str | Path | None = None,
    revision: str | None = None,
    hub: str | None = None,
    download: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Card:
    """Convert a checkpoint into the DeepEncoder's layout, or any other, and return the card of the conversion.

    `source` is a file, a folder or an index, here or on a hub (`hf://org/name`, `ms://org/name`, `org/name`).
    `revision` pins what is on a hub, `hub` says which is meant (hf or modelscope); with `download` whole files are
    fetched into the hub's cache, and not the needed bytes alone. `family` is "sam" or "clip". `out` defaults to
    `<layout>.<format>` in the current folder. With `to` sam-hf or clip-hf, an `out` whose name does not end in
    .safetensors, .pth, .pt or .bin is a folder for transformers' from_pretrained: model.safetensors, config.json and
    preprocessor_config.json; with `force`, an existing one is replaced with all that is in it.

    `to` is the layout to write, deepencoder-<family> unless given; what it has and the source lacks is taken from
    `fill_from`, another source. With `whole`, what lies beside the encoder is converted too: SAM's prompt encoder and
    mask decoder, CLIP's text tower. `mapping` is a mapping file to use instead of recognising the layout. `dtype` casts
    floating-point tensors; `image_size`, in pixels, resamples CLIP's positions. `state_dict` chooses among several in
    one file (`model`, `ema`; `.` for the top). `progress` is called as bytes are written or, from a hub, as they come;
    then also from other threads, one at a time.

    `card` names files for the card, which appear with the output: .json, with the SHA-256 of every tensor and of local
    sources, or .md, a model card; `sign` a PEM file with the private key to sign the .json with, into .json.sig.

    With `dry_run` the plan is made and nothing is written. Raises a DsocrError; whatever stood at `out` stands there
    still then.
    """
    check_choices(format=(format, FORMATS))
    wish = Wish(family, to, mapping, dtype, image_size, state_dict, whole).checked()
    files = CardFiles(card, sign)
    target = Path(out) if out is not None else Path(f"{wish.to}.{format}")
    folder = wants_folder(target, wish.to, format)
    with ExitStack() as stack:
        opened = stack.enter_context(closing(open_source(source, Access(revision, hub, download))))
        lender = stack.enter_context(closing(open_source(fill_from))) if fill_from is not None else None
        found = planned(opened, wish, lender)
        # Made before a dry run ends: that sizes contradict each other is known without writing.
        documents = folder_files(found.plan, wish.whole) if folder else {}
        record = make_card(opened, found, wish, target, format)
        if dry_run:
            return record
        both = [opened, lender] if lender else [opened]
        _check_not_source(target, both)
        (check_folder if folder else check_target)(target, force, found.plan.nbytes)
        files.check(target, both, force)
        output = staged_pretrained(target, documents, force) if folder else staged(target, force)
        _write(both, found.plan, record, files, output, force, progress)
        return record._replace(written=True, fetched=_fetched(both))


def _write(
    opened: Sequence[Source],
    plan: Plan,
    card: Card,
    files: CardFiles,
    output: AbstractContextManager[int],
    force: bool,
    progress: Progress,
) -> None:
    """The tensors of the plan into `output`, a file that appears whole or not at all, and its card."""
    remote = any(source.remote for source in opened)
    count = (lambda nbytes: None) if remote else _counter(progress, plan.nbytes)
    with files.staged(plan.outputs, force) as seen, output as fd:
        read = [tensor for value in plan.outputs.values() for tensor in sources(value)]
        for source in opened:
            source.prefetch(read, progress)
        if card.format == "pth":
            # Imported here: the zip module is for those alone who ask for it.
            from converter.pth import write_pth

            write_pth(fd, plan.outputs, count, seen)
        else:
            write_safetensors(fd, plan.outputs, card.metadata(), count, seen)
        files.write(card, plan, opened, seen, progress)
        # Before the output takes its place: a source that changed midway may have given halves of two files.
        for file in (file for source in opened for file in source.files):
            file.check_unchanged()


def _fetched(opened: Sequence[Source]) -> dict[str, int]:
    """Bytes that came over the network, by remote file."""
    return {file.name: file.fetched for source in opened for file in source.remote}


def _counter(progress: Progress, total: int) -> Callable[[int], None]:
    """A sum of the bytes it is told, passed on to `progress`."""
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress("converting", done, total)

    return count


def _check_not_source(target: Path, opened: Sequence[Source]) -> None:
    try:
        stat = target.stat()
    except OSError:
        # There is no such file yet, or it cannot be looked at: either way it is not one that was opened.
        return
    local = [file for source in opened for file in source.files if file.identity]
    for file in local:
        if Path(file.name).resolve().parent == target.resolve():
            raise OutputError(f"{target}: holds the source, {file.name}\nchoose another path with --output")
    if (stat.st_dev, stat.st_ino) in [file.identity for file in local]:
        raise OutputError(f"{target}: is the source itself\nchoose another path with --output")

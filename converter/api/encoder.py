"""Whole DeepEncoders: put together from a SAM, a compressor and a CLIP, or taken out of a DeepSeek-OCR checkpoint."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from converter.assembly.insert import output_of_copy, plan_copy
from converter.assembly.parts import PREFIX, encoder_record, put_together, taken_out
from converter.checkpoint.open import Checkpoint, check_hub_options, open_checkpoint
from converter.errors import UsageError
from converter.options import DTYPES, HubOptions, check_choices
from converter.output.record import ConversionRecord
from converter.output.record_files import RecordFiles
from converter.output.write import Output, format_for, make_output, write
from converter.plan.plan import sort_outputs
from converter.storage.progress import OnProgress
from converter.tensors.serialize import Outputs


def encoder(
    source: str | Path | None = None,
    *,
    sam: str | Path | None = None,
    clip: str | Path | None = None,
    compressor: str | Path | None = None,
    with_projector: bool = False,
    add_prefix: str = PREFIX,
    into: str | Path | None = None,
    out: str | Path | None = None,
    dtype: str = "keep",
    format: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    record: str | Path | Sequence[str | Path] = (),
    on_progress: OnProgress = lambda what, done, total: None,
    **hub_options: Any,
) -> ConversionRecord:
    """Write one checkpoint with a whole DeepEncoder, `sam_model.*` and `vision_model.*`, and return its card.

    Either `source` is a checkpoint that holds both encoders (DeepSeek-OCR, Unlimited-OCR), which are taken out of it;
    `with_projector` takes the projector, image_newline and view_seperator along. Or `sam` and `clip` are two
    checkpoints of any layout, and `compressor` a third one that was trained with net_2 [2*neck, neck, 3, 3] and net_3
    [CLIP's width, 2*neck, 3, 3]: a DeepSeek-OCR, a GOT-OCR2 or a Vary. `random:SEED` is an untrained one (see
    `converter.assembly.compressor.seeded`), in SAM's type. A `sam` that holds one needs none.

    `add_prefix` comes before all names: with `model.` they are those of DeepSeek-OCR's checkpoint, which lacks
    position_ids. `out` defaults to `deepencoder.<format>`; `dtype` casts. `hub_options` (revision, hub,
    download: the fields of `converter.options.HubOptions`) are for all sources.

    With `into`, a DeepSeek-OCR checkpoint on this machine, a copy of it is written to `out`, with this encoder in the
    place of its own: a folder for a folder, a file for a file. Shards, index, order of names and all other files are
    kept, and so are types unless `dtype` is given.

    `record` is as in `convert`; the card of a copy is of all its tensors.

    Raises a DsocrError: UsageError where options or sizes contradict each other, LayoutError where a checkpoint is not
    of its kind or there is no compressor. Whatever stood at `out` stands there still then.
    """
    check_choices(dtype=(dtype, DTYPES))
    if not re.fullmatch(r"([\w-]+\.)*", add_prefix):
        raise UsageError(f"--add-prefix {add_prefix!r}: expected names that each end in a dot, such as model.")
    _refuse("cannot be combined with --into", format=into is not None and format)
    format = format_for(None if into is not None else out, format)
    files, hub = RecordFiles(record), HubOptions(**hub_options)
    with ExitStack() as stack:

        def open_(name: str | Path) -> Checkpoint:
            return stack.enter_context(closing(open_checkpoint(name, hub)))

        if source is not None:
            _refuse("cannot be combined with SOURCE", sam=sam, clip=clip, compressor=compressor)
            parts = taken_out(open_(source), with_projector)
        elif sam is None or clip is None:
            raise UsageError("name a checkpoint that holds both encoders, or one for each, with --sam and --clip")
        else:
            _refuse("is for a SOURCE that holds both encoders", with_projector=with_projector)
            # One that is given twice is opened once: what of it is used is known by its files.
            opened = open_(sam)
            parts = put_together(opened, opened if sam == clip else open_(clip), str(compressor or ""), open_)
        check_hub_options(hub, parts.opened)
        if into is not None:
            _refuse("cannot be combined with --into", add_prefix=add_prefix != PREFIX)
            if out is None:
                raise UsageError("--into: name what to write with --output")
            copy = plan_copy(Path(into), open_, parts.outputs, parts.constants, dtype)
            made = encoder_record(
                parts,
                copy.names,
                copy.tensors,
                output=Path(out),
                format=format,
                dtype=dtype,
                host=copy.opened,
                notes=copy.notes,
            )
            if dry_run:
                return made
            return write(output_of_copy(copy), made, [*parts.opened, copy.opened], files, force, on_progress)
        names = {name: add_prefix + name for name in parts.outputs if name not in parts.constants}
        outputs = sort_outputs({new: parts.outputs[name] for name, new in names.items()}, dtype)
        target = Path(out or f"deepencoder.{format}")
        made = encoder_record(parts, names, outputs, output=target, format=format, dtype=dtype)
        if dry_run:
            return made
        return write(_output_of(outputs, made), made, parts.opened, files, force, on_progress)


def _refuse(why: str, **options: object) -> None:
    """UsageError for the first option that is given."""
    for name, value in options.items():
        if value:
            raise UsageError(f"--{name.replace('_', '-')}: {why}")


def _output_of(outputs: Outputs, card: ConversionRecord) -> Output:
    """A file of the tensors, which says where it is untrained."""
    untrained = {"compressor": min(card.generated.values())} if card.generated else {}
    return make_output(outputs, card, {**card.metadata(), **untrained})

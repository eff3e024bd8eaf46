"""The straight line of a conversion: locate, open, plan, write, card."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from converter.checkpoint.open import Checkpoint, open_checkpoint
from converter.hub.address import HubOptions
from converter.output.pretrained import config_files, wants_folder
from converter.output.record import ConversionRecord, shorten
from converter.output.record_document import make_record
from converter.output.record_files import RecordFiles
from converter.output.write import format_for, make_output, write
from converter.plan.plan import Plan
from converter.plan.planner import ConvertOptions, resolve
from converter.storage.progress import OnProgress
from converter.tensors.lazy_tensor import source_tensors


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
    format: str | None = None,
    state_dict: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    card: str | Path | Sequence[str | Path] = (),
    revision: str | None = None,
    hub: str | None = None,
    download: bool = False,
    on_progress: OnProgress = lambda what, done, total: None,
) -> ConversionRecord:
    """Convert a checkpoint into the DeepEncoder's layout, or any other, and return the card of the conversion.

    `source` is a file, a folder or an index, here or on a hub (`hf://org/name`, `ms://org/name`, `org/name`).
    `revision` pins what is on a hub, `hub` says which is meant (hf or modelscope); with `download` whole files are
    fetched into the hub's cache, and not the needed bytes alone. `family` is "sam" or "clip". `out` defaults to
    `<layout>.<format>` in the current folder; `format` (safetensors, pth) goes by its ending unless given. With
    `to` sam-hf or clip-hf, an `out` whose name does not end in .safetensors, .pth, .pt or .bin is a folder for
    transformers' from_pretrained: model.safetensors, config.json and preprocessor_config.json; with `force`, an
    existing one is replaced with all that is in it.

    `to` is the layout to write, deepencoder-<family> unless given; what it has and the source lacks is taken from
    `fill_from`, another source. With `whole`, what lies beside the encoder is converted too: SAM's prompt encoder and
    mask decoder, CLIP's text tower. `mapping` is a mapping file to use instead of recognising the layout. `dtype` casts
    floating-point tensors; `image_size`, in pixels, resamples CLIP's positions. `state_dict` chooses among several in
    one file (`model`, `ema`; `.` for the top). `progress` is called as bytes are written or, from a hub, as they come;
    then also from other threads, one at a time.

    `card` names files for the card, which appear with the output: .json, with the SHA-256 of every tensor and of local
    sources, or .md, a model card.

    With `dry_run` the plan is made and nothing is written. Raises a DsocrError; whatever stood at `out` stands there
    still then.
    """
    format = format_for(out, format)
    options = ConvertOptions(family, to, mapping, dtype, image_size, state_dict, whole).checked()
    files = RecordFiles(card)
    target = Path(out) if out is not None else Path(f"{options.to}.{format}")
    folder = wants_folder(target, options.to, format)
    with ExitStack() as stack:
        opened = stack.enter_context(closing(open_checkpoint(source, HubOptions(revision, hub, download))))
        donor = stack.enter_context(closing(open_checkpoint(fill_from))) if fill_from is not None else None
        found = resolve(opened, options, donor)
        # Made before a dry run ends: that sizes contradict each other is known without writing.
        documents = config_files(found.plan, options.full_model) if folder else None
        record = make_record(opened, found, options, target, format)
        record = record._replace(notes=record.notes + _lent(found.plan, donor))
        if dry_run:
            return record
        both = [opened, donor] if donor else [opened]
        output = make_output(found.plan.outputs, record, record.metadata(), documents, mapping)
        return write(output, record, both, files, force, on_progress)


def _lent(plan: Plan, donor: Checkpoint | None) -> list[str]:
    """A word on what was taken from the checkpoint that was to fill gaps."""
    if donor is None:
        return []
    names = [
        n for n, value in plan.outputs.items() if any(t.storage.file in donor.files for t in source_tensors(value))
    ]
    return [f"from {donor.name}: {shorten(names)}" if names else f"nothing was lacking: {donor.name} was not used"]

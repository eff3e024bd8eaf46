"""Converts a checkpoint: open, detect, plan, write, record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from converter.checkpoint.model_config import read_normalization
from converter.checkpoint.open import Checkpoint
from converter.checkpoint.sources import open_sources
from converter.errors import UsageError, first_names
from converter.options import ConvertOptions, split_options
from converter.output.pretrained import check_folder_output, is_folder_output
from converter.output.record import ConversionRecord, Destination, make_plan_record
from converter.output.record_files import RecordFiles
from converter.output.write import format_for, is_unchanged, make_output, write
from converter.plan.plan import Plan
from converter.plan.planner import check_options, resolve
from converter.storage.progress import OnProgress
from converter.tensors.lazy_tensor import source_tensors


def convert(
    source: str | Path,
    family: str,
    *,
    out: str | Path | None = None,
    format: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    record: str | Path | Sequence[str | Path] = (),
    on_progress: OnProgress = lambda what, done, total: None,
    **options: Any,
) -> ConversionRecord:
    """Convert a checkpoint into the DeepEncoder's layout, or another one.

    Args:
        source: A file, a folder or an index, or a repository on a hub: `hf://org/name[@revision]`, `ms://org/name`,
            `org/name`.
        family: "sam", "clip" or "qwen2".
        out: The output; `<layout>.<format>` in the current folder by default. With `to` sam-hf or clip-hf, a name
            without a suffix of weights is a folder for transformers' `from_pretrained`.
        format: "safetensors" or "pth"; by the suffix of `out` by default.
        force: Replace an existing output; of a folder, everything in it.
        dry_run: Plan the conversion and write nothing.
        record: Files for the conversion record (.json, with the SHA-256 of every tensor) or a model card (.md).
        on_progress: Called with what is done, and the bytes done and in total; from a hub, also from other threads,
            one at a time.
        **options: The fields of `converter.options.ConvertOptions` and `HubOptions`: to, full_model, mapping, dtype,
            image_size, state_dict, prefix, lora, adapter_name, fill_from; revision, hub, download.

    Returns:
        The conversion record. If `source` has the same names, types and format already, nothing is written, and
        `unchanged` is set.

    Raises:
        DsocrError: The conversion is not possible. An existing output is unchanged.
        TypeError: An option is unknown.
    """
    convert_options, hub_options = split_options(options, ConvertOptions, family=family)
    check_options(convert_options)
    is_folder = out is not None and is_folder_output(Path(out), convert_options.layout)
    format = format_for(None if is_folder else out, format)
    if format == "gguf":
        raise UsageError(
            "GGUF is written for llama.cpp, which reads whole encoders with a projector",
            "run: dsocr-convert encoder SOURCE --with-projector -o mmproj.gguf",
        )
    files = RecordFiles(record)
    target = Path(out) if out is not None else Path(f"{convert_options.layout}.{format}")
    with open_sources(source, convert_options, hub_options) as (sources, checkpoint, donor):
        resolved = resolve(checkpoint, convert_options, donor)
        plan, documents = resolved.plan, None
        if is_folder:
            # Imported here, as only folders need it.
            from converter.output.pretrained_config import config_files

            check_folder_output(target, convert_options.layout, format)
            # A dry run does this too, to report contradictory sizes.
            normalization = read_normalization(sources[0], plan.remarks)
            documents = config_files(plan, convert_options.full_model, normalization)
        destination = Destination(target, format, convert_options.dtype)
        planned = make_plan_record(sources, resolved, destination, _donor_note(plan, donor))
        if documents is None and is_unchanged(sources[0], plan.outputs, format):
            return replace(planned, output=sources[0].name, unchanged=True)
        if dry_run:
            return planned
        output = make_output(plan.outputs, planned, planned.metadata(), documents, convert_options.mapping)
        return write(output, planned, sources, files, force, on_progress)


def _donor_note(plan: Plan, donor: Checkpoint | None) -> list[str]:
    if donor is None:
        return []
    files = {name: {tensor.storage.file for tensor in source_tensors(value)} for name, value in plan.outputs.items()}
    names = [name for name, used_files in files.items() if not used_files.isdisjoint(donor.files)]
    return [f"from {donor.name}: {first_names(names)}" if names else f"--fill-from {donor.name} was not needed"]

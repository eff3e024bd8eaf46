"""Builds, extracts or inserts a whole DeepEncoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from converter.assembly.arrange import arrange
from converter.assembly.host import Host, check_output_name, extract_shared, open_host
from converter.assembly.insert import insertion_output, plan_insertion
from converter.assembly.mmproj import NO_HEADER, make_header, matrix_dtype
from converter.assembly.options import FORMATS, EncoderOptions, refuse
from converter.assembly.parts import EncoderParts, build_encoder, encoder_record, extract_encoder
from converter.checkpoint.adapter import with_adapter
from converter.checkpoint.open import Checkpoint, check_hub_options, open_checkpoint
from converter.checkpoint.sources import lora_files
from converter.errors import UsageError
from converter.layouts import registry
from converter.options import split_options
from converter.output.pretrained import is_folder_output
from converter.output.record import ConversionRecord, Destination
from converter.output.record_files import RecordFiles
from converter.output.write import Output, format_for, make_output, write
from converter.plan.planner import record_merge
from converter.plan.projector import WITHOUT_PROJECTOR
from converter.storage.progress import OnProgress


def encoder(
    source: str | Path | None = None,
    *,
    out: str | Path | None = None,
    format: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    record: str | Path | Sequence[str | Path] = (),
    on_progress: OnProgress = lambda what, done, total: None,
    **options: Any,
) -> ConversionRecord:
    """Write one checkpoint with a whole DeepEncoder: SAM, compressor and CLIP, or SAM, compressor, Qwen2 and queries.

    The encoder is extracted from `source`, or built: DeepSeek-OCR's from `sam`, `clip` and `compressor`, that of
    DeepSeek-OCR-2 from `sam`, `qwen2`, `compressor` and `queries`. With `into`, a copy of another checkpoint is written
    with this encoder in place of its own, under its names; one of SAM, CLIP and Qwen2 is then enough.

    Args:
        source: A checkpoint with both encoders (DeepSeek-OCR, Unlimited-OCR, DeepSeek-OCR-2); with `into`, with one
            that `into` has.
        out: The output; `deepencoder.<format>` by default, required with `into`.
        format: safetensors, pth or gguf; by the suffix of `out` by default.
        force: Replace an existing output.
        dry_run: Plan, and write nothing.
        record: Files for the conversion record (.json) or a model card (.md).
        on_progress: As in `convert`.
        **options: The fields of `converter.assembly.options.EncoderOptions` and `converter.options.HubOptions`: sam,
            clip, qwen2, compressor, queries, with_projector, add_prefix, to, into, dtype, prefix, lora, adapter_name;
            revision, hub, download.

    Returns:
        The conversion record; with `into`, of the whole checkpoint.

    Raises:
        UsageError: Options contradict each other.
        LayoutError: A checkpoint is of another kind; compressor or queries are missing, or of another size.
        TypeError: An option is unknown.
    """
    encoder_options, hub_options = split_options(options, EncoderOptions)
    _check_sources(source, encoder_options)
    layout, destination = _destination(encoder_options, out, format)
    files = RecordFiles(record)
    with ExitStack() as stack:

        def open_plain(name: str | Path) -> Checkpoint:
            return stack.enter_context(closing(open_checkpoint(name, hub_options)))

        adapters = [open_plain(path) for path in lora_files(encoder_options.lora, encoder_options.adapter_name)]

        def open_source(name: str | Path) -> Checkpoint:
            opened = open_plain(name)
            return with_adapter(opened, adapters[0], encoder_options.adapter_name) if adapters else opened

        host = open_host(Path(encoder_options.into), open_plain) if encoder_options.into is not None else None
        if source is None:
            parts = _build(encoder_options, open_source, host)
        elif host is None:
            parts = extract_encoder(open_source(source), encoder_options.with_projector, encoder_options.prefix)
        else:
            parts = extract_shared(open_source(source), host, encoder_options.with_projector, encoder_options.prefix)
        if adapter := parts.sources[0].adapter:
            record_merge(adapter, list(parts.plans.values()), parts.tensors.values())
        parts = replace(parts, sources=[*parts.sources, *adapters])
        check_hub_options(hub_options, parts.sources)
        if host is not None:
            sources = [*parts.sources, host.checkpoint]
            planned, output = _insert(parts, host, sources, destination)
        else:
            sources = parts.sources
            planned, output = _new_output(parts, layout, encoder_options.add_prefix, destination)
        return planned if dry_run else write(output, planned, sources, files, force, on_progress)


def _check_sources(source: str | Path | None, options: EncoderOptions) -> None:
    """Raise UsageError for options that contradict SOURCE, or that lack the option that they need."""
    if source is not None:
        refuse("cannot be combined with SOURCE", **options.families, **options.additions)
        return
    refuse("is for a SOURCE that holds both encoders", with_projector=options.with_projector)
    if options.sam is None:
        refuse("needs --sam", compressor=options.compressor)
    if options.qwen2 is None:
        refuse("needs --qwen2", queries=options.queries)


def _destination(options: EncoderOptions, out: str | Path | None, format: str | None) -> tuple[str, Destination]:
    """Return the layout of another program (empty for DeepSeek-OCR's), and the destination of the output."""
    if options.into is not None:
        refuse("cannot be combined with --into", format=format)
        if out is None:
            raise UsageError("--into: name the output with --output")
        return "", Destination(Path(out), "safetensors", options.dtype)
    default_format = FORMATS.get(options.to) if out is None else None
    format = format_for(None if _is_folder(out, options.to) else out, format or default_format)
    layout = options.to or ("mmproj" if format == "gguf" else "")
    if layout and format != FORMATS[layout]:
        expected = FORMATS[layout]
        raise UsageError(f"--to {layout}: is read from {expected}, not {format}", f"end --output in .{expected}")
    if layout == "mmproj" and not options.with_projector:
        hint = f"add --with-projector; {WITHOUT_PROJECTOR}"
        raise UsageError("llama.cpp's mmproj (GGUF) includes the projector", hint)
    return layout, Destination(Path(out or f"{layout or 'deepencoder'}.{format}"), format, options.dtype)


def _build(options: EncoderOptions, open_file: Callable[[str | Path], Checkpoint], host: Host | None) -> EncoderParts:
    """Combine the encoders of several checkpoints; with a host, one encoder is enough."""
    families = options.families
    if not families or (host is None and list(families) not in registry.versions()):
        raise UsageError(
            "name a checkpoint that holds both encoders, or one for each, with --sam and --clip, or --sam and --qwen2"
        )
    host_plans = host.resolve_all(families) if host is not None else None
    return build_encoder(families, options.additions, open_file, options.prefix, host_plans)


def _insert(
    parts: EncoderParts, host: Host, sources: Sequence[Checkpoint], destination: Destination
) -> tuple[ConversionRecord, Output]:
    """Plan a copy of a host with the encoder."""
    check_output_name(host, Path(destination.path or ""))
    destination = destination._replace(format=host.format)
    insertion = plan_insertion(host, parts, destination.dtype)
    names, target = insertion.placement.keys, " + ".join(insertion.placement.layouts)
    record = encoder_record(parts, names, insertion.tensors, destination, sources, insertion.notes, True, target)
    return record, insertion_output(insertion)


def _new_output(
    parts: EncoderParts, layout: str, prefix: str, destination: Destination
) -> tuple[ConversionRecord, Output]:
    """Plan a file or folder of the encoder, with metadata that says which tensors are untrained."""
    outputs, names, _ = arrange(parts, layout, prefix, destination.dtype)
    header = make_header(parts, matrix_dtype(outputs)) if layout == "mmproj" else NO_HEADER
    target = layout or "deepencoder"
    record = encoder_record(parts, names, outputs, destination, parts.sources, header.remarks, target=target)
    record = replace(record, assumptions=record.assumptions | header.assumptions)
    documents: dict[str, bytes] | None = {} if _is_folder(destination.path, layout) else None
    return record, make_output(outputs, record, record.metadata() | parts.untrained, documents, keys=header.keys)


def _is_folder(out: str | Path | None, layout: str) -> bool:
    """Return whether the output is a folder, from which other programs load their layouts."""
    return bool(layout) and out is not None and is_folder_output(Path(out), layout)

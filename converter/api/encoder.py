"""Builds, extracts or inserts a whole DeepEncoder."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from converter.assembly.arrange import FORMATS, LAYOUTS, arrange
from converter.assembly.host import Host, check_output_name, extract_shared, open_host
from converter.assembly.insert import insertion_output, plan_insertion
from converter.assembly.mmproj import NO_HEADER, make_header, matrix_dtype
from converter.assembly.parts import EncoderParts, build_encoder, encoder_record, extract_encoder
from converter.checkpoint.adapter import with_adapter
from converter.checkpoint.open import Checkpoint, check_hub_options, open_checkpoint
from converter.checkpoint.sources import lora_files
from converter.errors import UsageError
from converter.layouts import registry
from converter.options import DTYPES, HubOptions, check_choices
from converter.output.pretrained import is_folder_output
from converter.output.record import ConversionRecord, Destination
from converter.output.record_files import RecordFiles
from converter.output.write import Output, format_for, make_output, write
from converter.plan.planner import note_merged
from converter.plan.projector import WITHOUT_PROJECTOR
from converter.storage.progress import OnProgress


def encoder(
    source: str | Path | None = None,
    *,
    sam: str | Path | None = None,
    clip: str | Path | None = None,
    qwen2: str | Path | None = None,
    compressor: str | Path | None = None,
    queries: str | Path | None = None,
    prefix: str | None = None,
    lora: str | Path | None = None,
    adapter_name: str | None = None,
    with_projector: bool = False,
    add_prefix: str = registry.MODEL_PREFIX,
    to: str = "",
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
    """Write one checkpoint with a whole DeepEncoder: SAM, compressor and CLIP, or SAM, compressor, Qwen2 and queries.

    The encoder is extracted from `source`, or built: DeepSeek-OCR's from `sam`, `clip` and `compressor`, that of
    DeepSeek-OCR-2 from `sam`, `qwen2`, `compressor` and `queries`. With `into`, a copy of another checkpoint is written
    with this encoder in place of its own, under its names; one of SAM, CLIP and Qwen2 is then enough.

    Args:
        source: A checkpoint with both encoders (DeepSeek-OCR, Unlimited-OCR, DeepSeek-OCR-2); with `into`, with one
            that `into` has.
        sam: A checkpoint with SAM, in any layout.
        clip: A checkpoint with CLIP, in any layout.
        qwen2: A checkpoint with Qwen2, in any layout.
        compressor: A checkpoint with trained net_2 [2*neck, neck, 3, 3] and net_3 [width, 2*neck, 3, 3], where width is
            that of CLIP or Qwen2 (DeepSeek-OCR, GOT-OCR2 and Vary for CLIP-L; DeepSeek-OCR-2 for Qwen2-0.5B); or
            random:SEED, uniform as a new Conv2d, see `converter.assembly.additions`. Not needed if `sam` has one.
        queries: A checkpoint with trained query_768 [144, width] and query_1024 [256, width] (DeepSeek-OCR-2); or
            random:SEED, normal as a new Embedding. Not needed if `qwen2` has them.
        prefix: The prefix of the encoders' names in sources that hold several.
        lora: A LoRA adapter of PEFT to merge into the encoders, as in `convert`.
        adapter_name: Which adapter of a file with several.
        with_projector: Also extract the projector, view_seperator and, of DeepSeek-OCR, image_newline from `source`;
            from GOT-OCR2 and Vary, mm_projector_vary.
        add_prefix: The prefix of all output names. With `model.` they are those of DeepSeek-OCR's checkpoint.
        to: "mlx" for the names and axes of mlx-vlm, "mmproj" for llama.cpp's names, types and header; by default
            DeepSeek-OCR's, or mmproj in the format gguf.
        into: A local checkpoint with encoders of known layouts (DeepSeek-OCR, Unlimited-OCR, GOT-OCR2, LLaVA), a
            folder or a file. Shards, index, order of names, types and all other files are kept.
        out: The output; `deepencoder.<format>` by default, required with `into`.
        dtype: keep, float32, float16 or bfloat16; of an mmproj, the type of its matrices.
        format: safetensors, pth or gguf; by the suffix of `out` by default.
        force: Replace an existing output.
        dry_run: Plan, and write nothing.
        record: Files for the conversion record (.json) or a model card (.md).
        on_progress: As in `convert`.
        **hub_options: The fields of `converter.options.HubOptions`, for all sources.

    Returns:
        The conversion record; with `into`, of the whole checkpoint.

    Raises:
        UsageError: Options contradict each other.
        LayoutError: A checkpoint is of another kind; compressor or queries are missing, or of another size.
    """
    check_choices(dtype=(dtype, DTYPES))
    if not re.fullmatch(r"([\w-]+\.)*", add_prefix):
        raise UsageError(f"--add-prefix {add_prefix!r}: expected names that each end in a dot, such as model.")
    if to:
        check_choices(to=(to, tuple(LAYOUTS)))
        _refuse(f"cannot be combined with --to {to}", add_prefix=add_prefix != registry.MODEL_PREFIX)
    if into is not None:
        _refuse("cannot be combined with --into", to=to, format=format, add_prefix=add_prefix != registry.MODEL_PREFIX)
        if out is None:
            raise UsageError("--into: name the output with --output")
    if lora is None:
        _refuse("is for --lora", adapter_name=adapter_name)
    families = _given(sam=sam, clip=clip, qwen2=qwen2)
    additions = _given(compressor=compressor, queries=queries)
    if clip is not None:
        _refuse("cannot be combined with --clip, which it takes the place of", qwen2=qwen2)
        _refuse("is for Qwen2: cannot be combined with --clip", queries=queries)
    if source is None and sam is None:
        _refuse("needs --sam", compressor=compressor)
    if source is None and qwen2 is None:
        _refuse("needs --qwen2", queries=queries)
    implied = FORMATS.get(to) if out is None else None
    format = format_for(None if into is not None or _is_folder(out, to) else out, format or implied)
    to = to or ("mmproj" if format == "gguf" else "")
    if to:
        _check_layout(to, format, with_projector)
    destination = Destination(Path(out or f"{to or 'deepencoder'}.{format}"), format, dtype)
    files, hub = RecordFiles(record), HubOptions(**hub_options)
    with ExitStack() as stack:

        def open_(name: str | Path) -> Checkpoint:
            return stack.enter_context(closing(open_checkpoint(name, hub)))

        adapters = [open_(path) for path in lora_files(lora, adapter_name)]

        def open_source(name: str | Path) -> Checkpoint:
            return with_adapter(open_(name), adapters[0], adapter_name) if adapters else open_(name)

        host = open_host(Path(into), open_) if into is not None else None
        if source is not None:
            _refuse("cannot be combined with SOURCE", **families, **additions)
            parts = _extracted(open_source(source), host, with_projector, prefix)
        else:
            _refuse("is for a SOURCE that holds both encoders", with_projector=with_projector)
            parts = _built(families, additions, open_source, prefix, host)
        if adapter := parts.sources[0].adapter:
            note_merged(adapter, list(parts.plans.values()), parts.tensors.values())
        parts = replace(parts, sources=[*parts.sources, *adapters])
        check_hub_options(hub, parts.sources)
        if host is not None:
            sources = [*parts.sources, host.checkpoint]
            made, output = _inserted(parts, host, sources, destination)
        else:
            sources = parts.sources
            made, output = _new_output(parts, to, add_prefix, destination)
        return made if dry_run else write(output, made, sources, files, force, on_progress)


def _check_layout(layout: str, format: str, with_projector: bool) -> None:
    """UsageError for a format or a part that another program does not read."""
    if format != FORMATS[layout]:
        raise UsageError(
            f"--to {layout}: is read from {FORMATS[layout]}, not {format}", f"end --output in .{FORMATS[layout]}"
        )
    if layout == "mmproj" and not with_projector:
        raise UsageError(
            "llama.cpp's mmproj (GGUF) includes the projector", f"add --with-projector; {WITHOUT_PROJECTOR}"
        )


def _extracted(source: Checkpoint, host: Host | None, with_projector: bool, prefix: str | None) -> EncoderParts:
    if host is not None:
        return extract_shared(source, host, with_projector, prefix)
    return extract_encoder(source, with_projector, prefix)


def _built(
    families: dict[str, str | Path],
    additions: dict[str, str | Path],
    open_file: Callable[[str | Path], Checkpoint],
    prefix: str | None,
    host: Host | None,
) -> EncoderParts:
    """Combine the encoders of several checkpoints; into a host, one is enough."""
    if host is not None and families:
        return build_encoder(families, additions, open_file, prefix, host.resolve_all(families))
    if list(families) in registry.versions():
        return build_encoder(families, additions, open_file, prefix)
    raise UsageError(
        "name a checkpoint that holds both encoders, or one for each, with --sam and --clip, or --sam and --qwen2"
    )


def _given(**options: str | Path | None) -> dict[str, str | Path]:
    return {name: value for name, value in options.items() if value is not None}


def _refuse(reason: str, **options: object) -> None:
    """UsageError for the first option that is set."""
    for name, value in options.items():
        if value:
            raise UsageError(f"--{name.replace('_', '-')}: {reason}")


def _inserted(
    parts: EncoderParts, host: Host, sources: Sequence[Checkpoint], destination: Destination
) -> tuple[ConversionRecord, Output]:
    """Plan a copy of the host with the encoder in it."""
    check_output_name(host, Path(destination.path or ""))
    insertion = plan_insertion(host, parts, destination.dtype)
    record = encoder_record(
        parts,
        insertion.placement.names,
        insertion.tensors,
        destination,
        sources,
        notes=insertion.notes,
        inserted=True,
        target=" + ".join(insertion.placement.layouts),
    )
    return record, insertion_output(insertion)


def _new_output(
    parts: EncoderParts, layout: str, prefix: str, destination: Destination
) -> tuple[ConversionRecord, Output]:
    """Plan a file or folder of the encoder alone; its metadata says what is untrained."""
    outputs, names, _ = arrange(parts, layout, prefix, destination.dtype)
    target, header = layout or "deepencoder", NO_HEADER
    if layout == "mmproj":
        header = make_header(parts, matrix_dtype(outputs))
    record = encoder_record(parts, names, outputs, destination, parts.sources, header.remarks, target=target)
    record = replace(record, assumptions=record.assumptions | header.origins)
    documents: dict[str, bytes] | None = {} if _is_folder(destination.path, layout) else None
    return record, make_output(outputs, record, record.metadata() | parts.untrained, documents, keys=header.keys)


def _is_folder(out: str | Path | None, layout: str) -> bool:
    """Whether the output is a folder: other programs load their layouts from one."""
    return bool(layout) and out is not None and is_folder_output(Path(out), layout)

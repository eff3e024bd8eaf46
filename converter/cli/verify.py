"""`dsocr-verify`: proves that a converted checkpoint holds its source's weights and computes the same outputs."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from converter.cli import console
from converter.cli.options import PROGRAM, Html, Json, Quiet, Version, add_options
from converter.errors import UsageError
from converter.options import ConvertOptions, HubOptions, option

if TYPE_CHECKING:
    from converter.verification.result import Verification

app = typer.Typer(**PROGRAM)

Converted = Annotated[str, typer.Argument(metavar="CONVERTED", help="A file that dsocr-convert wrote.")]
# Options of verification that go with --save-activations and --activations, and options that do not.
_SHARED = ("image", "device", "revision", "hub", "download")
_NOT_WITH_ACTIVATIONS = ("source", "record", "mapping", "state_dict", "prefix", "fast", "require")


@dataclass(frozen=True)
class VerifyOptions:
    """Options of `converter.verify`."""

    source: list[str] | None = option(
        "The checkpoint that it was converted from. Several with what they supplied: sam=, clip=, qwen2=, compressor= "
        "and queries= (also random:SEED), fill-from=, into=, lora=.",
        "[ROLE=]SOURCE",
        "--source",
        "-s",
    )
    record: Path | None = option("The conversion record that was written with it.", "FILE.json")
    device: str = option("Device to run the encoders on.", "auto|cpu|cuda[:N]", default="auto")
    dtype: Literal["float32", "bfloat16", "float16"] = option("Precision to run the encoders in.", default="float32")
    sizes: str | None = option(
        "Image sizes for the whole DeepEncoder. [default: 512,640,1024,1280; on a CPU 512]", "PIXELS,..."
    )
    fast: bool = option("Check only structure and bytes; run nothing.", default=False)
    require: str | None = option("Exit with 1 unless these are done: structure, bytes, outputs.", "PART,...")
    save_activations: Path | None = option("Only write the activations of the whole encoder.", "FILE.safetensors")
    activations: Path | None = option(
        "Only compare these activations of a port with the encoder's.", "FILE.safetensors"
    )
    stages: str | None = option("With --save-activations: the stages to write.", "PATTERN,...")
    force: bool = option("With --save-activations: replace an existing file.", None, "--force", "-f", default=False)
    image: Path | None = option("Input image for the encoders. [default: a drawn page]", "FILE")


@dataclass(frozen=True)
class ReportOptions:
    """How to report a verification."""

    html: Html = None
    junit: Path | None = option("Write a JUnit report, one test case per check.", "FILE")
    github: bool = option("Annotate a GitHub Actions run and write its step summary.", default=False)
    json: Json = False
    quiet: Quiet = False
    version: Version = False


@app.command()
@add_options(
    VerifyOptions, (ConvertOptions, ["mapping", "state_dict", "prefix", "adapter_name"]), HubOptions, ReportOptions
)
def verify(converted: Converted, **options: Any) -> None:
    """Verify a conversion: structure, bytes, and outputs compared with the original implementation."""
    report = ReportOptions(**{item.name: options.pop(item.name) for item in fields(ReportOptions)})
    saved, theirs = (options.pop(name) for name in ("save_activations", "activations"))
    with_saved = {name: options.pop(name) for name in ("stages", "force")}
    _check_activations(saved, theirs, with_saved, options)
    sizes, require = _parse_sizes(options.pop("sizes")), options.pop("require")
    source = _parse_sources(options.pop("source") or [])
    # Huge pages halve the time of large attention scores on a CPU. torch reads this when it is imported.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Imported here because they import torch, which --help and usage errors do not need.
    from converter import reports
    from converter.api.activations import compare_activations, save_activations
    from converter.api.verify import verify as run

    reports.check_files(report.html, report.junit)
    with console.Bar(not report.quiet) as fetching, console.Bar(not report.quiet, "steps") as steps:

        def on_progress(what: str, *counts: int) -> None:
            (fetching if what.startswith("fetching") else steps)(what, *counts)

        shared = {"on_progress": on_progress, **{name: options[name] for name in _SHARED}}
        if saved is not None:
            stages, force = with_saved["stages"], with_saved["force"]
            chosen = stages.split(",") if stages is not None else ()
            console.result(str(save_activations(converted, saved, sizes=sizes, stages=chosen, force=force, **shared)))
            return
        if theirs is not None:
            verification = compare_activations(converted, theirs, **shared)
        else:
            verification = run(
                converted,
                source,
                sizes=sizes,
                require=require.split(",") if require is not None else (),
                draw=report.html is not None,
                on_progress=on_progress,
                on_notice=(lambda line: None) if report.quiet else console.say,
                **options,
            )
    _show(verification, report)
    raise typer.Exit(0 if verification.ok else 1)


def _check_activations(
    saved: Path | None, theirs: Path | None, with_saved: dict[str, Any], options: dict[str, Any]
) -> None:
    """UsageError for options that do not go with the options on activations."""
    needless = next((name for name, value in with_saved.items() if value not in (None, False)), None)
    if saved is None and needless:
        raise UsageError(f"--{needless}: is for --save-activations", "add --save-activations FILE.safetensors")
    if saved is None and theirs is None:
        return
    if saved is not None and theirs is not None:
        raise UsageError("--save-activations and --activations: choose one")
    chosen = "--save-activations" if saved is not None else "--activations"
    refused = _NOT_WITH_ACTIVATIONS if saved is not None else (*_NOT_WITH_ACTIVATIONS, "sizes")
    for name in refused:
        if options[name]:
            raise UsageError(f"--{name.replace('_', '-')}: cannot be combined with {chosen}", "run two commands")


def _show(verification: Verification, report: ReportOptions) -> None:
    from converter import reports
    from converter.reports.github import annotate
    from converter.reports.text import print_report

    if not report.quiet:
        print_report(verification)
    command = shlex.join(["dsocr-verify", *sys.argv[1:]])
    reports.write_files(verification, html=report.html, junit=report.junit, command=command)
    if report.github:
        annotate(verification)
    if report.json:
        console.result_json(verification.to_json())
    else:
        console.result(verification.result)


def _parse_sources(texts: Sequence[str]) -> dict[str, str]:
    """Checkpoints by role; one without a role has the role `source`."""
    sources: dict[str, str] = {}
    for text in texts:
        role, name = text.split("=", 1) if re.match(r"[a-z][a-z0-9-]+=", text) else ("source", text)
        if role in sources:
            raise UsageError(
                f"--source {text}: a second one, after {sources[role]}",
                "say what each supplied, such as --source sam=... --source clip=...",
            )
        sources[role] = name
    return sources


def _parse_sizes(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    items = text.split(",")
    if not all(item.isascii() and item.isdigit() and 0 < int(item) <= 4096 and int(item) % 64 == 0 for item in items):
        raise UsageError(f"--sizes {text}: expected multiples of 64 up to 4096, such as 512,640,1024,1280")
    return tuple(map(int, items))

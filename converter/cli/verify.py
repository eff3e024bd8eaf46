"""`dsocr-verify`: proves that a converted checkpoint holds its source's weights and computes the same outputs."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from converter.cli import console
from converter.cli.options import PROGRAM, Html, Json, Quiet, Version, add_options
from converter.errors import UsageError
from converter.options import ConvertOptions, HubOptions

app = typer.Typer(**PROGRAM)

Converted = Annotated[str, typer.Argument(metavar="CONVERTED", help="A file that dsocr-convert wrote.")]
Source = Annotated[
    str | None,
    typer.Option("--source", "-s", metavar="SOURCE", help="What it was converted from: file, folder, index, org/name."),
]
RecordFile = Annotated[
    Path | None, typer.Option("--record", metavar="FILE.json", help="The conversion record that was written with it.")
]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda[:N]", help="Where the encoders run.")]
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="The precision they run in.")]
Sizes = Annotated[
    str | None,
    typer.Option(metavar="PIXELS,...", help="Sizes for the whole chain. [default: 512,640,1024,1280; on a CPU 512]"),
]
Fast = Annotated[bool, typer.Option("--fast", help="Structure and bytes alone; run nothing.")]
Image = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Let the encoders look at this image. [default: a drawn page]")
]
Junit = Annotated[Path | None, typer.Option(metavar="FILE", help="Write one test case a check, for CI systems.")]
Github = Annotated[bool, typer.Option("--github", help="Annotate a GitHub Actions run, and write its step summary.")]


@app.command()
@add_options(ConvertOptions, HubOptions, only=["mapping", "state_dict", "revision", "hub", "download"])
def verify(
    converted: Converted,
    source: Source = None,
    record: RecordFile = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    sizes: Sizes = None,
    fast: Fast = False,
    image: Image = None,
    html: Html = None,
    junit: Junit = None,
    github: Github = False,
    json: Json = False,
    quiet: Quiet = False,
    version: Version = False,
    **options: Any,
) -> None:
    """Prove a conversion by structure, by bytes, and by outputs beside the source's own implementation."""
    chosen = _sizes(sizes)
    # Gigabytes of attention scores in pages of 4 KiB cost the kernel as much time as the arithmetic takes. torch reads
    # this as it is imported.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Two seconds of torch, which --help and a mistyped option need not wait for.
    from converter import reports
    from converter.api.verify import verify as run

    reports.check_files(html, junit)
    with console.Bar(not quiet) as fetching, console.Bar(not quiet, "steps") as steps:
        found = run(
            converted,
            source,
            record=record,
            device=device,
            dtype=dtype,
            sizes=chosen,
            fast=fast,
            image=image,
            draw=html is not None,
            on_progress=lambda what, *counts: (fetching if what.startswith("fetching") else steps)(what, *counts),
            **options,
        )
    if not quiet:
        from converter.reports.text import show

        show(found)
    reports.write_files(found, html=html, junit=junit, command=shlex.join(["dsocr-verify", *sys.argv[1:]]))
    if github:
        from converter.reports.github import annotate

        annotate(found)
    if json:
        console.result_json(found.to_json())
    else:
        console.result("verified" if found.ok else "not verified")
    raise typer.Exit(0 if found.ok else 1)


def _sizes(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    words = text.split(",")
    if not all(word.isascii() and word.isdigit() and 0 < int(word) <= 4096 and int(word) % 64 == 0 for word in words):
        raise UsageError(f"--sizes {text}: expected multiples of 64 up to 4096, such as 512,640,1024,1280")
    return tuple(int(word) for word in words)

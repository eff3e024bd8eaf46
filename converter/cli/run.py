"""A conversion run by a command: its progress bar, its messages, and its result on stdout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.cli import console, render

if TYPE_CHECKING:
    from converter.output.record import ConversionRecord


def run_conversion(
    convert: Callable[..., ConversionRecord],
    *sources: str | None,
    record: list[Path] | None,
    json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Run a conversion and show its record: the result on stdout, the rest on stderr.

    Args:
        convert: `converter.convert` or `converter.encoder`.
        sources: The positional arguments of `convert`.
        record: Files for the conversion record or a model card.
        json: Whether to print the record as JSON.
        quiet: Whether to print only the result.
        options: The other keyword arguments of `convert`.
    """
    with console.Bar(enabled=not quiet) as bar:
        conversion = convert(*sources, record=record or (), on_progress=bar, **options)
    if not quiet:
        console.say(*render.summary(conversion))
        if record and conversion.written:
            console.say(f"record: {', '.join(map(str, record))}")
    if json:
        console.result_json(conversion.to_json())
    elif conversion.written or conversion.unchanged:
        console.result(conversion.output)
    else:
        console.result(*render.plan(conversion))

"""The verification as one page that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import base64
import re
import shlex
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from converter.errors import printable
from converter.reports import plot, words
from converter.verification.result import FAILED, SKIPPED, Picture, Verification


class Generated(NamedTuple):
    """Converted tensors that differ by their layer alone, and what they are made of."""

    name: str
    layers: int
    parts: list[str]


def render(template: str, **values: Any) -> bytes:
    """The page in UTF-8 that a template of this package gives, filled in with `values`."""
    environment = Environment(
        loader=PackageLoader("converter.verify", "views"),
        # Everything in it may come from a file.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Names come from files: none may hide a character that reverses the line it stands in.
        finalize=lambda value: printable(value, keep="\n") if type(value) is str else value,
    )
    return environment.get_template(template).render(values).encode("utf-8", "replace")


def page(found: Verification, command: str | None = None) -> bytes:
    """The page. `command` is how to repeat it; without one, what `found` says it was is given."""
    return render(
        "page.html",
        found=found,
        verdict=words.verdict(found),
        signs=words.SIGNS,
        proofs={proof: words.folded(checks) for proof, checks in words.proofs(found).items()},
        explained=words.PROOFS,
        seen=words.seen,
        faults=words.having(found, FAILED),
        skipped=words.having(found, SKIPPED),
        plots=[(trace, plot.plot(trace)) for trace in found.traces],
        axes=plot,
        pictures=_by_run(found.pictures),
        made=fold(found.key_map),
        command=command or reproduce(found),
        times=words.times(found),
    )


def reproduce(found: Verification) -> str:
    """The command that repeats a verification, as far as it tells how it was made."""
    parts = ["dsocr-verify", found.converted]
    if found.source:
        parts += ["--source", found.source]
    if not found.device.startswith("CPU"):
        parts += ["--device", "cuda"]
    return shlex.join([*parts, "--dtype", found.dtype])


def _by_run(pictures: list[Picture]) -> dict[str, list[tuple[Picture, str]]]:
    """Pictures by the run they show, each with its address: its own bytes."""
    runs: dict[str, list[tuple[Picture, str]]] = {}
    for picture in pictures:
        address = f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"
        runs.setdefault(picture.run, []).append((picture, address))
    return runs


def fold(key_map: dict[str, list[str]]) -> list[Generated]:
    """The key map with repeated layers folded into one line."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, parts in key_map.items():
        rows.setdefault((_pattern(name), *map(_pattern, parts)), []).append(name)
    return [
        Generated(pattern, len(names), parts) if len(names) > 1 else Generated(names[0], 1, key_map[names[0]])
        for (pattern, *parts), names in rows.items()
    ]


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)[0-9]+(?=\.)", "{}", name)

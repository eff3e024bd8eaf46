"""The verification as one self-contained page: no script, no font, no image from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from converter.errors import printable
from converter.output.names import fold_key_map
from converter.reports import words
from converter.reports.plot import error_plot
from converter.verification.result import FAILED, NOT_VERIFIED, PARTLY_VERIFIED, VERIFIED, Picture, Verification

# The style of the verdict and its sign.
_STYLES = {VERIFIED: ("passed", "✓"), PARTLY_VERIFIED: ("partly", "!"), NOT_VERIFIED: ("failed", "✗")}


def render(template: str, **values: Any) -> bytes:
    """Render a template of this package to UTF-8.

    Args:
        template: The template's file name.
        values: Variables of the template; all text in them is escaped.
    """
    environment = Environment(
        loader=PackageLoader("converter", "reports"),
        # Every text may come from a file.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Control characters in names could reverse or hide a line. Template text is not a plain str.
        finalize=lambda value: printable(value, keep="\n") if _is_plain(value) else value,
    )
    return environment.get_template(template).render(values).encode("utf-8", "replace")


def _is_plain(value: object) -> bool:
    return isinstance(value, str) and not hasattr(value, "__html__")


def page(verification: Verification, command: str | None = None) -> bytes:
    """The page as UTF-8; `command` is the command line to repeat it, if there was one."""
    return render(
        "page.html",
        found=verification,
        verdict=words.verdict_line(verification),
        words=words,
        groups={group: words.split_failures(checks) for group, checks in words.by_group(verification).items()},
        failures=words.with_verdict(verification, FAILED),
        style=_STYLES[verification.verdict],
        plots=[error_plot(trace) for trace in verification.traces if trace.points],
        pictures=_by_run(verification.pictures),
        key_map=fold_key_map(verification.key_map),
        command=command or "",
    )


def _by_run(pictures: Iterable[Picture]) -> dict[str, list[tuple[Picture, str]]]:
    """The pictures of each run, with their data URLs."""
    runs: dict[str, list[tuple[Picture, str]]] = {}
    for picture in pictures:
        url = f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"
        runs.setdefault(picture.run, []).append((picture, url))
    return runs

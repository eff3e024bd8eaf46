"""A verification for people and machines: a table on the terminal, JUnit, GitHub annotations, a page to open.

Each view imports its library when it is asked for: a verdict on the terminal waits for no template engine.
"""

from __future__ import annotations

import os
from pathlib import Path

from converter.errors import OutputError
from converter.storage.atomic_output import check_name, staged, write_all
from converter.verification.result import Verification

# An older report is replaced without a question, but not a checkpoint or a card that was named by mistake.
_SUFFIXES = (".html", ".htm", ".xml")


def check_files(*paths: Path | None) -> None:
    """OutputError if a report could not be written there, asked before the minutes that it would report on."""
    for path in filter(None, paths):
        check_name(path)
        if not path.parent.is_dir():
            raise OutputError(f"{path}: there is no folder {path.parent}", "create it, or choose another path")
        if path.is_dir():
            raise OutputError(f"{path}: is a folder", "give a file's path")
        if os.path.lexists(path) and path.suffix.lower() not in _SUFFIXES:
            raise OutputError(
                f"{path}: exists, and is no report by its name", f"choose another path: {', '.join(_SUFFIXES)}"
            )


def write_files(
    found: Verification, html: Path | None = None, junit: Path | None = None, command: str | None = None
) -> None:
    """Write the reports that were asked for, over older ones, each whole or not at all.

    `command` is the command line that the page gives for repeating the verification.
    """
    if html is not None:
        from converter.reports.html import page

        write(html, page(found, command))
    if junit is not None:
        from converter.reports.junit import document

        write(junit, document(found))


def write(path: Path, data: bytes) -> None:
    """Write a report, over an older one, whole or not at all."""
    with staged(path, force=True) as fd:
        write_all(fd, memoryview(data))

"""Reports of a verification: a table on the terminal, JUnit XML, GitHub annotations and an HTML page.

Each report imports its library when it is written, because most runs only need the table.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from converter.errors import OutputError
from converter.storage.atomic_output import atomic_file, remove_stale, write_all

if TYPE_CHECKING:
    from converter.verification.result import Verification

# Only existing files with these suffixes are replaced: any other file may be a checkpoint, named by mistake.
_REPLACEABLE_SUFFIXES = (".html", ".htm", ".xml")


def check_files(*paths: Path | None) -> None:
    """Raise OutputError if a report cannot be written; None paths are skipped. Call it before the long work starts."""
    for path in filter(None, paths):
        remove_stale(path)
        if not path.parent.is_dir():
            raise OutputError(f"{path}: there is no folder {path.parent}", "create it, or choose another path")
        if path.is_dir():
            raise OutputError(f"{path}: is a folder", "specify a file")
        if os.path.lexists(path) and path.suffix.lower() not in _REPLACEABLE_SUFFIXES:
            suffixes = ", ".join(_REPLACEABLE_SUFFIXES)
            raise OutputError(f"{path}: exists and is not a report", f"choose a path that ends in {suffixes}")


def write_files(
    verification: Verification, html: Path | None = None, junit: Path | None = None, command: str = ""
) -> None:
    """Write the requested reports atomically. Existing reports are replaced.

    Args:
        verification: The verification to report.
        html: The path of the HTML page, or None to write no page.
        junit: The path of the JUnit XML, or None to write none.
        command: The command line that repeats the verification, shown on the page.
    """
    if html is not None:
        from converter.reports.html import verification_page

        write(html, verification_page(verification, command))
    if junit is not None:
        from converter.reports.junit import junit_xml

        write(junit, junit_xml(verification))


def write(path: Path, data: bytes) -> None:
    """Write a report atomically. An existing file is replaced."""
    with atomic_file(path, force=True) as fd:
        write_all(fd, memoryview(data))

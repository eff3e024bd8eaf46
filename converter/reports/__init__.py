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

# An existing report is replaced; a file with another suffix may be a checkpoint that was named by mistake.
_SUFFIXES = (".html", ".htm", ".xml")


def check_files(*paths: Path | None) -> None:
    """Check that reports can be written, before the work that they report on; OutputError if not."""
    for path in filter(None, paths):
        remove_stale(path)
        if not path.parent.is_dir():
            raise OutputError(f"{path}: there is no folder {path.parent}", "create it, or choose another path")
        if path.is_dir():
            raise OutputError(f"{path}: is a folder", "specify a file")
        if os.path.lexists(path) and path.suffix.lower() not in _SUFFIXES:
            suffixes = ", ".join(_SUFFIXES)
            raise OutputError(f"{path}: exists and is not a report", f"choose a path that ends in {suffixes}")


def write_files(
    verification: Verification, html: Path | None = None, junit: Path | None = None, command: str = ""
) -> None:
    """Write reports atomically, over existing ones.

    Args:
        verification: The result to report.
        html: Path of the HTML page, if wanted.
        junit: Path of the JUnit XML, if wanted.
        command: The command line to repeat the verification, shown on the page.
    """
    if html is not None:
        from converter.reports.html import verification_page

        write(html, verification_page(verification, command))
    if junit is not None:
        from converter.reports.junit import document

        write(junit, document(verification))


def write(path: Path, data: bytes) -> None:
    """Write a report atomically, over an existing one."""
    with atomic_file(path, force=True) as fd:
        write_all(fd, memoryview(data))

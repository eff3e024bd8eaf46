"""Exceptions for everything that is not a bug, each with the exit code of the command line.

    DsocrError
    ├── UsageError       2   options contradict each other or the source
    ├── SourceError      3   the input is bad
    │   ├── ContainerError   a file is missing, truncated, hostile or of an unknown format
    │   ├── LayoutError      the tensors fit no layout, fit several, or are converted already
    │   └── MappingError     a mapping file is malformed, or does not fit the checkpoint
    ├── OutputError      4   the output could not be written
    └── HubError         5   a hub cannot be reached, or does not give the file

`message` names the file and the problem, one problem a line; `hint` says what to do next. Names from a file appear in a
message as `repr` or `printable` writes them: they may hold control characters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# Characters of a message and of a name in a list, as tensor names in a file may have megabytes.
MAX_MESSAGE, _MAX_NAME = 3000, 200


def printable(text: str, keep: str = "") -> str:
    """Escape control characters, which could otherwise steer a terminal or a parser; those in `keep` stay."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in keep else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def shortened(text: str, limit: int) -> str:
    """Cut the middle of a text of more than `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def first_names(names: Sequence[str], shown: int = 3) -> str:
    """Join the first names, long ones cut, and the number of others, such as `a, b, c and 4 more`."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}..." for name in names[:shown]) + more


def natural_sort_key(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]


class DsocrError(Exception):
    """Base of all errors that are not bugs.

    Attributes:
        exit_code: The exit status of a command that raises it.
        message: The file and the problem.
        hint: What to do next.
        choices: A source of the command, and the sources of which one can take its place.
    """

    exit_code = 1
    choices: tuple[str, Sequence[str]] = "", ()

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message, self.hint = (shortened(text, MAX_MESSAGE) for text in (message, hint))

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class UsageError(DsocrError):
    """Options contradict each other or the source."""

    exit_code = 2


class SourceError(DsocrError):
    """The input cannot be converted."""

    exit_code = 3


class ContainerError(SourceError):
    """A file is missing, truncated, hostile or of an unknown format."""


class LayoutError(SourceError):
    """The tensors fit no known layout, fit several, or already have the target's layout."""


class OtherFamilyError(LayoutError):
    """A checkpoint holds an encoder of another family."""


class MappingError(SourceError):
    """A mapping file is malformed, or its rules do not fit the checkpoint's tensors."""


class OutputError(DsocrError):
    """The output exists, the disk is full, or writing failed."""

    exit_code = 4


class HubError(DsocrError):
    """A hub cannot be reached, refuses access or does not have the file."""

    exit_code = 5

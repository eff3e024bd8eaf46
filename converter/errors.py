"""Every error that a user can cause or meet, each with the exit code the command line gives it.

    DsocrError
    ├── UsageError       2   options that contradict each other or the source
    ├── SourceError      3   the input is bad
    │   ├── ContainerError   a file is missing, truncated, hostile or of an unknown kind
    │   ├── LayoutError      the tensors fit no layout, several, or are converted already
    │   └── MappingError     a mapping file is wrong, or its rules do not fit the checkpoint
    ├── OutputError      4   the output could not be written
    └── HubError         5   a hub could not be reached, or does not give the file
        └── UnreachableError

A message has one line a fact: the file, the cause, then the next step. What a file calls its tensors stands in it as
`repr` writes it, or `printable`; what files are called is a `Name`.
"""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    """The text with control characters written out: names in a file must steer neither terminal nor parser.

    `keep` are characters to leave as they are.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in keep else _written_out(char) for char in text)


def _written_out(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class Name(str):
    """What a file or a part of it is called: itself to whoever opens or compares it, printable where it is shown."""

    __slots__ = ()

    def __format__(self, spec: str) -> str:
        return str.__format__(printable(self), spec)


class DsocrError(Exception):
    """Base of all errors that are not bugs; `exit_code` is what the process returns."""

    exit_code = 1


class UsageError(DsocrError):
    """The options given cannot be honoured together, or not for this source."""

    exit_code = 2


class SourceError(DsocrError):
    """The input cannot be converted."""

    exit_code = 3


class ContainerError(SourceError):
    """A file is missing, truncated, hostile, or of no kind that a loader reads."""


class LayoutError(SourceError):
    """The tensors fit no known layout, fit several, or are in the target's layout already."""


class MappingError(SourceError):
    """A mapping file is malformed, or its rules and the checkpoint's tensors disagree."""


class OutputError(DsocrError):
    """The output exists already, has no room, or could not be written."""

    exit_code = 4


class HubError(DsocrError):
    """A hub could not be reached, refuses access, or does not have what was asked for."""

    exit_code = 5


class UnreachableError(HubError):
    """A hub does not answer; `what` says so in a few words, `why` is what its library says."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}: {why}\ncheck the network, the proxy and the hub's endpoint setting, then run again")
        self.what, self.why = what, why

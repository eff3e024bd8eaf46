"""`dsocr-convert`: the program and the table of its commands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from converter.cli.options import PROGRAM, Version

# The module and the function of each command, or the Typer of a group of commands.
_COMMANDS = {
    "sam": "families:sam",
    "clip": "families:clip",
    "qwen2": "families:qwen2",
    "encoder": "encoder:encoder",
    "inspect": "inspect:inspect",
    "diff": "diff:diff",
    "mapping": "mapping:app",
}


class _Commands(Mapping[str, Any]):
    """The commands by name; the module of a command is imported only when it is used."""

    def __getitem__(self, name: str) -> Any:
        module, attribute = _COMMANDS[name].split(":")
        found = getattr(import_module(f"converter.cli.{module}"), attribute)
        if isinstance(found, typer.Typer):
            return typer.main.get_command(found)
        single = typer.Typer(add_completion=False, **PROGRAM)
        single.command(name)(found)
        return typer.main.get_command(single)

    def __iter__(self) -> Iterator[str]:
        return iter(_COMMANDS)

    def __len__(self) -> int:
        return len(_COMMANDS)


class _Group(TyperGroup):
    """A group of commands that are imported when they are used."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = _Commands()  # type: ignore[assignment]

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names; the inherited method would import every command for them."""
        return list(_COMMANDS)


app = typer.Typer(cls=_Group, no_args_is_help=True, **PROGRAM)


@app.callback()
def program(version: Version = False) -> None:
    """Convert SAM, CLIP and Qwen2 checkpoints into DeepSeek-OCR's DeepEncoder."""

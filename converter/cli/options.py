"""Options that several commands share, and the setup of both programs."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import typer

from converter import __version__
from converter.cli import console
from converter.layouts import registry
from converter.options import option

# rich would style help texts and tracebacks.
PROGRAM: dict[str, Any] = {
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}

Command = TypeVar("Command", bound=Callable[..., None])

Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help="A checkpoint: file, folder, sharded index, or org/name on a hub.")
]
Html = Annotated[Path | None, typer.Option(metavar="FILE", help="Write a report to open in a browser.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors and the result.")]


def complete_layout(incomplete: str) -> list[str]:
    """Complete the name of a layout in the shell."""
    return [name for name in registry.layout_names() if name.startswith(incomplete)]


@dataclass(frozen=True)
class WriteOptions:
    """Options of all commands that write a checkpoint."""

    out: Path | None = option(
        "File to write, or a folder for from_pretrained or with --into FOLDER. [default: LAYOUT.FORMAT]",
        "PATH",
        "--output",
        "-o",
    )
    format: Literal["safetensors", "pth", "gguf"] | None = option(
        "Format; pth is for torch.load, gguf for llama.cpp. [default: by the output's suffix]"
    )
    force: bool = option("Replace an existing output.", None, "--force", "-f", default=False)
    dry_run: bool = option("Print the plan; write nothing.", default=False)
    record: list[Path] | None = option(
        "Write the conversion record, or a model card; may be repeated.", "FILE.json|FILE.md"
    )
    json: Json = False
    quiet: Quiet = False


def add_options(*groups: type | tuple[type, Collection[str]]) -> Callable[[Command], Command]:
    """Replace `**options` in the signature of a command by the fields of dataclasses.

    Args:
        groups: Dataclasses whose fields are made by `option`, or annotated for typer; with names, only these fields.
    """

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        explicit = [item for item in signature.parameters.values() if item.name != "options"]
        added = [item for group in groups for item in _parameters(group)]
        parameters = [item.replace(kind=item.KEYWORD_ONLY) for item in explicit] + added
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {item.name: item.annotation for item in parameters}
        return command

    return decorate


def _parameters(group: type | tuple[type, Collection[str]]) -> Iterator[inspect.Parameter]:
    cls, names = group if isinstance(group, tuple) else (group, None)
    hints = get_type_hints(cls, include_extras=True)
    for item in fields(cls):
        annotation = hints[item.name]
        if item.metadata:
            # A source is a path or an address.
            plain = str | None if annotation == str | Path | None else annotation
            annotation = Annotated[item.metadata["type"] or plain, _typer_option(item)]
        if hasattr(annotation, "__metadata__") and (names is None or item.name in names):
            yield inspect.Parameter(
                item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default, annotation=annotation
            )


def _typer_option(item: Field[Any]) -> Any:
    return typer.Option(
        *(item.metadata["names"] or [f"--{item.name.replace('_', '-')}"]),
        help=item.metadata["help"],
        metavar=item.metadata["metavar"],
        show_default=bool(item.default),
        autocompletion=complete_layout if item.metadata["metavar"] == "LAYOUT" else None,
    )


def _print_version(requested: bool) -> None:
    if requested:
        console.result(f"{Path(sys.argv[0]).name} {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
]

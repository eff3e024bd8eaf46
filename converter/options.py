"""Options that commands and API functions share.

A field made by `option` is a keyword of an API function and an option of its commands: a new option is a new field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from converter.errors import UsageError

DtypeName = Literal["keep", "float32", "float16", "bfloat16"]
DTYPES: tuple[str, ...] = get_args(DtypeName)
# Position embeddings of CLIP-L at this image size take 1.4 GB, which are computed in memory.
_MAX_IMAGE_SIZE = 8192


_Options = TypeVar("_Options")


def option(help: str, metavar: str | None = None, *names: str, default: Any = None, type: Any = None) -> Any:
    """Make a field of a dataclass that is a command-line option too.

    Args:
        help: The help text of the option.
        metavar: What the option's value is called in the help text.
        names: The names of the option, if it is not only called as the field.
        default: The default of both.
        type: The type of the option's value, if it is another one than the field's.
    """
    return field(default=default, metadata={"help": help, "metavar": metavar, "names": names, "type": type})


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """Options of a conversion; UsageError for a value that is not allowed, and for options that contradict each other.

    An empty `to` is the family's canonical layout, deepencoder-<family>. `full_model` also converts SAM's prompt
    encoder and mask decoder, or CLIP's text tower. `lora` is a file, a folder, or a repository on a hub.
    """

    family: str  # The encoder to convert: sam, clip or qwen2
    to: str = option("Layout to write, as in `mapping list`. [default: the DeepEncoder's]", "LAYOUT", default="")
    full_model: bool = option("With --to: convert the full model, not only the vision encoder.", default=False)
    mapping: str | Path | None = option("Use this mapping file; skip layout detection.", "FILE.yaml", type=Path | None)
    dtype: str = option("Cast floating-point tensors.", default="keep", type=DtypeName)
    image_size: int | None = option("Resample the position embeddings for this image size.", "PIXELS")
    state_dict: str | None = option("State dict of a file with several (model, ema; . for the top).", "NAME")
    prefix: str | None = option(
        "Where the encoder is in a checkpoint with several, such as student. (. for no prefix).", "PREFIX"
    )
    lora: str | Path | None = option("Merge this LoRA adapter of PEFT into the weights.", "ADAPTER")
    adapter_name: str | None = option("Adapter of an --lora file with several.", "NAME")
    fill_from: str | Path | None = option("Take tensors that SOURCE lacks from this checkpoint.", "SOURCE")

    def __post_init__(self) -> None:
        check_choices(dtype=(self.dtype, DTYPES))
        if self.image_size is not None and not 1 <= self.image_size <= _MAX_IMAGE_SIZE:
            raise UsageError(f"--image-size {self.image_size}: expected 1 to {_MAX_IMAGE_SIZE} pixels")
        if self.full_model and self.layout == self.canonical:
            raise UsageError(f"--full-model: {self.layout} holds the encoder alone", "name another layout with --to")
        if self.adapter_name is not None and self.lora is None:
            raise UsageError("--adapter-name: is for --lora", "name the adapter's file or folder with --lora")

    @property
    def canonical(self) -> str:
        """The name of the family's canonical layout."""
        return f"deepencoder-{self.family}"

    @property
    def layout(self) -> str:
        """The name of the layout to write."""
        return self.to or self.canonical


@dataclass(frozen=True, slots=True)
class HubOptions:
    """How to read sources on a hub; for all sources of a command."""

    revision: str | None = option("Branch, tag or commit on a hub. [default: the main branch]", "REV")
    hub: str | None = option("The hub of org/name sources. [default: $DSOCR_HUB, or hf]", "hf|modelscope")
    download: bool = option("Download whole files into the hub's cache.", default=False)


NO_HUB_OPTIONS = HubOptions()


def split_options(
    options: Mapping[str, Any], cls: Callable[..., _Options], **fixed: Any
) -> tuple[_Options, HubOptions]:
    """Split keyword arguments into a class of options and HubOptions; TypeError for an unknown one.

    Args:
        options: The keyword arguments.
        cls: The class of options.
        fixed: Other arguments of the class.
    """
    names = {item.name for item in fields(cls) if item.metadata}  # type: ignore[arg-type]
    hub_names = {item.name for item in fields(HubOptions)}
    if unknown := sorted(options.keys() - names - hub_names):
        expected = ", ".join(sorted(names | hub_names))
        raise TypeError(f"unknown option {', '.join(map(repr, unknown))}: expected {expected}")
    hub_options = HubOptions(**{name: value for name, value in options.items() if name in hub_names})
    return cls(**fixed, **{name: value for name, value in options.items() if name in names}), hub_options


def check_choices(**choices: tuple[str, Sequence[str]]) -> None:
    """Raise UsageError for an option whose value is not one of the allowed ones."""
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise UsageError(f"{name} {value!r}: expected one of {', '.join(filter(None, allowed))}")

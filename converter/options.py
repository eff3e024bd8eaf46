"""Options that commands and API functions share.

A field with metadata is a keyword of `converter.convert` and an option of the commands: a new option is a new field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from converter.errors import UsageError

DtypeName = Literal["keep", "float32", "float16", "bfloat16"]
DTYPES: tuple[str, ...] = get_args(DtypeName)
# Position embeddings of CLIP-L at this image size take 1.4 GB, which are computed in memory.
_MAX_IMAGE_SIZE = 8192


def _cli(help: str, *, metavar: str | None = None, type: Any = None) -> dict[str, Any]:
    """Make the metadata of a field that is a command-line option too; `type` replaces the field's own type there."""
    return {"help": help, "metavar": metavar, "type": type}


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """Options of a conversion.

    Attributes:
        family: The encoder to convert: sam, clip or qwen2.
        to: The layout to write; empty for the family's canonical layout, deepencoder-<family>.
        full_model: Also convert SAM's prompt encoder and mask decoder, or CLIP's text tower.
        mapping: A mapping file to use instead of layout detection.
        dtype: The type of floating-point tensors: keep, float32, float16 or bfloat16.
        image_size: The side of images in pixels to resample the position embeddings for.
        state_dict: Which state dict of a file with several (model, ema; `.` for the top).
        prefix: The prefix of the encoder's tensor names in a checkpoint that holds several; `.` for none.
        lora: A LoRA adapter of PEFT to merge into the weights: a file, a folder, or a repository on a hub.
        adapter_name: Which adapter of a file with several.

    Raises:
        UsageError: A value is not allowed, or options contradict each other.
    """

    family: str
    to: str = field(
        default="",
        metadata=_cli("Layout to write, as in `mapping list`. [default: the DeepEncoder's]", metavar="LAYOUT"),
    )
    full_model: bool = field(
        default=False, metadata=_cli("With --to: convert the full model, not only the vision encoder.")
    )
    mapping: str | Path | None = field(
        default=None,
        metadata=_cli("Use this mapping file; skip layout detection.", metavar="FILE.yaml", type=Path | None),
    )
    dtype: str = field(default="keep", metadata=_cli("Cast floating-point tensors.", type=DtypeName))
    image_size: int | None = field(
        default=None, metadata=_cli("Resample the position embeddings for this image size.", metavar="PIXELS")
    )
    state_dict: str | None = field(
        default=None, metadata=_cli("State dict of a file with several (model, ema; . for the top).", metavar="NAME")
    )
    prefix: str | None = field(
        default=None,
        metadata=_cli(
            "Where the encoder is in a checkpoint with several, such as student. (. for no prefix).", metavar="PREFIX"
        ),
    )
    lora: str | Path | None = field(
        default=None,
        metadata=_cli("Merge this LoRA adapter of PEFT into the weights.", metavar="ADAPTER", type=str | None),
    )
    adapter_name: str | None = field(
        default=None, metadata=_cli("Adapter of an --lora file with several.", metavar="NAME")
    )

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
    """How to read sources on a hub; for all sources of a command.

    Attributes:
        revision: A branch, tag or commit.
        hub: The hub of sources without a scheme: hf or modelscope.
        download: Download whole files into the hub's cache instead of reading the needed bytes.
    """

    revision: str | None = field(
        default=None, metadata=_cli("Branch, tag or commit on a hub. [default: the main branch]", metavar="REV")
    )
    hub: str | None = field(
        default=None,
        metadata=_cli("The hub of org/name sources. [default: $DSOCR_HUB, or hf]", metavar="hf|modelscope"),
    )
    download: bool = field(default=False, metadata=_cli("Download whole files into the hub's cache."))


NO_HUB_OPTIONS = HubOptions()


def split_options(family: str, options: Mapping[str, Any]) -> tuple[ConvertOptions, HubOptions]:
    """Sort keyword arguments into the two classes of options; TypeError for an unknown one."""
    names = [{item.name for item in fields(cls) if item.metadata} for cls in (ConvertOptions, HubOptions)]
    unknown = sorted(options.keys() - names[0] - names[1])
    if unknown:
        expected = ", ".join(sorted(names[0] | names[1]))
        raise TypeError(f"unknown option {', '.join(map(repr, unknown))}: expected {expected}")
    convert, hub = ({name: value for name, value in options.items() if name in group} for group in names)
    return ConvertOptions(family, **convert), HubOptions(**hub)


def check_choices(**choices: tuple[str, Sequence[str]]) -> None:
    """UsageError for an option whose value is not one of those allowed."""
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise UsageError(f"{name} {value!r}: expected one of {', '.join(allowed)}")

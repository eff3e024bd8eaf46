"""What a command found out, as values; the terminal's text and the JSON documents are views of them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from converter.tensors.tensor_info import TensorInfo


def as_json(value: Any) -> Any:
    """A value as JSON has it: named tuples are tables, and a number that is not finite is null."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class ConversionRecord(NamedTuple):
    """The record of one conversion.

    `files` are the source's, with their sizes in bytes. `converted` gives each output tensor the source tensors it is
    made of, in order; `dropped` each source tensor that was left out and why; `missing` each tensor of the target that
    the source cannot give, and why it may be missing; `filled` each that was made up. `sizes` are the model's, and
    `unusual` those of them that differ from DeepSeek-OCR's, as [found, DeepSeek-OCR's]. `wrapper` is the prefix that
    was removed from all names first. `commit` is a hub's for the files, `fetched` the bytes that came from there by
    file, `notes` what a user should know of where they were found. `written` tells a conversion from a dry run.
    """

    tool: str
    source: str
    files: dict[str, int]
    containers: list[str]
    state_dict: str
    wrapper: str
    family: str
    mapping: str
    mapping_sha256: str
    target: str
    output: str
    format: str
    dtype: str
    tensors: int
    nbytes: int
    dtypes: dict[str, int]
    converted: dict[str, list[str]]
    generated: dict[str, str]
    missing: dict[str, str]
    dropped: dict[str, str]
    sizes: dict[str, int]
    unusual: dict[str, list[int]]
    commit: str = ""
    notes: list[str] = []  # noqa: RUF012
    fetched: dict[str, int] = {}  # noqa: RUF012
    written: bool = False

    def metadata(self) -> dict[str, str]:
        """What a safetensors file says of its making; nothing in it depends on when or where that was."""
        return {
            # transformers refuses files that do not name their framework.
            "format": "pt",
            "tool": self.tool,
            "layout": self.target,
            "mapping": self.mapping,
            "mapping_sha256": self.mapping_sha256,
            # The names of local files would differ from machine to machine.
            **({"source": self.source, "commit": self.commit} if self.commit else {}),
        }

    def to_json(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        return cast("dict[str, Any]", as_json(self))


class Group(NamedTuple):
    """Tensors that differ by their layer alone: `name` has `{}` where their indices were, of which `layers` says which.

    `shapes` lists what shapes they have, most frequent first.
    """

    name: str
    layers: str
    tensors: int
    dtypes: list[str]
    shapes: list[list[int]]
    nbytes: int


class FittingLayout(NamedTuple):
    """A layout that a checkpoint fits, the names it was known by, and the card that a conversion would have.

    `card` is None where a conversion is not possible; `problem` says why.
    """

    family: str
    layout: str
    description: str
    prefix: str
    state_dicts: list[str]
    evidence: list[str]
    card: ConversionRecord | None
    problem: str


class Inspection(NamedTuple):
    """What a checkpoint holds. Counts are of the state dict with most tensors; `state_dicts` counts them all."""

    source: str
    files: dict[str, int]
    containers: list[str]
    state_dicts: dict[str, int]
    tensors: int
    nbytes: int
    dtypes: dict[str, int]
    groups: list[Group]
    recognised: list[FittingLayout]
    nearest: list[str]

    def to_json(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        return cast("dict[str, Any]", as_json(self))


def group_layers(tensors: Mapping[str, TensorInfo]) -> list[Group]:
    """The tensors with repeated layers folded into one group, in the order they were first met."""
    members: dict[tuple[str, int], list[str]] = {}
    for name, tensor in tensors.items():
        # Numbers may also tell apart the stages of a sequence; layers have tensors of one rank.
        pattern = re.sub(r"(?<![^.])[0-9]{1,9}(?![^.])", "{}", name)
        members.setdefault((pattern, len(tensor.shape)), []).append(name)
    groups = []
    for (pattern, _), names in members.items():
        parts = [tensors[name] for name in names]
        shapes = Counter(tensor.shape for tensor in parts)
        groups.append(
            Group(
                name=pattern if len(names) > 1 else names[0],
                layers=_ranges(pattern, names) if len(names) > 1 else "",
                tensors=len(names),
                dtypes=sorted({tensor.dtype.name for tensor in parts}),
                shapes=[list(shape) for shape, _ in shapes.most_common()],
                nbytes=sum(tensor.nbytes for tensor in parts),
            )
        )
    return groups


def _ranges(pattern: str, names: list[str]) -> str:
    """The indices that stand in a pattern's places, such as `0..23`."""
    places = [i for i, segment in enumerate(pattern.split(".")) if segment == "{}"]
    columns = [sorted({int(name.split(".")[place]) for name in names}) for place in places]
    return ", ".join(_range(column) for column in columns)


def _range(numbers: list[int]) -> str:
    # Sorted, and none twice.
    if len(numbers) > 1 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}..{numbers[-1]}"
    return " ".join(map(str, numbers))


def group_by_reason(dropped: Mapping[str, str]) -> dict[str, list[str]]:
    """Dropped names grouped by why."""
    groups: dict[str, list[str]] = {}
    for name, reason in dropped.items():
        groups.setdefault(reason, []).append(name)
    return groups


def group_plan(card: ConversionRecord) -> list[tuple[str, str, list[str]]]:
    """Output tensors with repeated layers folded: their name, what they are made of, and the names it stands for."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name in card.converted:
        rows.setdefault((_pattern(name), _pattern(_made_of(card, name))), []).append(name)
    return [
        (pattern, made_of, names) if len(names) > 1 else (names[0], _made_of(card, names[0]), names)
        for (pattern, made_of), names in rows.items()
    ]


def group_names(names: Iterable[str]) -> list[str]:
    """Names with those of repeated layers as one, each with how many it stands for where that is more than one."""
    rows: dict[str, list[str]] = {}
    for name in names:
        rows.setdefault(_pattern(name), []).append(name)
    return [f"{pattern} (x {len(names)})" if len(names) > 1 else names[0] for pattern, names in rows.items()]


def _made_of(card: ConversionRecord, name: str) -> str:
    return " + ".join(card.converted[name]) or f"filled in: {card.generated.get(name, '')}"


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)[0-9]+(?=\.)", "{}", name)


def shorten(names: Sequence[str], shown: int = 3) -> str:
    """The names or, of more than a few, their number and the first."""
    return ", ".join(names) if len(names) <= shown else f"{len(names)} tensors ({names[0]}, ...)"

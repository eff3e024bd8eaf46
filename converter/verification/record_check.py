"""A converted file against its card: names, shapes, types, metadata, and the digest of every tensor's bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import safetensors

from converter.checkpoint.open import Checkpoint
from converter.errors import ContainerError, UsageError
from converter.output.record_document import RECORD_FORMAT
from converter.storage.local_file import require_regular_file
from converter.storage.progress import OnProgress
from converter.tensors.evaluate import as_bytes
from converter.tensors.tensor_info import TensorInfo
from converter.verification.reference_readers import Reader
from converter.verification.result import Check, failed, passed

GROUP = "record"

# A card of CLIP-L has 150 kB.
_LARGEST = 64 << 20


class Recorded(NamedTuple):
    """What a card file says: `tensors` gives each tensor its type, shape and SHA-256.

    `metadata` is None where none were written.
    """

    path: Path
    family: str
    layout: str
    mapping: str
    metadata: dict[str, str] | None
    tensors: dict[str, tuple[str, list[int], str]]


def read_record(path: Path) -> Recorded:
    """The card in a file; ContainerError where it is none, UsageError where a model card was given instead."""
    if path.suffix == ".md":
        raise UsageError(f"--record {path}: a model card is for people", "give the card that ends in .json")
    try:
        require_regular_file(path, ContainerError)
        if path.stat().st_size > _LARGEST:
            raise ContainerError(f"{path}: larger than any card")
        return _recorded(path, json.loads(path.read_bytes()))
    except OSError as error:
        raise ContainerError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ContainerError(f"{path}: not a card that dsocr-convert wrote ({error})") from error


def _recorded(path: Path, document: Any) -> Recorded:
    if document["card"] != RECORD_FORMAT:
        raise ContainerError(f"{path}: a card of another form, {str(document['card'])[:20]!r}", "update dsocr-convert")
    tensors = {
        name: (str(entry["dtype"]), [int(size) for size in entry["shape"]], str(entry["sha256"]))
        for name, entry in document["tensors"].items()
    }
    written = document["metadata"]
    return Recorded(
        path,
        str(document["family"]),
        str(document["target"]["name"]),
        str(document["mapping"]["name"]),
        dict(written) if written is not None else None,
        tensors,
    )


def is_elsewhere(card: Recorded) -> bool:
    """Whether it is the card of a whole encoder, or of a file in another layout than the DeepEncoder's."""
    return not card.layout.startswith("deepencoder-")


def check_record(
    card: Recorded, source: Checkpoint, tensors: dict[str, TensorInfo], found: Reader, on_progress: OnProgress
) -> list[Check]:
    """Whether a file holds what its card says, tensor by tensor."""
    faults = [failed(GROUP, name, _presence(name, card), [name]) for name in sorted(set(tensors) ^ set(card.tensors))]
    both = [name for name in tensors if name in card.tensors]
    for done, name in enumerate(both):
        faults += _differing(card, name, tensors[name], found)
        on_progress("record", done + 1, len(both))
    if len(faults) > len(card.tensors) / 2:
        detail = f"{len(faults)} of {len(card.tensors)} tensors differ: {card.path.name} is the card of another file"
        faults.insert(0, failed(GROUP, "file", detail, [card.path.name]))
    detail = f"{len(both)} tensors have the names, shapes, types and SHA-256 digests that {card.path.name} gives"
    checks = faults or [passed(GROUP, "tensors", detail)]
    if card.metadata is not None:
        checks.append(_check_metadata(card, card.metadata, source))
    return checks


def _differing(card: Recorded, name: str, tensor: TensorInfo, found: Reader) -> list[Check]:
    dtype, shape, digest = card.tensors[name]
    if (tensor.dtype.name, list(tensor.shape)) != (dtype, shape):
        detail = f"{name} is {tensor.dtype.name} {list(tensor.shape)}; the card gives {dtype} {shape}"
        return [failed(GROUP, name, detail, [name])]
    seen = hashlib.sha256(as_bytes(found(name))).hexdigest()
    if seen != digest:
        return [failed(GROUP, name, f"{name} has the SHA-256 {seen}; the card gives {digest}", [name])]
    return []


def _presence(name: str, card: Recorded) -> str:
    return f"{name} is missing, though the card has it" if name in card.tensors else f"{name} is not on the card"


def _check_metadata(card: Recorded, wanted: dict[str, str], source: Checkpoint) -> Check:
    """The safetensors header's words on how the file was made."""
    there: dict[str, str] = {}
    for container, file in zip(source.containers, source.files, strict=True):
        if container == "safetensors":
            opened: Any = safetensors.safe_open(file.path, "pt")
            there |= opened.metadata() or {}
    differing = [key for key in sorted({*wanted, *there}) if wanted.get(key) != there.get(key)]
    if differing:
        words = "; ".join(f"{key} is {there.get(key)!r}, the card's {wanted.get(key)!r}" for key in differing)
        return failed(GROUP, "metadata", f"the file's metadata differ: {words}", differing)
    return passed(GROUP, "metadata", f"the file's metadata are the card's: {', '.join(sorted(wanted))}")

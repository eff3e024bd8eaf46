"""Checks that a converted file, and the config next to it, match the conversion record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors

from converter.checkpoint.open import Checkpoint
from converter.errors import ContainerError, UsageError
from converter.layouts import registry
from converter.output.record import RECORD_FORMAT
from converter.plan.assumptions import Assumption, Assumptions
from converter.plan.config_values import read_assumptions
from converter.storage.local_file import require_regular_file
from converter.storage.progress import OnProgress
from converter.tensors.evaluate import as_bytes
from converter.verification.functions import compare_config
from converter.verification.inputs import Converted
from converter.verification.result import FAILED, PASSED, Check

GROUP = "record"

# For comparison, the record of CLIP-L has 150 kB.
_MAX_BYTES = 64 << 20


class Record(NamedTuple):
    """The contents of a conversion record."""

    path: Path
    family: str
    layout: str
    mapping: str
    metadata: Mapping[str, str] | None  # None if the file's format has no metadata
    sizes: Mapping[str, int]
    assumptions: Assumptions  # The values that no tensor shows, such as the activation
    tensors: Mapping[str, tuple[str, str]]  # The type and shape, such as `float32 [1024]`, and the SHA-256 by name

    @property
    def is_canonical(self) -> bool:
        """Whether the file has the canonical layout of one encoder."""
        return self.layout.startswith("deepencoder-")


def read_record(path: Path) -> Record:
    """Read a conversion record; ContainerError for other files, UsageError for a model card."""
    if path.suffix == ".md":
        raise UsageError(f"--record {path}: is a model card", "specify the conversion record, which ends in .json")
    try:
        require_regular_file(path, ContainerError)
        if path.stat().st_size > _MAX_BYTES:
            raise ContainerError(f"{path}: too large for a conversion record")
        return _parse(path, json.loads(path.read_bytes()))
    except OSError as error:
        raise ContainerError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ContainerError(f"{path}: not a conversion record of dsocr-convert ({error})") from error


def _parse(path: Path, document: Any) -> Record:
    if document["record"] != RECORD_FORMAT:
        version = str(document["record"])[:20]
        raise ContainerError(f"{path}: a record of another format, {version!r}", "update dsocr-convert")
    metadata = document["metadata"]
    mappings = [str(mapping["name"]) for source in document["sources"] for mapping in source["mappings"]]
    return Record(
        path=path,
        family=str(document["family"]),
        layout=str(document["target"]["name"]),
        mapping=" + ".join(mappings),
        metadata=dict(metadata) if metadata is not None else None,
        sizes={name: int(size) for name, size in document["sizes"].items()},
        assumptions={name: Assumption(**entry) for name, entry in document["assumptions"].items()},
        tensors={
            name: (f"{entry['dtype']} {[int(n) for n in entry['shape']]}", str(entry["sha256"]))
            for name, entry in document["tensors"].items()
        },
    )


def check_record(record: Record, target: Converted, on_progress: OnProgress) -> list[Check]:
    """Compare a file with its record, tensor by tensor.

    Args:
        record: The conversion record.
        target: The converted file.
        on_progress: Called after each tensor.
    """
    problems = {
        name: "is missing, though the record has it" if name in record.tensors else "is not in the record"
        for name in sorted(record.tensors.keys() ^ target.tensors.keys())
    }
    common = [name for name in target.tensors if name in record.tensors]
    for done, name in enumerate(common, 1):
        if problem := _describe_difference(name, record, target):
            problems[name] = problem
        on_progress(GROUP, done, len(common))
    checks = [Check(GROUP, name, FAILED, f"{name} {problem}", [name]) for name, problem in problems.items()]
    if len(checks) > len(record.tensors) / 2:
        cause = f"{record.path.name} is the record of another file"
        detail = f"{len(checks)} of {len(record.tensors.keys() | target.tensors.keys())} tensors differ: {cause}"
        checks.insert(0, Check(GROUP, "file", FAILED, detail, [record.path.name]))
    detail = f"{len(common)} tensors have the names, shapes, types and SHA-256 digests in {record.path.name}"
    checks = checks or [Check(GROUP, "tensors", PASSED, detail)]
    # Files for the DeepEncoder have no config.
    if not record.is_canonical and record.family in registry.families():
        stated, remarks = read_assumptions(target.source, registry.canonical(record.family), record.sizes)
        checks += compare_config(GROUP, stated, remarks, record.assumptions, record.path.name)
    return checks if record.metadata is None else [*checks, _check_metadata(record.metadata, target.source)]


def _describe_difference(name: str, record: Record, target: Converted) -> str:
    """Return how a tensor differs from its record; empty if it does not."""
    type_and_shape, sha256 = record.tensors[name]
    tensor = target.tensors[name]
    actual = f"{tensor.dtype.name} {list(tensor.shape)}"
    if actual != type_and_shape:
        return f"is {actual}, in the record {type_and_shape}"
    digest = hashlib.sha256(as_bytes(target.read(tensor))).hexdigest()
    return "" if digest == sha256 else f"has SHA-256 {digest}, in the record {sha256}"


def _check_metadata(recorded: Mapping[str, str], source: Checkpoint) -> Check:
    actual = header_metadata(source)
    differing = [key for key in sorted({*recorded, *actual}) if recorded.get(key) != actual.get(key)]
    if differing:
        pairs = "; ".join(f"{key} is {actual.get(key)!r}, in the record {recorded.get(key)!r}" for key in differing)
        return Check(GROUP, "metadata", FAILED, f"metadata differs: {pairs}", differing)
    return Check(GROUP, "metadata", PASSED, f"metadata matches the record: {', '.join(sorted(recorded))}")


def header_metadata(source: Checkpoint) -> dict[str, str]:
    """Return the metadata in the headers of a checkpoint's safetensors files."""
    metadata: dict[str, str] = {}
    for container, file in zip(source.containers, source.files, strict=True):
        if container == "safetensors":
            opened: Any = safetensors.safe_open(file.path, "pt")
            metadata |= opened.metadata() or {}
    return metadata

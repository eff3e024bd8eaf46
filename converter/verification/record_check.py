"""Record: names, shapes, types, metadata and SHA-256 of every tensor, and the config, match the conversion record."""

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

# The record of CLIP-L has 150 kB.
_MAX_BYTES = 64 << 20


class Record(NamedTuple):
    """The contents of a conversion record."""

    path: Path
    family: str
    layout: str
    mapping: str
    metadata: Mapping[str, str] | None  # None if none was written
    sizes: Mapping[str, int]
    assumptions: Assumptions  # What no tensor shows, as the source's config states it
    tensors: Mapping[str, tuple[str, str]]  # Type and shape, such as `float32 [1024]`, and SHA-256 by name

    @property
    def canonical(self) -> bool:
        """Whether the file has an encoder's canonical layout: not another layout, nor a whole DeepEncoder."""
        return self.layout.startswith("deepencoder-")


def read_record(path: Path) -> Record:
    """Read a conversion record; ContainerError if it is none, UsageError for a model card."""
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
        found = str(document["record"])[:20]
        raise ContainerError(f"{path}: a record of another format, {found!r}", "update dsocr-convert")
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
        if problem := _problem(name, record, target):
            problems[name] = problem
        on_progress(GROUP, done, len(common))
    checks = [Check(GROUP, name, FAILED, f"{name} {problem}", [name]) for name, problem in problems.items()]
    if len(checks) > len(record.tensors) / 2:
        cause = f"{record.path.name} is the record of another file"
        detail = f"{len(checks)} of {len(record.tensors.keys() | target.tensors.keys())} tensors differ: {cause}"
        checks.insert(0, Check(GROUP, "file", FAILED, detail, [record.path.name]))
    detail = f"{len(common)} tensors have the names, shapes, types and SHA-256 digests in {record.path.name}"
    checks = checks or [Check(GROUP, "tensors", PASSED, detail)]
    # A whole DeepEncoder has no config.
    if not record.canonical and record.family in registry.families():
        stated, remarks = read_assumptions(target.source, registry.canonical(record.family), record.sizes)
        checks += compare_config(GROUP, stated, remarks, record.assumptions, record.path.name)
    return checks if record.metadata is None else [*checks, _check_metadata(record.metadata, target.source)]


def _problem(name: str, record: Record, target: Converted) -> str:
    """How a tensor differs from its record; empty if it does not."""
    kind, sha256 = record.tensors[name]
    tensor = target.tensors[name]
    actual = f"{tensor.dtype.name} {list(tensor.shape)}"
    if actual != kind:
        return f"is {actual}, in the record {kind}"
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
    """The metadata in the headers of safetensors files."""
    metadata: dict[str, str] = {}
    for container, file in zip(source.containers, source.files, strict=True):
        if container == "safetensors":
            opened: Any = safetensors.safe_open(file.path, "pt")
            metadata |= opened.metadata() or {}
    return metadata

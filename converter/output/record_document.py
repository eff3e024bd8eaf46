"""The card of a conversion: from what was found and planned, and as a document with every digest.

The document holds nothing that depends on time, machine or where files lie: the same input gives the same card.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from converter import __version__
from converter.checkpoint.open import Checkpoint
from converter.hub.address import is_address
from converter.layouts import registry
from converter.options import ConvertOptions
from converter.output.record import ConversionRecord
from converter.plan.planner import ResolvedPlan
from converter.storage.local_file import SourceFile, sha256_of
from converter.storage.progress import OnProgress, progress_counter
from converter.tensors.dtypes import BY_NAME
from converter.tensors.lazy_tensor import LazyTensor, byte_ranges, nbytes, source_tensors

# The version of the document's form.
RECORD_FORMAT = 1


def make_record(
    opened: Checkpoint, resolve: ResolvedPlan, options: ConvertOptions, output: Path | None, format: str
) -> ConversionRecord:
    """The card of a conversion that has not been made yet."""
    known, plan = resolve
    return ConversionRecord(
        tool=f"dsocr-convert {__version__}",
        source=opened.name,
        files={file.name: file.size for file in opened.files},
        containers=sorted(set(opened.containers)),
        state_dict=known.state_dict.path,
        wrapper=known.wrapper,
        family=options.family,
        mapping=plan.mapping.name,
        mapping_sha256=plan.mapping.digest,
        target=plan.layout,
        output=str(output) if output else "",
        format=format,
        dtype=options.dtype,
        tensors=len(plan.outputs),
        nbytes=plan.nbytes,
        dtypes=count_dtypes(plan.outputs.values()),
        converted={name: [tensor.key for tensor in source_tensors(value)] for name, value in plan.outputs.items()},
        generated=plan.generated,
        missing=plan.missing,
        dropped=plan.dropped,
        sizes=plan.sizes,
        unusual={name: list(pair) for name, pair in plan.unusual.items()},
        commit=opened.commit,
        notes=list(opened.notes),
    )


def count_dtypes(values: Iterable[LazyTensor]) -> dict[str, int]:
    """How many tensors have each element type, in the order of the table of types."""
    names = [value.dtype.name for value in values]
    return {name: names.count(name) for name in BY_NAME if name in names}


class TensorDigests:
    """The SHA-256 of every output tensor's bytes, taken as they pass: called with them, in the order of the outputs."""

    def __init__(self, outputs: dict[str, LazyTensor]) -> None:
        self._hashes = {name: hashlib.sha256() for name in outputs}
        self._todo = deque((self._hashes[name], nbytes(value)) for name, value in outputs.items() if nbytes(value))

    def __call__(self, data: memoryview) -> None:
        while data:
            digest, left = self._todo.popleft()
            digest.update(data[:left])
            if left > len(data):
                self._todo.appendleft((digest, left - len(data)))
            data = data[left:]

    def hex(self, name: str) -> str:
        """The digest of a tensor, in hexadecimal."""
        return self._hashes[name].hexdigest()


def record_document(
    card: ConversionRecord,
    outputs: Mapping[str, LazyTensor],
    opened: Sequence[Checkpoint],
    digests: TensorDigests,
    metadata: dict[str, str] | None,
    on_progress: OnProgress,
) -> dict[str, Any]:
    """The card as a document; `opened` are the sources, `metadata` what the output says of its making, if it does.

    A tensor's `from` lists what it is made of, in order, each with the index of its source in `sources`.
    """
    where = {file: index for index, source in enumerate(opened) for file in source.files}
    tensors = {
        name: {
            "dtype": value.dtype.name,
            "shape": list(value.shape),
            "sha256": digests.hex(name),
            "from": [{"key": tensor.key, "source": where[tensor.storage.file]} for tensor in source_tensors(value)],
            **({"filled": card.generated[name]} if name in card.generated else {}),
        }
        for name, value in outputs.items()
    }
    return {
        "card": RECORD_FORMAT,
        "tools": _tools(outputs),
        "family": card.family,
        "format": card.format,
        "dtype": card.dtype,
        "mapping": {"name": card.mapping, "sha256": card.mapping_sha256},
        "target": {
            "name": card.target,
            "sha256": " + ".join(part.digest for part in registry.layouts_of(card.target)),
        },
        "state_dict": card.state_dict,
        "wrapper": card.wrapper,
        "sources": _sources(opened, on_progress),
        "metadata": metadata,
        "nbytes": card.nbytes,
        "tensors": tensors,
        "dropped": card.dropped,
        "missing": card.missing,
        "sizes": card.sizes,
        "unusual": card.unusual,
    }


def _tools(outputs: Mapping[str, LazyTensor]) -> dict[str, str]:
    """The versions of what the output's bytes depend on: torch's only where it computed some of them."""
    tools = {"dsocr-convert": __version__}
    if any(byte_ranges(value) is None for value in outputs.values()):
        import torch

        tools["torch"] = str(torch.__version__)
    return tools


def _sources(opened: Sequence[Checkpoint], on_progress: OnProgress) -> list[dict[str, Any]]:
    local = [file for source in opened for file in source.files if file.identity is not None]
    count = progress_counter(on_progress, "digesting the source", sum(file.size for file in local))
    return [
        {
            "name": source.name if is_address(source.name) else PurePath(source.name).name,
            "commit": source.commit,
            "containers": list(source.containers),
            "files": [_file(file, count) for file in source.files],
        }
        for source in opened
    ]


def _file(file: SourceFile, count: Callable[[int], None]) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": PurePath(file.name).name, "size": file.size}
    if file.identity is None:
        return {**entry, "sha256": None, "why": "fetched in parts: the commit stands for the whole"}
    return {**entry, "sha256": sha256_of(file, count)}

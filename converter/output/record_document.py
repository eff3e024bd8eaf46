"""The conversion record as a JSON document, with the digests of the sources and of every tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from converter import __version__
from converter.checkpoint.open import Checkpoint
from converter.hub.address import is_address
from converter.output.digests import TensorDigests
from converter.output.json_document import as_json
from converter.output.record import RECORD_FORMAT, ConversionRecord
from converter.storage.local_file import SourceFile, sha256_of
from converter.storage.progress import OnProgress, progress_counter
from converter.tensors.lazy_tensor import LazyTensor, byte_ranges, source_tensors


def record_document(
    record: ConversionRecord,
    outputs: Mapping[str, LazyTensor],
    sources: Sequence[Checkpoint],
    digests: TensorDigests,
    metadata: dict[str, str] | None,
    on_progress: OnProgress,
) -> dict[str, Any]:
    """Make the JSON document of a conversion; reads local source files for their digests.

    Args:
        record: The conversion.
        outputs: The output tensors. Each tensor's `from` lists its source tensors with an index into `sources`.
        sources: The checkpoints that were read.
        digests: The digests of the output tensors.
        metadata: The `__metadata__` of the output, or None if it has none.
        on_progress: Called with the bytes of source files read.
    """
    index_of = {file: index for index, source in enumerate(sources) for file in source.files}

    def describe(name: str, value: LazyTensor) -> dict[str, Any]:
        return {
            "dtype": value.dtype.name,
            "shape": list(value.shape),
            "sha256": digests.hex(name),
            "from": [{"key": tensor.key, "source": index_of[tensor.storage.file]} for tensor in source_tensors(value)],
            **({"generated": record.generated[name]} if name in record.generated else {}),
        }

    return {
        "record": RECORD_FORMAT,
        "tools": _tools(outputs),
        "family": record.family,
        "format": record.format,
        "dtype": record.dtype,
        "target": {
            "name": record.target,
            "sha256": {layout.name: layout.digest for layout in record.layouts},
        },
        "sources": _sources(record, sources, on_progress),
        "metadata": metadata,
        "nbytes": record.nbytes,
        "tensors": {name: describe(name, value) for name, value in outputs.items()},
        **({"merged": as_json(record.merged)} if record.merged else {}),
        "dropped": record.dropped,
        "missing": record.missing,
        "overflows": record.overflows,
        "sizes": record.sizes,
        "unusual": as_json(record.unusual),
        "assumptions": as_json(record.assumptions),
    }


def _tools(outputs: Mapping[str, LazyTensor]) -> dict[str, str]:
    """The versions of the programs that made the output's bytes: torch's only if it computed some of them."""
    tools = {"dsocr-convert": __version__}
    if any(byte_ranges(value) is None for value in outputs.values()):
        import torch

        tools["torch"] = str(torch.__version__)
    return tools


def _sources(record: ConversionRecord, sources: Sequence[Checkpoint], on_progress: OnProgress) -> list[dict[str, Any]]:
    local = [file for source in sources for file in source.files if file.identity is not None]
    on_bytes = progress_counter(on_progress, "digesting the source", sum(file.size for file in local))
    return [
        {
            "name": source.name if is_address(source.name) else PurePath(source.name).name,
            "commit": source.commit,
            "containers": list(source.containers),
            "mappings": as_json(recorded.mappings),
            "files": [_file(file, on_bytes) for file in source.files],
        }
        for source, recorded in zip(sources, record.sources, strict=True)
    ]


def _file(file: SourceFile, on_bytes: Callable[[int], None]) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": PurePath(file.name).name, "size": file.size}
    if file.identity is None:
        return {**entry, "sha256": None, "reason": "fetched in parts: identified by the commit"}
    return {**entry, "sha256": sha256_of(file, on_bytes)}

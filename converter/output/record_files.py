"""Makes the files of a conversion record: a JSON document with SHA-256 digests, and a model card."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from converter import __version__
from converter.checkpoint.open import Checkpoint
from converter.errors import OutputError, UsageError
from converter.hub.address import is_address
from converter.output.json_document import as_json, canonical_json
from converter.output.record import RECORD_FORMAT, ConversionRecord
from converter.output.target import is_source
from converter.storage.atomic_output import output_errors
from converter.storage.local_file import SourceFile, sha256_of
from converter.storage.progress import OnProgress, progress_counter
from converter.tensors.lazy_tensor import LazyTensor, byte_ranges, nbytes, source_tensors
from converter.tensors.serialize import Outputs

# Fields of ConversionRecord that are copied to the document.
_COPIED_FIELDS = (
    *("family", "format", "dtype", "nbytes"),
    *("dropped", "missing", "overflows", "sizes", "unusual", "assumptions"),
)


class TensorDigests:
    """Computes the SHA-256 of every output tensor while the tensors are written.

    Call the object with each chunk of tensor data, in the order of `outputs`.
    """

    def __init__(self, outputs: Mapping[str, LazyTensor]) -> None:
        self._hashes = {name: hashlib.sha256() for name in outputs}
        # The hashes of incomplete tensors, each with the number of bytes to come.
        self._pending = deque((self._hashes[name], nbytes(value)) for name, value in outputs.items() if nbytes(value))

    def __call__(self, data: memoryview) -> None:
        while data:
            hasher, num_bytes = self._pending.popleft()
            hasher.update(data[:num_bytes])
            if num_bytes > len(data):
                self._pending.appendleft((hasher, num_bytes - len(data)))
            data = data[num_bytes:]

    def hex(self, name: str) -> str:
        """Return the digest of a tensor in hexadecimal."""
        return self._hashes[name].hexdigest()


class RecordFiles:
    """The files of a conversion record: .json for the record, .md for a model card; UsageError for other names."""

    def __init__(self, paths: str | Path | Sequence[str | Path]) -> None:
        self.paths = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
        for path in self.paths:
            if path.suffix not in (".json", ".md"):
                raise UsageError(f"--record {path}: expected a name that ends in .json, or .md for a model card")

    def check_names(self, output: Path, opened: Sequence[Checkpoint], mapping: str | Path | None = None) -> None:
        """Raise OutputError if a file would replace another file of the conversion.

        Args:
            output: The output. If it is a folder, the record must be outside it.
            opened: The sources.
            mapping: The mapping file.
        """
        with output_errors(output):
            taken = [output.resolve()]
        for path in self.paths:
            with output_errors(path):
                resolved = path.resolve()
            if resolved in taken or is_source(path, opened, mapping):
                raise OutputError(f"{path}: cannot be the record: it is another file of this conversion")
            if taken[0] in resolved.parents:
                raise OutputError(f"{path}: is inside the output folder", "write it elsewhere, and move it there later")
            taken.append(resolved)

    def contents(
        self,
        record: ConversionRecord,
        outputs: Outputs,
        opened: Sequence[Checkpoint],
        digests: TensorDigests,
        metadata: dict[str, str] | None,
        on_progress: OnProgress,
    ) -> Iterator[tuple[Path, bytes]]:
        """Yield the path and content of each file. Local sources are read once more to compute their digests.

        Args:
            record: The conversion.
            outputs: The tensors that were written.
            opened: The sources.
            digests: The digests of the tensors that were written.
            metadata: The metadata in the output's header, if its format has any.
            on_progress: Called as the sources are read.
        """
        document = _document(record, outputs, opened, digests, metadata, on_progress)
        names = [path.name for path in self.paths if path.suffix == ".json"]
        for path in self.paths:
            if path.suffix == ".json":
                yield path, canonical_json(document)
                continue
            from converter.output.model_card import model_card

            # Names of files may hold bytes that are not UTF-8.
            yield path, model_card(record, document, names).encode(errors="backslashreplace")


def _document(
    record: ConversionRecord,
    outputs: Outputs,
    opened: Sequence[Checkpoint],
    digests: TensorDigests,
    metadata: dict[str, str] | None,
    on_progress: OnProgress,
) -> dict[str, Any]:
    """Return the JSON document of a record. The arguments are the same as in `RecordFiles.contents`."""
    sources = _sources(record, opened, on_progress)
    index_of = {file: index for index, source in enumerate(opened) for file in source.files}
    tensors = {
        name: {
            "dtype": value.dtype.name,
            "shape": list(value.shape),
            "sha256": digests.hex(name),
            # `source` is an index into `sources`.
            "from": [{"key": leaf.key, "source": index_of[leaf.storage.file]} for leaf in source_tensors(value)],
            **({"generated": record.generated[name]} if name in record.generated else {}),
        }
        for name, value in outputs.items()
    }
    return {
        "record": RECORD_FORMAT,
        "tools": _tools(outputs),
        "target": {"name": record.target, "sha256": {layout.name: layout.digest for layout in record.layouts}},
        "sources": sources,
        "metadata": metadata,
        "tensors": tensors,
        **({"merged": as_json(record.merged)} if record.merged else {}),
        **{name: as_json(getattr(record, name)) for name in _COPIED_FIELDS},
    }


def _tools(outputs: Mapping[str, LazyTensor]) -> dict[str, str]:
    """Return the versions of the programs that computed the output; of torch only if it computed a tensor."""
    tools = {"dsocr-convert": __version__}
    if any(byte_ranges(value) is None for value in outputs.values()):
        import torch

        tools["torch"] = str(torch.__version__)
    return tools


def _sources(record: ConversionRecord, opened: Sequence[Checkpoint], on_progress: OnProgress) -> list[dict[str, Any]]:
    local = [file for source in opened for file in source.files if file.identity is not None]
    on_bytes = progress_counter(on_progress, "digesting the source", sum(file.size for file in local))
    return [
        {
            "name": source.name if is_address(source.name) else PurePath(source.name).name,
            "commit": source.commit,
            "containers": list(source.containers),
            "mappings": as_json(recorded.mappings),
            "files": [_file(file, on_bytes) for file in source.files],
        }
        for source, recorded in zip(opened, record.sources, strict=True)
    ]


def _file(file: SourceFile, on_bytes: Callable[[int], None]) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": PurePath(file.name).name, "size": file.size}
    if file.identity is None:
        return {**entry, "sha256": None, "reason": "fetched in parts: identified by the commit"}
    return {**entry, "sha256": sha256_of(file, on_bytes)}

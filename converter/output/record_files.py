"""Writes the record of a conversion to files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from converter.checkpoint.open import Checkpoint
from converter.errors import OutputError, UsageError
from converter.output.digests import TensorDigests
from converter.output.json_document import canonical_json
from converter.output.record import ConversionRecord
from converter.output.record_document import record_document
from converter.output.target import is_source
from converter.storage.atomic_output import output_errors
from converter.storage.progress import OnProgress
from converter.tensors.serialize import Outputs


class RecordFiles:
    """The files of a conversion's record: .json for the record itself, .md for a model card."""

    def __init__(self, paths: str | Path | Sequence[str | Path]) -> None:
        """Raise UsageError for a file with another suffix."""
        self.paths = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
        for path in self.paths:
            if path.suffix not in (".json", ".md"):
                raise UsageError(f"--record {path}: expected a name that ends in .json, or .md for a model card")

    def check_names(self, output: Path, opened: Sequence[Checkpoint], mapping: str | Path | None = None) -> None:
        """Raise OutputError if a file would replace another one of the conversion.

        Args:
            output: The output, which the record must not be in.
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
            if output.resolve() in resolved.parents:
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
        """Yield each file with its content. Local sources are read once more, for their digests.

        Args:
            record: The conversion.
            outputs: The tensors that were written.
            opened: The sources.
            digests: The digests of the tensors that were written.
            metadata: The metadata in the output's header, if its format has any.
            on_progress: Called as the sources are read.
        """
        document = record_document(record, outputs, opened, digests, metadata, on_progress)
        names = [path.name for path in self.paths if path.suffix == ".json"]
        for path in self.paths:
            if path.suffix == ".json":
                yield path, canonical_json(document)
                continue
            from converter.output.model_card import model_card

            # Names of files may hold bytes that are not UTF-8.
            yield path, model_card(record, document, names).encode(errors="backslashreplace")

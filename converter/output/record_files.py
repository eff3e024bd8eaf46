"""The files that a conversion's card is written to, which appear with the output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from converter.checkpoint.open import Checkpoint
from converter.errors import OutputError, UsageError
from converter.output.json_document import canonical_json
from converter.output.record import ConversionRecord
from converter.output.record_document import TensorDigests, record_document
from converter.output.target import check_target, is_source
from converter.storage.atomic_output import Staging, check_name, write_all, writing
from converter.storage.progress import OnProgress
from converter.tensors.lazy_tensor import LazyTensor


class RecordFiles:
    """The files that a conversion's card goes into: .json for machines, .md for a hub."""

    def __init__(self, paths: str | Path | Sequence[str | Path]) -> None:
        """UsageError for a file of another kind."""
        self._paths = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
        self._staged: dict[Path, int] = {}
        for path in self._paths:
            if path.suffix not in (".json", ".md"):
                raise UsageError(f"--record {path}: expected a name that ends in .json, or .md for a model card")

    @property
    def _documents(self) -> list[Path]:
        return [path for path in self._paths if path.suffix == ".json"]

    @property
    def all(self) -> list[Path]:
        """The files."""
        return self._paths

    def check(self, output: Path, opened: Sequence[Checkpoint], force: bool, mapping: str | Path | None = None) -> None:
        """OutputError for a file that could not be written, or is the output's, the source's or another input."""
        taken = [output.resolve()]
        for path in self.all:
            check_name(path)
            if path.resolve() in taken or is_source(path, opened, mapping):
                raise OutputError(f"{path}: cannot be the card: it is another file of this conversion")
            if output.resolve() in path.resolve().parents:
                raise OutputError(
                    f"{path}: lies in the output, a folder that appears whole", "move it there afterwards"
                )
            check_target(path, force, 0, "card")
            taken.append(path.resolve())

    def stage(self, staging: Staging, outputs: dict[str, LazyTensor]) -> TensorDigests | None:
        """Begin the files, which then appear with the output; what to show the outputs' bytes to, if there are any."""
        self._staged = {path: staging.file(path) for path in self.all}
        return TensorDigests(outputs) if self._paths else None

    def write(
        self,
        card: ConversionRecord,
        outputs: dict[str, LazyTensor],
        opened: Sequence[Checkpoint],
        digests: TensorDigests | None,
        metadata: dict[str, str] | None,
        on_progress: OnProgress,
    ) -> None:
        """Fill the files, whose tensors' digests are complete. Reads local sources once more, for theirs.

        `metadata` is what the output says of its making, if it says anything.
        """
        if digests is None:
            return
        document = record_document(card, outputs, opened, digests, metadata, on_progress)
        data = canonical_json(document)
        for path in self._paths:
            if path.suffix == ".md":
                from converter.output.model_card import model_card

                text = model_card(card, document, [path.name for path in self._documents])
                # Files' names may hold bytes that are no UTF-8.
                self._put(path, text.encode(errors="backslashreplace"))
                continue
            self._put(path, data)

    def _put(self, path: Path, data: bytes) -> None:
        with writing(path):
            write_all(self._staged[path], memoryview(data))

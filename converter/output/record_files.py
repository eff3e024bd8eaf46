"""The files that a conversion's card is written to, which appear with the output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from converter.checkpoint.open import Checkpoint, OnProgress
from converter.errors import OutputError, UsageError
from converter.output.record import ConversionRecord
from converter.output.record_document import TensorDigests, canonical_json, record_document
from converter.output.target import check_target, is_source
from converter.storage.atomic_output import Staging, check_name, write_all, writing
from converter.tensors.lazy_tensor import LazyTensor


class RecordFiles:
    """The files that a conversion's card goes into: .json for machines, .md for a hub; `key` signs the .json ones.

    `key` is the path of a PEM file with an elliptic-curve private key; the signature goes beside the card, as .sig.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path], key: str | Path | None) -> None:
        """UsageError for a file of another kind, or a key and nothing to sign."""
        self._paths = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
        self._key = Path(key) if key is not None else None
        self._staged: dict[Path, int] = {}
        for path in self._paths:
            if path.suffix not in (".json", ".md"):
                raise UsageError(f"--card {path}: expected a name that ends in .json, or .md for a model card")
        if key is not None and not self._documents:
            raise UsageError("--sign: signs the card, which holds every tensor's digest\nadd --card FILE.json")

    @property
    def _documents(self) -> list[Path]:
        return [path for path in self._paths if path.suffix == ".json"]

    @property
    def all(self) -> list[Path]:
        """The files, with the signatures."""
        return [*self._paths, *(signature_of(path) for path in self._documents if self._key)]

    def check(self, output: Path, opened: Sequence[Checkpoint], force: bool, mapping: str | Path | None = None) -> None:
        """OutputError for a file that could not be written, or is the output's, the source's or another input."""
        taken = [output.resolve()]
        if self._key is not None and is_source(output, (), self._key):
            raise OutputError(f"{output}: is the key to sign with\nchoose another path with --output")
        for path in self.all:
            check_name(path)
            if path.resolve() in taken or is_source(path, opened, mapping, self._key):
                raise OutputError(f"{path}: cannot be the card: it is another file of this conversion")
            if output.resolve() in path.resolve().parents:
                raise OutputError(f"{path}: lies in the output, a folder that appears whole\nmove it there afterwards")
            check_target(path, force, 0, "card")
            taken.append(path.resolve())
        if self._key is not None:
            from converter.output.signing import signer

            signer(self._key)

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
            if self._key is not None:
                from converter.output.signing import sign

                with writing(signature_of(path)):
                    signature = sign(data, path.name, self._key)
                self._put(signature_of(path), signature)

    def _put(self, path: Path, data: bytes) -> None:
        with writing(path):
            write_all(self._staged[path], memoryview(data))


def signature_of(card: Path) -> Path:
    """Where the signature of a card lies."""
    return card.with_name(f"{card.name}.sig")

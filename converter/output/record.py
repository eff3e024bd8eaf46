"""What a command found out, as values; the terminal's text and the JSON documents are views of them."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from converter.output.json_document import as_json


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

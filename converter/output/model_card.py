"""Renders the model card of a conversion: Markdown with YAML front matter for Hugging Face and ModelScope."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from converter.errors import printable
from converter.hub.address import is_address, parse_address
from converter.options import NO_HUB_OPTIONS
from converter.output.json_document import canonical_json
from converter.output.names import fold_key_map, fold_names, group_by_reason, overflow_warning
from converter.output.record import ConversionRecord, RecordedSource

# The library that loads a layout, by the suffix of the layout's name.
_LIBRARIES = {"-hf": "transformers", "-timm": "timm", "-open_clip": "open_clip"}


def model_card(record: ConversionRecord, document: dict[str, Any], record_files: Sequence[str]) -> str:
    """Render the model card of a conversion.

    Args:
        record: The conversion.
        document: The conversion record as a JSON document.
        record_files: The names of the JSON files of the record.
    """
    environment = Environment(
        loader=PackageLoader("converter", "output"),
        # The template is Markdown, so the filters `text` and `code` escape names.
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"json": json.dumps, "text": _text, "code": _code, "printable": printable}
    environment.filters |= {"by_reason": group_by_reason, "fold": fold_names}
    name = PurePath(record.output).name
    addresses = [parse_address(source.name, NO_HUB_OPTIONS) for source in record.sources if is_address(source.name)]
    repositories = list(dict.fromkeys(address.repository for address in addresses))
    suffixes = [suffix for suffix in _LIBRARIES if record.target.endswith(suffix)]
    encoder = f"{record.family.upper()} in the layout `{record.target}`"
    return environment.get_template("model_card.md").render(
        name=name,
        record=record,
        document=document,
        digest=hashlib.sha256(canonical_json(document)).hexdigest(),
        base_model=repositories if len(repositories) > 1 else "".join(repositories),
        library=_LIBRARIES[suffixes[0]] if suffixes else "pytorch",
        tags=dict.fromkeys(("deepseek-ocr", record.family, record.target, "dsocr-convert")),
        content="A DeepEncoder" if record.family == "deepencoder" else encoder,
        tensors=list(_tensor_rows(record, document["tensors"])),
        overflows=overflow_warning(record.overflows),
        merged=_count_merged(record),
        commands=list(_verify_commands(record, name, record_files)),
    )


def _tensor_rows(record: ConversionRecord, tensors: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for row in fold_key_map(record.converted):
        shapes = {str(tensors[name]["shape"]) for name in row.members}
        yield {
            "name": row.name,
            "number": len(row.members),
            "dtype": tensors[row.members[0]]["dtype"],
            "shape": shapes.pop() if len(shapes) == 1 else "(several shapes)",
            "made_of": " + ".join(row.sources) or f"generated: {record.generated[row.members[0]]}",
        }


def _count_merged(record: ConversionRecord) -> list[str]:
    """Return lines with the number of merged modules for each rank and alpha, and of modules trained as a whole."""
    kinds = Counter(
        "trained whole" if module.rank is None else f"rank {module.rank}, alpha {module.alpha:g}"
        for module in record.merged.values()
    )
    return [f"{number} modules of {kind}" for kind, number in kinds.items()]


def _verify_commands(record: ConversionRecord, name: str, record_files: Sequence[str]) -> Iterator[str]:
    for file in record_files:
        yield shlex.join(["dsocr-verify", name, "--record", file])
    if record.target == f"deepencoder-{record.family}":
        adapter = ["--source", f"lora={_source_arguments(record.sources[-1])[0]}"] if record.merged else []
        yield shlex.join(["dsocr-verify", name, "--source", *_source_arguments(record.sources[0]), *adapter])


def _source_arguments(source: RecordedSource) -> list[str]:
    """Return command-line arguments for a source, with the commit if it is on a hub."""
    if not is_address(source.name):
        return [PurePath(source.name).name]
    address = parse_address(source.name, NO_HUB_OPTIONS)
    return [f"{address.hub}://{address.repository}/{address.path}", "--revision", source.commit]


def _code(text: str) -> str:
    """Format a name as inline code. Names may come from untrusted files."""
    return f"`{_text(text).replace('`', chr(0x2BB))}`" if text else ""


def _text(text: str) -> str:
    """Escape control characters and cell borders in the text of a table cell."""
    return printable(text).replace("|", "\\|")

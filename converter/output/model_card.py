"""The card of a conversion as a Markdown model card: YAML front matter as the hubs read it, then words and tables."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePath
from typing import Any

from converter.hub.address import is_address, parse
from converter.layouts import registry
from converter.options import HubOptions
from converter.output.json_document import canonical_json
from converter.output.names import fold_key_map, fold_names, group_by_reason
from converter.output.record import ConversionRecord

# What loads a layout, by the end of its name, as the hubs call it.
_LIBRARIES = {"-hf": "transformers", "-timm": "timm", "-open_clip": "open_clip"}


def model_card(card: ConversionRecord, document: dict[str, Any], documents: Sequence[str]) -> str:
    """The text of the model card; `document` is the card as JSON, and `documents` the files beside that hold it."""
    name = PurePath(card.output).name
    sources = [source["name"] for source in document["sources"]]
    lines = ["---", *_front_matter(card, sources), "---", "", f"# {name}", "", *_what(card), ""]
    lines += [*_table(("", ""), _facts(card, document)), "", "## Tensors", "", *_tensors(card, document), ""]
    lines += [*_left_out(card), "## How to verify", "", *_verify(card, name, documents), ""]
    digest = hashlib.sha256(canonical_json(document)).hexdigest()
    lines += [f"The card as JSON, which holds the digest of every tensor, has the SHA-256 `{digest}`."]
    return "\n".join(lines) + "\n"


def _front_matter(card: ConversionRecord, names: Sequence[str]) -> Iterator[str]:
    """YAML, given the sources' names. Strings are written as JSON: that is YAML too, and needs no rules for quoting."""
    base = [parse(name, HubOptions()).repository for name in names if is_address(name)]
    if base:
        yield f"base_model: {json.dumps(base[0] if len(base) == 1 else base)}"
    yield f"library_name: {json.dumps(_library(card.target))}"
    yield "tags:"
    for tag in dict.fromkeys(("deepseek-ocr", card.family, card.target, "dsocr-convert")):
        yield f"- {json.dumps(tag)}"


def _pinned(card: ConversionRecord) -> list[str]:
    """The source as arguments of a command that finds the same files."""
    if not is_address(card.source):
        return [PurePath(card.source).name]
    found = parse(card.source, HubOptions())
    return [f"{found.hub}://{found.repository}/{found.path}", *(["--revision", card.commit] if card.commit else [])]


def _library(layout: str) -> str:
    return next((library for end, library in _LIBRARIES.items() if layout.endswith(end)), "pytorch")


def _what(card: ConversionRecord) -> Iterator[str]:
    description = "; ".join(layout.description for layout in registry.layouts_of(card.target))
    what = (
        "A whole DeepEncoder" if card.target == card.family else f"{card.family.upper()} in the layout `{card.target}`"
    )
    yield f"{what}: {description}. Converted by {card.tool}."
    yield "Nothing was trained: the weights, and their licence, are the source's."


def _facts(card: ConversionRecord, document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for source in document["sources"]:
        commit = f", commit {_code(source['commit'])}" if source["commit"] else ""
        yield "source", _code(source["name"]) + commit
        for file in source["files"]:
            digest = f"SHA-256 {_code(file['sha256'])}" if file["sha256"] else file["why"]
            yield "file", f"{_code(file['name'])}, {file['size']} bytes, {digest}"
    yield "layout of the source", f"{_code(card.mapping)}, mapping with SHA-256 {_code(card.mapping_sha256)}"
    yield "layout", _code(card.target)
    dtypes = " and ".join(f"{count} {dtype}" for dtype, count in card.dtypes.items())
    yield "tensors", f"{card.tensors} ({dtypes}), {card.nbytes} bytes"
    yield "sizes", ", ".join(f"{name} {size}" for name, size in card.sizes.items())
    yield "made by", ", ".join(f"{tool} {version}" for tool, version in document["tools"].items())


def _tensors(card: ConversionRecord, document: dict[str, Any]) -> list[str]:
    rows = []
    for pattern, sources, names in fold_key_map(card.converted):
        made_of = " + ".join(sources) or f"generated: {card.generated[names[0]]}"
        first = document["tensors"][names[0]]
        shapes = {str(document["tensors"][name]["shape"]) for name in names}
        shape = shapes.pop() if len(shapes) == 1 else "several"
        rows.append((_code(pattern), str(len(names)), f"{first['dtype']} {shape}", _code(made_of)))
    return _table(("tensor", "number", "type and shape", "made of"), rows)


def _left_out(card: ConversionRecord) -> list[str]:
    rows = [
        (verb, ", ".join(_code(text) for text in fold_names(names)), _escaped(reason))
        for verb, groups in (("left out", group_by_reason(card.dropped)), ("missing", group_by_reason(card.missing)))
        for reason, names in groups.items()
    ]
    return ["## Left out or missing", "", *_table(("", "tensors", "why"), rows), ""] if rows else []


def _verify(card: ConversionRecord, name: str, documents: Sequence[str]) -> Iterator[str]:
    yield "```sh"
    yield "pip install dsocr-convert"
    for document in documents:
        yield shlex.join(["dsocr-verify", name, "--record", document])
    if card.target == f"deepencoder-{card.family}":
        yield shlex.join(["dsocr-verify", name, "--source", *_pinned(card)])
    yield "```"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _code(text: str) -> str:
    """A name as code, whatever is in it: names come from files that anybody may have written."""
    return f"`{_escaped(text).replace('`', chr(0x2BB))}`" if text else ""


def _escaped(text: str) -> str:
    return re.sub(r"\s+", " ", "".join(char if char.isprintable() else " " for char in text)).replace("|", "\\|")

"""The card of a conversion, from what was found and planned."""

from __future__ import annotations

from pathlib import Path

from converter.dtypes import BY_NAME
from converter.mapping.expr import Expr, sources
from converter.planning import Planned, Wish
from converter.report import Card
from converter.source import Source
from converter.version import __version__


def make_card(opened: Source, planned: Planned, wish: Wish, output: Path | None, format: str) -> Card:
    """The card of a conversion that has not been made yet."""
    known, plan = planned
    return Card(
        tool=f"dsocr-convert {__version__}",
        source=opened.name,
        files={file.name: file.size for file in opened.files},
        containers=sorted(set(opened.containers)),
        state_dict=known.state_dict.path,
        wrapper=known.wrapper,
        family=wish.family,
        mapping=plan.mapping.name,
        mapping_sha256=plan.mapping.digest,
        target=plan.layout,
        output=str(output) if output else "",
        format=format,
        dtype=wish.dtype,
        tensors=len(plan.outputs),
        nbytes=plan.nbytes,
        dtypes=count_dtypes(list(plan.outputs.values())),
        converted={name: [tensor.key for tensor in sources(value)] for name, value in plan.outputs.items()},
        filled=plan.filled,
        missing=plan.missing,
        dropped=plan.dropped,
        sizes=plan.sizes,
        unusual={name: list(pair) for name, pair in plan.unusual.items()},
        commit=opened.commit,
        notes=list(opened.notes),
    )


def count_dtypes(values: list[Expr]) -> dict[str, int]:
    """How many tensors have each element type, in the order of the table of types."""
    names = [value.dtype.name for value in values]
    return {name: names.count(name) for name in BY_NAME if name in names}

"""The card of a whole DeepEncoder, which several sources have something to say on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from converter import __version__
from converter.assembly.insert import Copy
from converter.assembly.parts import Parts
from converter.layouts import registry
from converter.output.record import ConversionRecord
from converter.output.record_document import count_dtypes
from converter.tensors.lazy_tensor import LazyTensor, nbytes, source_tensors

_CONSTANT = "a constant that the model makes itself; DeepSeek-OCR's own checkpoint lacks it"


def make_record(
    parts: Parts, names: dict[str, str], outputs: dict[str, LazyTensor], target: Path, format: str, dtype: str
) -> ConversionRecord:
    """The card of what has not been written yet: `outputs` have the names to which `names` leads from those inside.

    Where several sources have something to say, their words are joined by a plus.
    """
    known = [resolve.detected for resolve in parts.plans.values()]
    plans = {family: resolve.plan for family, resolve in parts.plans.items()}
    seeds = dict.fromkeys(how.partition(": ")[0] for how in parts.generated.values())
    commits = [source.commit for source in parts.opened if source.commit]
    all_on_hubs = len(commits) == len(parts.opened)
    unwritten = [value for name, value in parts.outputs.items() if name not in names]
    absent = {
        registry.encoder_prefix(family) + name: why
        for family, plan in plans.items()
        for name, why in plan.missing.items()
    }
    return ConversionRecord(
        tool=f"dsocr-convert {__version__}",
        source=" + ".join([*(source.name for source in parts.opened), *seeds]),
        files={file.name: file.size for source in parts.opened for file in source.files},
        containers=sorted({container for source in parts.opened for container in source.containers}),
        state_dict=_joined(entry.state_dict.path for entry in known),
        wrapper=_joined(entry.wrapper for entry in known),
        family="deepencoder",
        mapping=" + ".join(plan.mapping.name for plan in plans.values()),
        mapping_sha256=" + ".join(plan.mapping.digest for plan in plans.values()),
        target="deepencoder",
        output=str(target),
        format=format,
        dtype=dtype,
        tensors=len(outputs),
        nbytes=sum(map(nbytes, outputs.values())),
        dtypes=count_dtypes(outputs.values()),
        converted={new: [tensor.key for tensor in source_tensors(parts.outputs[name])] for name, new in names.items()},
        generated={new: parts.generated[name] for name, new in names.items() if name in parts.generated},
        missing={name: why for name, why in absent.items() if name not in parts.outputs},
        dropped={**parts.dropped, **{tensor.key: _CONSTANT for value in unwritten for tensor in source_tensors(value)}},
        sizes={f"{family} {name}": size for family, plan in plans.items() for name, size in plan.sizes.items()},
        unusual={f"{family} {name}": [*pair] for family, plan in plans.items() for name, pair in plan.unusual.items()},
        commit=" + ".join(commits) if all_on_hubs else "",
        notes=[
            *(note for source in parts.opened for note in source.notes),
            *(f"{one.name}: commit {one.commit}" for one in parts.opened if one.commit and not all_on_hubs),
        ],
    )


def _joined(words: Iterable[str]) -> str:
    return " + ".join(dict.fromkeys(word for word in words if word))


def record_of_copy(card: ConversionRecord, copy: Copy, into: str | Path) -> ConversionRecord:
    """The encoder's card, made to speak of the whole checkpoint that it goes into."""
    tensors = copy.tensors.values()
    return card._replace(
        source=f"{card.source} into {into}",
        files={**card.files, **{file.name: file.size for file in copy.opened.files}},
        tensors=len(tensors),
        nbytes=sum(map(nbytes, tensors)),
        dtypes=count_dtypes(tensors),
        notes=[*copy.notes, *card.notes],
    )

"""The conversion record: sources, layouts and the origin of every tensor, as a value and as a JSON document.

The document contains no times, machine names or folders: the same input gives the same document.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from converter import __version__
from converter.checkpoint.open import Checkpoint
from converter.layouts import registry
from converter.layouts.spec import LayoutSpec
from converter.output.json_document import as_json
from converter.output.pretrained import is_folder_output
from converter.plan.assumptions import Assumption, describe_differences, used_assumptions
from converter.plan.plan import Plan
from converter.plan.planner import ResolvedPlan
from converter.tensors.dtypes import BY_NAME, DType
from converter.tensors.lazy_tensor import LazyTensor, nbytes, source_tensors
from converter.tensors.tensor_info import TensorInfo

if TYPE_CHECKING:
    from converter.plan.merge import TensorChange

_T = TypeVar("_T")
# The version of the JSON document's format.
RECORD_FORMAT = 1


class RecordedMapping(NamedTuple):
    """The mapping by which an encoder of a checkpoint was converted."""

    family: str  # sam, clip or qwen2
    name: str
    sha256: str  # The digest of the mapping file
    state_dict: str  # The path of the state dict in the file; empty if it is the top-level object
    prefix: str  # The prefix of the encoder's names in the source; empty if the layout itself has that prefix


class RecordedSource(NamedTuple):
    """A checkpoint that was read."""

    name: str  # The path or address of the checkpoint
    files: dict[str, int]  # File names and their sizes in bytes
    containers: list[str]  # The container formats of the files
    commit: str  # The commit on a hub; empty for a local checkpoint
    mappings: list[RecordedMapping]  # The layouts that it was detected as, one for each encoder that was taken from it


class MergedModule(NamedTuple):
    """A module of a LoRA adapter that was merged."""

    tensor: str  # The name of the source tensor
    rank: int | None = None  # None if the tensor was trained as a whole
    alpha: float | None = None
    scale: float | None = None  # The factor of B @ A


@dataclass(frozen=True, slots=True)
class ConversionRecord:
    """The record of one conversion."""

    tool: str  # This program and its version
    sources: list[RecordedSource]  # The checkpoints that were read, the main one first
    family: str  # sam, clip or qwen2; deepencoder for several
    target: str  # The layout of the output, or the layouts of its encoders, joined with ` + `
    output: str  # The path of the output
    format: str  # safetensors, pth or gguf
    dtype: str  # The requested element type, or keep for no cast
    num_tensors: int
    nbytes: int  # Bytes of tensor data in the output
    dtypes: dict[str, int]  # The number of output tensors by element type
    converted: dict[str, list[str]]  # Output tensors, each with the source tensors that it is made of, in order
    generated: dict[str, str]  # Output tensors that no source has, each with its content
    missing: dict[str, str]  # Tensors of the target that the source lacks, and why they may be missing
    dropped: dict[str, str]  # Source tensors that were left out, and why
    sizes: dict[str, int]  # Sizes of the encoders, such as width and depth
    unusual: dict[str, tuple[int, int]]  # Sizes that differ from DeepSeek-OCR's, as (actual size, DeepSeek-OCR's size)
    assumptions: dict[str, Assumption]  # Values that no tensor shows, such as the activation
    merged: dict[str, MergedModule] = field(default_factory=dict)  # Modules of a LoRA adapter, by their paths in it
    notes: list[str] = field(default_factory=list)  # Remarks for the user
    # Finite values that a cast made infinite or NaN, by output tensor
    overflows: dict[str, int] = field(default_factory=dict)
    fetched: dict[str, int] = field(default_factory=dict)  # Bytes that were fetched from a hub, by file
    written: bool = False  # False for a dry run
    unchanged: bool = False  # Whether nothing was written because the source is already the output

    @property
    def mapping(self) -> str:
        """The names of the sources' mappings, joined with ` + `."""
        return " + ".join(mapping.name for mapping in self._mappings)

    @property
    def _mappings(self) -> list[RecordedMapping]:
        return [mapping for source in self.sources for mapping in source.mappings]

    @property
    def layouts(self) -> list[LayoutSpec]:
        """The layouts of the output: one for each encoder of a whole DeepEncoder, otherwise one."""
        names = self.target.split(" + ")
        if set(names) <= set(registry.layout_names()):
            return [registry.load(name) for name in names]
        name = "deepencoder-{}" if self.target == "deepencoder" else f"{{}}-{self.target}"
        converted = {mapping.family for mapping in self._mappings}
        return [registry.load(name.format(family)) for family in registry.families() if family in converted]

    def metadata(self) -> dict[str, str]:
        """Return the `__metadata__` of a safetensors file, which depends on neither time nor machine."""
        metadata = {
            # transformers refuses files that name no framework. mlx-vlm leaves tensors of files marked mlx as they are.
            "format": "mlx" if self.target.endswith("mlx") else "pt",
            "tool": self.tool,
            "layout": self.target,
            "mapping": self.mapping,
            "mapping_sha256": " + ".join(mapping.sha256 for mapping in self._mappings),
        }
        if all(source.commit for source in self.sources):  # local file names differ from machine to machine
            metadata["source"] = " + ".join(source.name for source in self.sources)
            metadata["commit"] = " + ".join(source.commit for source in self.sources)
        return metadata

    def to_json(self) -> dict[str, Any]:
        """Return the document that `--json` prints."""
        return cast("dict[str, Any]", as_json(self))


class Destination(NamedTuple):
    """The path, format and element type of an output."""

    path: Path | None = None  # None for a plan that is not written
    format: str = "safetensors"  # safetensors, pth or gguf
    dtype: str = "keep"  # The requested type


PLANNED = Destination()


def make_plan_record(
    sources: Sequence[Checkpoint], resolved: ResolvedPlan, destination: Destination = PLANNED, notes: Sequence[str] = ()
) -> ConversionRecord:
    """Make the record of a plan for one family. Args: As in `make_record`."""
    plan = resolved.plan
    return make_record(
        sources,
        {plan.mapping.family: resolved},
        plan.outputs,
        destination,
        target=plan.layout,
        generated=plan.generated,
        missing=plan.missing,
        dropped=plan.dropped,
        notes=notes,
    )


def make_record(
    sources: Sequence[Checkpoint],
    plans: Mapping[str, ResolvedPlan],
    outputs: Mapping[str, LazyTensor],
    destination: Destination,
    *,
    target: str,
    generated: Mapping[str, str],
    missing: Mapping[str, str],
    dropped: Mapping[str, str],
    converted: Mapping[str, LazyTensor] | None = None,
    notes: Sequence[str] = (),
    has_config: bool = False,
) -> ConversionRecord:
    """Make the record of a conversion that is planned and not yet written.

    Args:
        sources: The checkpoints that are read, the main one first.
        plans: The plan of each family that is converted.
        outputs: All tensors of the output.
        destination: The path, format and element type of the output.
        target: The layout of the output.
        generated: Output tensors that no source has, and their content.
        missing: Tensors of the target that no source has, and why they may be missing.
        dropped: Source tensors that are left out, and why.
        converted: The tensors of `outputs` that are converted; all of them by default.
        notes: Remarks for the user, which precede the remarks on the sources.
        has_config: Whether a config in the output states the activation and other assumptions.
    """
    has_config = has_config or (destination.path is not None and is_folder_output(destination.path, target))
    family_plans = [resolved.plan for resolved in plans.values()]
    warnings = [] if has_config else [warning for plan in family_plans for warning in function_warning(plan, target)]
    converted = outputs if converted is None else converted
    return ConversionRecord(
        tool=f"dsocr-convert {__version__}",
        sources=[_recorded_source(source, plans) for source in sources],
        family=next(iter(plans)) if len(plans) == 1 else "deepencoder",
        target=target,
        output=str(destination.path or ""),
        format=destination.format,
        dtype=destination.dtype,
        num_tensors=len(outputs),
        nbytes=sum(map(nbytes, outputs.values())),
        dtypes=count_dtypes(value.dtype for value in outputs.values()),
        converted={name: [tensor.key for tensor in source_tensors(value)] for name, value in converted.items()},
        generated=dict(generated),
        missing=dict(missing),
        dropped=dict(dropped),
        sizes=_by_family(plans, lambda plan: plan.sizes),
        unusual=_by_family(plans, lambda plan: plan.unusual),
        assumptions=_by_family(plans, lambda plan: used_assumptions(plan.assumptions, plan.canonical_tensors)),
        merged={change.module: _merged_module(change) for plan in family_plans for change in plan.merged.values()},
        notes=[
            *(remark for plan in family_plans for remark in plan.remarks),
            *warnings,
            *notes,
            *(note for source in sources for note in source.notes),
        ],
    )


def _merged_module(change: TensorChange) -> MergedModule:
    if isinstance(change.trained, TensorInfo):
        return MergedModule(change.key)
    return MergedModule(change.key, change.trained.rank, change.trained.alpha, change.trained.scale)


def function_warning(plan: Plan, target: str) -> list[str]:
    """Return a warning if the encoder in the output computes another function than the source, else no warning."""
    theirs, ours = describe_differences(plan.assumptions)
    if not theirs:
        return []
    outcome = f"{target} holds no config: set it where the weights are loaded"
    if target.startswith("deepencoder"):
        outcome = f"the DeepEncoder computes with {ours}: its outputs differ from the source's"
    return [f"warning: the source computes with {theirs}; {outcome}"]


def _recorded_source(source: Checkpoint, plans: Mapping[str, ResolvedPlan]) -> RecordedSource:
    files = {file.name: file.size for file in source.files}
    mappings = [
        RecordedMapping(
            family, plan.mapping.name, plan.mapping.digest, detected.state_dict.path, detected.match.unknown_prefix
        )
        for family, (detected, plan) in plans.items()
        if any(tensor.storage.file in source.files for tensor in detected.tensors.values())
    ]
    return RecordedSource(source.name, files, sorted(set(source.containers)), source.commit, mappings)


def _by_family(plans: Mapping[str, ResolvedPlan], values: Callable[[Plan], Mapping[str, _T]]) -> dict[str, _T]:
    """Return values of all plans by name. With several plans, names start with the family, such as `sam width`."""
    return {
        f"{family} {name}" if len(plans) > 1 else name: value
        for family, resolved in plans.items()
        for name, value in values(resolved.plan).items()
    }


def count_dtypes(dtypes: Iterable[DType]) -> dict[str, int]:
    """Count the tensors of each type, in the order of `BY_NAME`."""
    counts = Counter(dtype.name for dtype in dtypes)
    return {name: counts[name] for name in (*BY_NAME, *counts) if name in counts}

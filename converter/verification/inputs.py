"""The inputs of a verification: the encoders in the converted file, and the expected output of the conversion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from converter.checkpoint.open import Checkpoint
from converter.checkpoint.state_dict import StateDict, largest_state_dict
from converter.errors import LayoutError, MappingError
from converter.layouts import registry
from converter.layouts.detect import DetectedLayout, detect_families_in, select_state_dicts
from converter.layouts.marks import find_mark
from converter.layouts.spec import LayoutSpec, Rule
from converter.options import ConvertOptions
from converter.plan.assumptions import Assumptions, used_assumptions
from converter.plan.plan import Plan
from converter.plan.planner import plan_to_canonical
from converter.storage.progress import OnProgress
from converter.tensors.lazy_tensor import LazyTensor, lazy_read
from converter.tensors.tensor_info import TensorInfo
from converter.verification.reference_readers import Reader, open_independently


@dataclass(frozen=True)
class ConvertedEncoder:
    """One encoder in the converted file."""

    family: str
    layout: LayoutSpec  # The layout of its names
    prefix: str  # The prefix of its names in the file
    tensors: Mapping[str, LazyTensor]  # Lazy tensors over the file's tensors, by canonical names
    # Tensors outside the encoder (CLIP's text tower) by canonical names
    extra_tensors: Mapping[str, LazyTensor] = field(default_factory=dict)
    # The file's tensors by the names that the layout's own library loads
    native_tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    in_deep_encoder: bool = True  # Whether the file is made for the DeepEncoder, not for the layout's own library
    # Activation, heads and epsilon, as the file's config states them; none for the DeepEncoder
    assumptions: Assumptions = field(default_factory=dict)
    remarks: tuple[str, ...] = ()  # On the file's config
    problem: str = ""  # Why the file does not fit the layout; empty if it does


@dataclass(frozen=True)
class Converted:
    """The converted file, its encoders, and a reader of its tensors by the format's own library."""

    source: Checkpoint
    encoders: tuple[ConvertedEncoder, ...]
    tensors: Mapping[str, TensorInfo]
    read: Reader

    @property
    def layout(self) -> str:
        """The layout of its names; of several encoders the one that they share, such as mlx, or deepencoder."""
        if len(self.encoders) == 1:
            return self.encoders[0].layout.name
        ends = {encoder.layout.name.removeprefix(f"{encoder.family}-") for encoder in self.encoders}
        return ends.pop() if len(ends) == 1 and ends != {"deepseek-ocr"} else "deepencoder"

    @property
    def family(self) -> str:
        """The family of its encoder; deepencoder for several."""
        return self.encoders[0].family if len(self.encoders) == 1 else "deepencoder"


@dataclass(frozen=True)
class Origin:
    """The source of one encoder, and its conversion to canonical names with the options that the file shows."""

    plan: Plan  # The plan by the mapping that made the file, which is the user's if there is one
    # The plan by a built-in layout that fits the source, or None. Without a user's mapping it is `plan`
    builtin_plan: Plan | None
    # The source's tensors by the names that the layout's own library loads; none if positions were resampled
    native_tensors: Mapping[str, TensorInfo]
    read: Reader  # Reads its tensors, and those that other sources supply
    detected: DetectedLayout

    @property
    def reference_plan(self) -> Plan:
        """The plan by which a reference is loaded."""
        return self.builtin_plan or self.plan


@dataclass(frozen=True)
class Expected:
    """The expected output of the conversion."""

    name: str  # The names of the sources
    outputs: Mapping[str, LazyTensor]  # All tensors by the file's names
    rules: Mapping[str, Rule]  # The rules that produce them
    origins: Mapping[str, Origin]  # The source of each encoder by family
    read: Reader  # Reads the tensors of all sources
    # Tensors of the file that no source has, though another checkpoint may have supplied them
    not_compared: tuple[str, ...] = ()
    # The sources' tensors into which `read` merges a LoRA adapter, and the library that computes it
    merged: frozenset[TensorInfo] = frozenset()
    merged_by: str = ""


def open_any_layout(source: Checkpoint, on_progress: OnProgress, *encoders: ConvertedEncoder) -> Converted:
    """Return a converted file without detecting its layout.

    Args:
        source: The opened file.
        on_progress: Called as tensors are fetched from a hub.
        encoders: The encoders in the file; none if it is only compared with its record.
    """
    tensors = _largest_state_dict(source).tensors
    return Converted(source, encoders, tensors, open_independently(source, tensors.values(), on_progress))


def _largest_state_dict(source: Checkpoint) -> StateDict:
    """Return the state dict with the most tensors; LayoutError if several have as many, such as a model and its EMA."""
    try:
        return largest_state_dict(select_state_dicts(source, None), source.name)
    except LayoutError as error:
        raise LayoutError(error.message, "convert one of these state dicts, and verify the output") from None


def open_converted(source: Checkpoint, on_progress: OnProgress) -> Converted:
    """Return a converted file with the encoders in it.

    Args:
        source: The opened file.
        on_progress: Called as tensors are fetched from a hub.

    Raises:
        LayoutError: The file has no layout that is written here, or several encoders of a family.
    """
    state_dict = _largest_state_dict(source)
    encoders = _detect_encoders(source, state_dict)
    # A file that only has canonical names may lack tensors or have tensors of other shapes. Its layout is not detected
    # then, so the family follows from the number of known names.
    if all(detected.match.layout.is_canonical and not _prefix_in_file(detected) for detected in encoders.values()):
        return open_any_layout(source, on_progress, _canonical_encoder(source, state_dict))
    converted = [_encoder(source, family, detected, len(encoders) > 1) for family, detected in encoders.items()]
    return open_any_layout(source, on_progress, *converted)


def _detect_encoders(source: Checkpoint, state_dict: StateDict) -> dict[str, DetectedLayout]:
    """Return the detected encoder of each family; LayoutError if there are several of a family."""
    encoders: dict[str, DetectedLayout] = {}
    for family, detected in detect_families_in(source, [state_dict]).items():
        if len(detected) > 1:
            prefixes = " and ".join(repr(_prefix_in_file(encoder)) for encoder in detected)
            raise LayoutError(
                f"{source.name}: holds several {family} encoders, with the prefixes {prefixes}",
                f"convert one of them with dsocr-convert {family} --prefix, and verify the output",
            )
        encoders[family] = detected[0]
    return encoders


def _canonical_encoder(source: Checkpoint, state_dict: StateDict) -> ConvertedEncoder:
    """Return the encoder in a file with canonical names; LayoutError if most of the names are not canonical."""
    unreadable = {name: tensor for name, tensor in state_dict.tensors.items() if not tensor.dtype.bits}
    if mark := find_mark(unreadable):
        raise mark.error(source.name)
    counts = {family: registry.count_known(family, state_dict.tensors) for family in registry.families()}
    family = max(counts, key=lambda name: counts[name])
    if counts[family] > len(state_dict.tensors) / 2:
        tensors = {name: lazy_read(tensor) for name, tensor in state_dict.tensors.items()}
        return ConvertedEncoder(family, registry.canonical(family), "", tensors)
    commands = " or ".join(f"dsocr-convert {name} {source.name}" for name in registry.families())
    raise LayoutError(
        f"{source.name}: has no layout that dsocr-convert writes",
        f"convert it first: {commands}; or compare it only with its conversion record (--record)",
    )


def _prefix_in_file(detected: DetectedLayout) -> str:
    """Return the prefix of the encoder's names in the file, with the outer prefix that detection removed."""
    prefix = detected.match.prefix
    name = next(name for name in detected.tensors if name.startswith(prefix))
    return detected.tensors[name].key.removesuffix(name) + prefix


def _encoder(source: Checkpoint, family: str, detected: DetectedLayout, is_one_of_several: bool) -> ConvertedEncoder:
    """Return a detected encoder; several encoders in one file are those of a DeepEncoder."""
    layout, prefix = detected.match.layout, _prefix_in_file(detected)
    in_deep_encoder = is_one_of_several or layout.is_canonical
    encoder = ConvertedEncoder(family, layout, prefix, {}, {}, native_tensors(detected), in_deep_encoder)
    try:
        plan = plan_to_canonical(source, detected, ConvertOptions(family))
    except (LayoutError, MappingError) as error:
        return replace(encoder, problem=error.message)
    encoder = replace(encoder, tensors=plan.outputs, extra_tensors=plan.extra_tensors)
    if in_deep_encoder:
        return encoder
    assumptions = used_assumptions(plan.assumptions, plan.extra_tensors)
    return replace(encoder, assumptions=assumptions, remarks=tuple(plan.remarks))


def native_tensors(detected: DetectedLayout) -> dict[str, TensorInfo]:
    """Return the encoder's tensors by the names that the layout's own library loads."""
    return {name: tensor for name, tensor in detected.tensors.items() if name.startswith(detected.match.prefix)}

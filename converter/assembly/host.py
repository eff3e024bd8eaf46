"""Hosts: checkpoints that an encoder is inserted into, and which of their tensors it replaces."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from converter.assembly.parts import EncoderParts, extract_encoder
from converter.checkpoint.folder import has_weight_suffix, is_index
from converter.checkpoint.open import Checkpoint
from converter.checkpoint.state_dict import largest_state_dict, state_dicts
from converter.errors import LayoutError, MappingError, UsageError, first_names, printable
from converter.layouts import registry
from converter.layouts.claims import summary
from converter.layouts.detect import DetectedLayout, detect_families
from converter.layouts.marks import find_mark
from converter.layouts.spec import Rule, invert
from converter.layouts.template import any_match
from converter.options import ConvertOptions
from converter.plan.apply import apply
from converter.plan.assumptions import Assumptions, describe_differences
from converter.plan.plan import Plan
from converter.plan.planner import ResolvedPlan, plan_to_canonical
from converter.plan.projector import find_projector
from converter.plan.route import target_names
from converter.storage.local_file import exists
from converter.tensors.lazy_tensor import LazyTensor, Read, reshaped, source_tensors
from converter.tensors.tensor_info import TensorInfo


class Host(NamedTuple):
    """A checkpoint whose encoders are replaced."""

    checkpoint: Checkpoint
    folder: Path | None  # Its folder; None for a single file
    families: dict[str, list[DetectedLayout]]  # Its encoders by family

    @property
    def name(self) -> str:
        """The checkpoint's name."""
        return self.checkpoint.name

    @property
    def format(self) -> str:
        """The format of its files."""
        return "gguf" if "GGUF" in self.checkpoint.containers else "safetensors"

    def resolve(self, family: str) -> ResolvedPlan:
        """Plan the conversion of the family's encoder to the canonical layout; LayoutError unless there is one."""
        found, name = self.families.get(family, []), family.upper()
        if not found:
            text = f"--into {self.name}: has no {name}, but {_text(self.families)}"
            raise LayoutError(text, f"leave out --{family}")
        if len(found) > 1:
            text = f"has {len(found)} {name} encoders, under the prefixes {first_names(list(map(_place_of, found)))}"
            raise LayoutError(f"--into {self.name}: {text}", "insert into a checkpoint that holds one of them alone")
        try:
            return ResolvedPlan(found[0], plan_to_canonical(self.checkpoint, found[0], ConvertOptions(family)))
        except MappingError as error:
            step = self.checkpoint.whole_step or "insert into a checkpoint whose encoder is whole and unchanged"
            raise MappingError(f"--into {error.message}", step) from error

    def resolve_all(self, families: Iterable[str]) -> dict[str, ResolvedPlan]:
        """Plan the conversion of several encoders, as `resolve` does."""
        return {family: self.resolve(family) for family in families}


def open_host(path: Path, open_file: Callable[[Path], Checkpoint]) -> Host:
    """Open a checkpoint, and find its encoders by the layouts that ship, under any prefix.

    Raises:
        LayoutError: The checkpoint is not in safetensors or GGUF, or has no encoder of a known layout.
        UsageError: There is no such file or folder.
    """
    if not exists(path):
        step = "download the checkpoint first (`hf download`), and give its folder"
        raise UsageError(f"--into {path}: no such file or folder", step)
    checkpoint = open_file(path)
    if set(checkpoint.containers) not in ({"safetensors"}, {"GGUF"}):
        formats = ", ".join(sorted(set(checkpoint.containers)))
        raise LayoutError(
            f"{checkpoint.name}: {formats}: --into supports only safetensors and GGUF checkpoints",
            "save the model with save_pretrained, which writes safetensors, and insert into that",
        )
    families = detect_families(checkpoint)
    if not families:
        what = f"--into {checkpoint.name}: has no encoder of a known layout ({_text(registry.families())})"
        if mark := find_mark(largest_state_dict(state_dicts(checkpoint.contents), checkpoint.name).tensors):
            raise mark.error(what)
        raise LayoutError(what, f"see what it holds: dsocr-convert inspect {path}")
    return Host(checkpoint, path if path.is_dir() else path.parent if is_index(path.name) else None, families)


def check_output_name(host: Host, out: Path) -> None:
    """UsageError if a folder's copy has the name of a file, or a file's copy that of another format."""
    if host.folder is None and out.suffix.lower() != f".{host.format}":
        raise UsageError(f"--output {out}: the copy of a single file is a file", f"end its name in .{host.format}")
    if host.folder is not None and has_weight_suffix(out.name):
        raise UsageError(f"--output {out}: the copy of a folder is a folder", "leave the suffix out")


def extract_shared(source: Checkpoint, host: Host, with_projector: bool, prefix: str | None) -> EncoderParts:
    """Take those encoders out of a checkpoint whose families the host has too.

    Args:
        source: The checkpoint.
        host: The host.
        with_projector: Whether to take the projector too.
        prefix: The prefix of the encoders' names in `source`, or None.

    Raises:
        LayoutError: There is none.
    """
    found = detect_families(source, prefix)
    shared = [family for family in found if family in host.families]
    if found and not shared:
        text = f"{source.name}: has {_text(found)}, but the checkpoint of --into has {_text(host.families)}"
        raise LayoutError(text, "give a checkpoint that has one of these")
    # Where it has none at all, the error of the host's first family says what it is.
    parts = extract_encoder(source, with_projector, prefix, shared or [*host.families][:1], partial=True)
    dropped = dict(parts.dropped)
    for family, each in found.items():
        if family in shared:
            continue
        reason = f"the checkpoint of --into has no {family.upper()}"
        for detected in each:
            inside = (tensor for name, tensor in detected.tensors.items() if name.startswith(detected.match.prefix))
            dropped |= {tensor.key: reason for tensor in inside if tensor.key in dropped}
    return replace(parts, dropped=dropped)


def _text(families: Iterable[str]) -> str:
    return ", ".join(family.upper() for family in families)


def _place_of(detected: DetectedLayout) -> str:
    return printable(detected.match.full_prefix) or "."


@dataclass
class Placement:
    """The tensors of a new encoder in a host; the lists are those of differences."""

    new: dict[str, LazyTensor] = field(default_factory=dict)  # By the host's keys
    old: dict[str, TensorInfo] = field(default_factory=dict)  # The host's own, some of which they replace
    names: dict[str, list[str]] = field(default_factory=dict)  # The host's keys of each tensor of the encoder
    rules: dict[str, Rule] = field(default_factory=dict)  # The rules that make them, by the host's keys
    without_place: list[str] = field(default_factory=list)  # The encoder's tensors that the host lacks
    kept: list[str] = field(default_factory=list)  # What the host has and the encoder lacks
    problems: list[str] = field(default_factory=list)
    layouts: list[str] = field(default_factory=list)  # The names of the layouts of the host's encoders
    notes: list[str] = field(default_factory=list)  # Where they are, what else they compute, what only one has


def place(host: Host, parts: EncoderParts) -> Placement:
    """Convert an encoder to the host's layouts.

    Raises:
        UsageError: Layers, shapes or types differ.
    """
    placement = Placement()
    for family, resolved in host.resolve_all(parts.plans).items():
        _describe(placement, family, resolved, parts.plans[family].plan)
        _place_encoder(placement, resolved, parts)
    _place_projector(placement, host, parts)
    if host.format == "gguf":
        # llama.cpp stores a vector as a matrix of one row; ggml drops leading dimensions of 1.
        for key, value in placement.new.items():
            if [n for n in value.shape if n != 1] == [n for n in placement.old[key].shape if n != 1]:
                placement.new[key] = reshaped(value, placement.old[key].shape)
    placement.problems += [text for key, value in placement.new.items() if (text := _misfit(placement.old[key], value))]
    if placement.problems:
        raise UsageError(
            f"{host.name}: the encoder does not fit: {summary(placement.problems)}",
            "use an encoder of the same sizes: --compressor takes another compressor, and dsocr-convert FAMILY "
            "--image-size resamples positions",
        )
    if placement.without_place:
        placement.notes.append(f"left out {first_names(placement.without_place)}: the checkpoint has none")
    kept = [*(f"its {family.upper()}" for family in host.families if family not in parts.plans), *placement.kept]
    if kept:
        placement.notes.append(f"kept {first_names(kept)}: the encoder has none")
    return placement


def _describe(placement: Placement, family: str, host: ResolvedPlan, new: Plan) -> None:
    """Note where an encoder of the host is and what else it computes; another number of layers is a problem."""
    detected, plan, name = host.detected, host.plan, family.upper()
    placement.layouts.append(detected.match.name)
    placement.notes.append(f"its {name}: layout {detected.match.name}, prefix {_place_of(detected)}")
    placement.notes += _function_warning(new.assumptions, plan.assumptions)
    depth, other_depth = plan.sizes["depth"], new.sizes["depth"]
    if depth != other_depth:
        placement.problems.append(f"the {name} has {other_depth} layers; the checkpoint's has {depth}")


def _place_encoder(placement: Placement, host: ResolvedPlan, parts: EncoderParts) -> None:
    """Convert one encoder to the host's layout."""
    detected, plan = host
    family, mapping = plan.mapping.family, detected.match.layout.mapping
    prefix, theirs = registry.encoder_prefix(family), parts.plans[family].plan.extra_tensors
    rules = invert(mapping.rules_for(detected.match.prefix))
    inside = [template for rule in invert(mapping.rules) for template in rule.sources]
    # What a layout has inside the encoder is replaced too, such as CLIP's last norm; its text tower is not.
    extra = {name: value for name, value in plan.extra_tensors.items() if any_match(inside, name)}
    values = parts.encoder(family) | {name: theirs[name] for name in extra if name in theirs}
    names = {name: target_names(rules, name) for name in values}
    claimed = {name: value for name, value in values.items() if names[name]}
    applied = apply(tuple(rule._replace(optional=True) for rule in rules), claimed, detected.match.name)
    own = {tensor.key: tensor for value in (plan.outputs | extra).values() for tensor in source_tensors(value)}
    keys = {name: tensor.key for name, tensor in detected.tensors.items() if tensor.key in own}
    for name, targets in names.items():
        if found := [keys[target] for target in targets if target in keys]:
            placement.names[prefix + name] = found
        elif prefix + name not in parts.constants:
            placement.without_place.append(prefix + name)
    made = {keys[name]: name for name in applied.values if name in keys}
    placement.new |= {key: applied.values[name] for key, name in made.items()}
    placement.rules |= {key: applied.rules[name] for key, name in made.items()}
    placement.old |= own
    placement.kept += [key for key in own if key not in made]


def _function_warning(new: Assumptions, old: Assumptions) -> list[str]:
    """Return a warning if the encoder computes another function than the one that it replaces."""
    shared = {name: each._replace(expected=old[name].value) for name, each in new.items() if name in old}
    theirs, ours = describe_differences(shared)
    if not theirs:
        return []
    return [f"warning: the source computes with {theirs}, the checkpoint of --into with {ours}: change its config"]


def _place_projector(placement: Placement, host: Host, parts: EncoderParts) -> None:
    if not parts.projector:
        return
    found = find_projector(host.resolve(next(iter(parts.plans))))
    for name, value in parts.projector.items():
        if old := found.get(name):
            placement.new[old.key], placement.old[old.key], placement.names[name] = value, old, [old.key]
        else:
            placement.without_place.append(name)


def _misfit(old: TensorInfo, new: LazyTensor) -> str:
    if new.shape != old.shape:
        return f"{old.key!r} has shape {list(old.shape)}; the encoder's has {list(new.shape)}"
    if new.dtype != old.dtype and not (new.dtype.is_float and old.dtype.is_float):
        return f"{old.key!r} is {old.dtype.name}; the encoder's is {new.dtype.name}"
    return ""


def is_same(new: LazyTensor, old: TensorInfo) -> bool:
    """Return whether both are the same tensor of the same file."""
    if not isinstance(new, Read) or new.tensor.key != old.key:
        return False
    return new.tensor.storage.file.identity == old.storage.file.identity

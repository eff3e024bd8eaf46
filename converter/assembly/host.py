"""Hosts: checkpoints that an encoder is inserted into, and the tensors of theirs that it replaces."""

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
from converter.tensors.lazy_tensor import LazyTensor, Read, all_source_tensors, reshaped
from converter.tensors.tensor_info import TensorInfo


class Host(NamedTuple):
    """A checkpoint whose encoders are replaced."""

    checkpoint: Checkpoint
    folder: Path | None  # The folder of the checkpoint; None for a single file
    families: dict[str, list[DetectedLayout]]  # The encoders of the checkpoint by family

    @property
    def name(self) -> str:
        """The checkpoint's name."""
        return self.checkpoint.name

    @property
    def format(self) -> str:
        """The format of the checkpoint's files."""
        return "gguf" if "GGUF" in self.checkpoint.containers else "safetensors"

    def resolve(self, family: str) -> ResolvedPlan:
        """Plan the conversion of the family's encoder to the canonical layout; LayoutError unless there is one."""
        encoders, name = self.families.get(family, []), family.upper()
        if not encoders:
            message = f"--into {self.name}: has no {name}, but {_join_families(self.families)}"
            raise LayoutError(message, f"leave out --{family}")
        if len(encoders) > 1:
            prefixes = first_names(list(map(_prefix_of, encoders)))
            message = f"--into {self.name}: has {len(encoders)} {name} encoders, under the prefixes {prefixes}"
            raise LayoutError(message, "insert into a checkpoint that holds one of them alone")
        try:
            return ResolvedPlan(encoders[0], plan_to_canonical(self.checkpoint, encoders[0], ConvertOptions(family)))
        except MappingError as error:
            step = self.checkpoint.all_shards_step or "insert into a checkpoint whose encoder is whole and unchanged"
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
        what = f"--into {checkpoint.name}: has no encoder of a known layout ({_join_families(registry.families())})"
        if mark := find_mark(largest_state_dict(state_dicts(checkpoint.contents), checkpoint.name).tensors):
            raise mark.error(what)
        raise LayoutError(what, f"see what it holds: dsocr-convert inspect {path}")
    folder = path.parent if is_index(path.name) else None
    return Host(checkpoint, path if path.is_dir() else folder, families)


def check_output_name(host: Host, out: Path) -> None:
    """Raise UsageError if the output of a folder has a file's suffix, or that of a file another format's suffix."""
    if host.folder is None and out.suffix.lower() != f".{host.format}":
        raise UsageError(f"--output {out}: the copy of a single file is a file", f"end its name in .{host.format}")
    if host.folder is not None and has_weight_suffix(out.name):
        raise UsageError(f"--output {out}: the copy of a folder is a folder", "leave the suffix out")


def extract_shared(source: Checkpoint, host: Host, with_projector: bool, prefix: str | None) -> EncoderParts:
    """Extract the encoders of a checkpoint whose families the host has too.

    Args:
        source: The checkpoint.
        host: The host.
        with_projector: Whether to extract the projector too.
        prefix: The prefix of the encoders' names in `source`, or None.

    Raises:
        LayoutError: There are no such encoders.
    """
    encoders = detect_families(source, prefix)
    shared = [family for family in encoders if family in host.families]
    if encoders and not shared:
        families, host_families = _join_families(encoders), _join_families(host.families)
        message = f"{source.name}: has {families}, but the checkpoint of --into has {host_families}"
        raise LayoutError(message, "give a checkpoint that has one of these")
    # For a source without encoders, extracting the host's first family raises an error that says what the source is.
    parts = extract_encoder(source, with_projector, prefix, shared or [*host.families][:1], partial=True)
    dropped = dict(parts.dropped)
    for family in [family for family in encoders if family not in shared]:
        reason = f"the checkpoint of --into has no {family.upper()}"
        for detected in encoders[family]:
            inside = (tensor for name, tensor in detected.tensors.items() if name.startswith(detected.match.prefix))
            dropped |= {tensor.key: reason for tensor in inside if tensor.key in dropped}
    return replace(parts, dropped=dropped)


def _join_families(families: Iterable[str]) -> str:
    return ", ".join(family.upper() for family in families)


def _prefix_of(detected: DetectedLayout) -> str:
    return printable(detected.match.full_prefix) or "."


@dataclass
class Placement:
    """The tensors of a new encoder that replace tensors of a host, and the differences. Keys are the host's names."""

    new_tensors: dict[str, LazyTensor] = field(default_factory=dict)  # The encoder's tensors by key
    old_tensors: dict[str, TensorInfo] = field(default_factory=dict)  # All tensors of the host's encoders by key
    keys: dict[str, list[str]] = field(default_factory=dict)  # By the encoder's names: the keys that a tensor replaces
    rules: dict[str, Rule] = field(default_factory=dict)  # The rules that produce the new tensors, by key
    not_in_host: list[str] = field(default_factory=list)  # Names of the encoder that the host lacks
    kept: list[str] = field(default_factory=list)  # Keys that the encoder lacks
    problems: list[str] = field(default_factory=list)  # Differences that prevent the replacement
    layouts: list[str] = field(default_factory=list)  # The names of the layouts of the host's encoders
    notes: list[str] = field(default_factory=list)  # Messages for the user


def make_placement(host: Host, parts: EncoderParts) -> Placement:
    """Convert an encoder to the layouts of the host's encoders.

    Raises:
        UsageError: Layers, shapes or types differ.
    """
    placement = Placement()
    for family, resolved in host.resolve_all(parts.plans).items():
        _describe(placement, family, resolved, parts.plans[family].plan)
        _place_encoder(placement, resolved, parts)
    _place_projector(placement, host, parts)
    # llama.cpp stores a vector as a matrix of one row; ggml drops leading dimensions of 1.
    for key, value in placement.new_tensors.items():
        old_shape = placement.old_tensors[key].shape
        if [n for n in value.shape if n != 1] == [n for n in old_shape if n != 1]:
            placement.new_tensors[key] = reshaped(value, old_shape)
    mismatches = (_mismatch(placement.old_tensors[key], value) for key, value in placement.new_tensors.items())
    placement.problems += filter(None, mismatches)
    if placement.problems:
        raise UsageError(
            f"{host.name}: the encoder does not fit: {summary(placement.problems)}",
            "use an encoder of the same sizes: --compressor takes another compressor, and dsocr-convert FAMILY "
            "--image-size resamples positions",
        )
    if placement.not_in_host:
        placement.notes.append(f"left out {first_names(placement.not_in_host)}: the checkpoint has none")
    kept = [*(f"its {family.upper()}" for family in host.families if family not in parts.plans), *placement.kept]
    if kept:
        placement.notes.append(f"kept {first_names(kept)}: the encoder has none")
    return placement


def _describe(placement: Placement, family: str, host: ResolvedPlan, new: Plan) -> None:
    """Add notes on the layout and the function of a host's encoder, and a problem if the number of layers differs."""
    detected, plan, name = host.detected, host.plan, family.upper()
    placement.layouts.append(detected.match.name)
    placement.notes.append(f"its {name}: layout {detected.match.name}, prefix {_prefix_of(detected)}")
    placement.notes += _function_warning(new.assumptions, plan.assumptions)
    depth, new_depth = plan.sizes["depth"], new.sizes["depth"]
    if depth != new_depth:
        placement.problems.append(f"the {name} has {new_depth} layers; the checkpoint's has {depth}")


def _place_encoder(placement: Placement, host: ResolvedPlan, parts: EncoderParts) -> None:
    """Convert one encoder to the layout of the host's encoder."""
    detected, plan = host
    family, mapping = plan.mapping.family, detected.match.layout.mapping
    prefix, new_extra = registry.encoder_prefix(family), parts.plans[family].plan.extra_tensors
    rules = invert(mapping.rules_for(detected.match.prefix))
    inside = [template for rule in invert(mapping.rules) for template in rule.sources]
    # Extra tensors inside the encoder, such as CLIP's last norm, are replaced too; a text tower is not.
    old_extra = {name: value for name, value in plan.extra_tensors.items() if any_match(inside, name)}
    values = parts.encoder(family) | {name: new_extra[name] for name in old_extra if name in new_extra}
    names = {name: target_names(rules, name) for name in values}
    claimed = {name: value for name, value in values.items() if names[name]}
    applied = apply(tuple(rule._replace(optional=True) for rule in rules), claimed, detected.match.name)
    old_values = (plan.outputs | old_extra).values()
    old_tensors = {tensor.key: tensor for tensor in all_source_tensors(old_values)}
    keys = {name: tensor.key for name, tensor in detected.tensors.items() if tensor.key in old_tensors}
    for name, targets in names.items():
        if target_keys := [keys[target] for target in targets if target in keys]:
            placement.keys[prefix + name] = target_keys
        elif prefix + name not in parts.constants:
            placement.not_in_host.append(prefix + name)
    produced = {keys[name]: name for name in applied.values if name in keys}
    placement.new_tensors |= {key: applied.values[name] for key, name in produced.items()}
    placement.rules |= {key: applied.rules[name] for key, name in produced.items()}
    placement.old_tensors |= old_tensors
    placement.kept += [key for key in old_tensors if key not in produced]


def _function_warning(new: Assumptions, old: Assumptions) -> list[str]:
    """Return a warning if the encoder computes another function than the encoder that it replaces."""
    shared = {name: value._replace(expected=old[name].value) for name, value in new.items() if name in old}
    source, host = describe_differences(shared)
    if not source:
        return []
    return [f"warning: the source computes with {source}, the checkpoint of --into with {host}: change its config"]


def _place_projector(placement: Placement, host: Host, parts: EncoderParts) -> None:
    if not parts.projector:
        return
    old_projector = find_projector(host.resolve(next(iter(parts.plans))))
    for name, value in parts.projector.items():
        if old := old_projector.get(name):
            placement.new_tensors[old.key], placement.old_tensors[old.key] = value, old
            placement.keys[name] = [old.key]
        else:
            placement.not_in_host.append(name)


def _mismatch(old: TensorInfo, new: LazyTensor) -> str:
    if new.shape != old.shape:
        return f"{old.key!r} has shape {list(old.shape)}; the encoder's has {list(new.shape)}"
    if new.dtype != old.dtype and not (new.dtype.is_float and old.dtype.is_float):
        return f"{old.key!r} is {old.dtype.name}; the encoder's is {new.dtype.name}"
    return ""


def is_same(new: LazyTensor, old: TensorInfo) -> bool:
    """Return whether a new tensor is the old one: the same tensor of the same file, unchanged."""
    if not isinstance(new, Read) or new.tensor.key != old.key:
        return False
    return new.tensor.storage.file.identity == old.storage.file.identity

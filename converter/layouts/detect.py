"""Detects the encoders of a checkpoint: the layout, the state dict and the prefix of each one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from converter.checkpoint.file_kinds import by_product_step
from converter.checkpoint.open import Checkpoint
from converter.checkpoint.state_dict import StateDict, state_dicts, unwrapped_names
from converter.errors import LayoutError, UsageError, printable
from converter.layouts import registry
from converter.layouts.claims import first_few
from converter.layouts.match import LayoutMatch, match_layouts, without_inner_copies, without_language_models
from converter.layouts.spec import LayoutSpec
from converter.options import ConvertOptions
from converter.tensors.tensor_info import TensorInfo


@dataclass(frozen=True, eq=False)
class DetectedLayout:
    """A state dict and the layout of an encoder in it."""

    state_dict: StateDict
    selected: Mapping[str, TensorInfo]  # The tensors under --prefix, by names without segments of DDP or FSDP
    match: LayoutMatch  # The layout and its prefix

    @property
    def all_tensors(self) -> dict[str, TensorInfo]:
        """All tensors of the state dict, also those outside the prefix that the user chose."""
        return {**self.state_dict.unselected, **self.selected}

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """The selected tensors under the match's outer prefix, by names without it."""
        outer = self.match.outer_prefix
        return {name[len(outer) :]: tensor for name, tensor in self.selected.items() if name.startswith(outer)}

    @cached_property
    def outside(self) -> dict[str, TensorInfo]:
        """All other tensors of the state dict."""
        outer = self.match.outer_prefix
        others = {name: tensor for name, tensor in self.selected.items() if not name.startswith(outer)}
        return {**others, **self.state_dict.unselected}


def select_state_dicts(source: Checkpoint, path: str | None, prefix: str | None = None) -> list[StateDict]:
    """Return the state dicts of a checkpoint.

    Args:
        source: The checkpoint.
        path: The only state dict to return (--state-dict; `.` is the top level), or None.
        prefix: The prefix of the tensors to return (--prefix), or None.

    Raises:
        LayoutError: The checkpoint has no named tensors.
        UsageError: It has no such state dict, or no tensor with the prefix.
    """
    entries = state_dicts(source.contents)
    if not entries:
        step = by_product_step(source.name) or "save the model's state dict and convert that"
        raise LayoutError(f"{source.name}: contains no named tensors", step)
    if path is not None:
        chosen = [entry for entry in entries if entry.path == path.strip(".")]
        if not chosen:
            raise UsageError(f"--state-dict {path}: {source.name} has no such state dict", f"it has: {_paths(entries)}")
        entries = chosen
    if prefix is None:
        return entries
    selected = [part for entry in entries if (part := entry.under(prefix)).tensors]
    if not selected:
        segments = dict.fromkeys(name.partition(".")[0] + "." for entry in entries for name in entry.tensors)
        shown = ", ".join(printable(segment) for segment in first_few(list(segments)))
        raise UsageError(f"--prefix {prefix}: no tensor of {source.name} begins with it", f"names begin with: {shown}")
    return selected


def detect_layout(source: Checkpoint, layouts: Sequence[LayoutSpec], options: ConvertOptions) -> DetectedLayout:
    """Detect the layout of a checkpoint.

    Args:
        source: The checkpoint.
        layouts: The layouts to try: those of a family, or the one of the user's mapping file.
        options: The family, and the mapping file, state dict and prefix to use, if any.

    Raises:
        LayoutError: No encoder fits a layout, or several do.
    """
    candidates = select_state_dicts(source, options.state_dict, options.prefix)
    detected = detect_layouts(source, layouts, candidates)
    if options.mapping is not None:
        # The mapping file says where the encoder is.
        detected = [layout for layout in detected if not layout.match.outer_prefix] or detected
    if not detected:
        # Imported where there is an error to explain.
        from converter.layouts.explain import no_layout_error

        raise no_layout_error(source, options.family, layouts, candidates)
    if len(detected) > 1:
        raise _several_error(source, options.family, detected)
    return detected[0]


def _several_error(source: Checkpoint, family: str, detected: list[DetectedLayout]) -> LayoutError:
    entries = list({layout.state_dict.path: layout.state_dict for layout in detected}.values())
    if len(entries) > 1:
        what = f"has {len(entries)} state dicts that fit: {_paths(entries)}"
        step = f"--state-dict {printable(entries[0].path) or '.'}"
    else:
        prefixes = sorted(printable(layout.match.full_prefix) or "." for layout in detected)
        what = f"has {len(prefixes)} {family.upper()} encoders, under the prefixes {', '.join(prefixes)}"
        step = f"--prefix {prefixes[0]}"
    return LayoutError(f"{source.name}: {what}", f"choose one, such as {step}")


def detect_layouts(
    source: Checkpoint, layouts: Sequence[LayoutSpec], candidates: list[StateDict]
) -> list[DetectedLayout]:
    """Detect all encoders in the state dicts of a checkpoint that fit a layout.

    Args:
        source: The checkpoint, for error messages.
        layouts: The layouts to try.
        candidates: The state dicts of the checkpoint.
    """
    names = [name for candidate in candidates for name in candidate.tensors]
    detected = []
    for candidate in candidates:
        tensors = unwrapped_names(candidate.tensors, source.name)
        matches = match_layouts(tensors, layouts)
        if candidate.prefix is None:
            matches = without_language_models(matches, names)
        chosen = without_inner_copies((match.full_prefix for match in matches), candidate.prefix)
        detected += [DetectedLayout(candidate, tensors, match) for match in matches if match.full_prefix in chosen]
    return detected


def detect_families(source: Checkpoint, prefix: str | None = None) -> dict[str, list[DetectedLayout]]:
    """Return the encoders of a checkpoint under a prefix (--prefix) by family, without families that it lacks."""
    return detect_families_in(source, select_state_dicts(source, None, prefix))


def detect_families_in(source: Checkpoint, candidates: list[StateDict]) -> dict[str, list[DetectedLayout]]:
    """Return the encoders of some state dicts by family, without families that they lack."""
    encoders = {family: detect_layouts(source, registry.layouts(family), candidates) for family in registry.families()}
    return {family: detected for family, detected in encoders.items() if detected}


def _paths(entries: Sequence[StateDict]) -> str:
    return ", ".join(f"{printable(entry.path) or '.'} ({len(entry.tensors)} tensors)" for entry in entries)

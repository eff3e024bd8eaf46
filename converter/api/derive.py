"""Derives a mapping file from two checkpoints of the same weights, or from a checkpoint and a layout's names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from converter.checkpoint.open import Checkpoint, check_unchanged, open_checkpoints
from converter.checkpoint.state_dict import StateDict, largest_state_dict, unwrapped_names
from converter.derivation.comparison import Comparison, TensorMatch, match_by_names
from converter.derivation.mapping import Derived, build_mapping
from converter.errors import LayoutError, UsageError
from converter.layouts import registry
from converter.layouts.detect import detect_families, select_state_dicts
from converter.options import ConvertOptions, HubOptions, check_choices
from converter.output.target import check_not_source, check_target
from converter.plan.plan import Plan
from converter.plan.planner import plan_to_canonical
from converter.storage.atomic_output import atomic_file, remove_stale, write_all
from converter.storage.progress import OnProgress, progress_counter
from converter.tensors.lazy_tensor import all_source_tensors, lazy_read, nbytes


def derive(
    source: str | Path,
    target: str | Path,
    *,
    out: str | Path = "my.yaml",
    name: str = "",
    family: str = "",
    state_dict: str | None = None,
    prefix: str | None = None,
    force: bool = False,
    allow_partial: bool = False,
    on_progress: OnProgress = lambda what, done, total: None,
    **hub_options: Any,
) -> Derived:
    """Write the mapping file that converts `source`, in an unknown layout, to the tensors of `target`.

    Before the file is written, a plan for `source` checks that the mapping gives exactly the matched tensors.

    Args:
        source: The checkpoint.
        target: A checkpoint with the same weights in a known layout, or the name of a layout. With a name, only names
            and shapes are compared.
        out: The file to write. It is written if all tensors of the target were matched, or with `allow_partial`.
        name: The name of the layout; by default the name of the file without its suffix.
        family: The encoder, if `target` contains several.
        state_dict: The path of the state dict in `source`, as in `convert`.
        prefix: The prefix of the encoder in `source`, as in `convert`.
        force: Replace an existing file.
        allow_partial: Write the file even if tensors of the target were not matched.
        on_progress: Called with a description of the step, the bytes done, and the total bytes.
        **hub_options: The fields of `converter.options.HubOptions`, for both checkpoints.

    Raises:
        SourceError: The target has no known layout, several tensors match equally well, or tensors inside the encoder
            have no match.
    """
    path, hub = Path(out), HubOptions(**hub_options)
    check_choices(family=(family, ("", *registry.families())))
    remove_stale(path)
    check_target(path, force, 0)
    is_layout_name = str(target) in registry.layout_names() and not Path(target).exists()
    with open_checkpoints([source] if is_layout_name else [source, target], hub) as checkpoints:
        opened, known = checkpoints[0], str(target) if is_layout_name else checkpoints[1]
        check_not_source(path, checkpoints)
        chosen = largest_state_dict(select_state_dicts(opened, state_dict, prefix), opened.name)
        comparison = _make_comparison(name or path.stem, opened.name, chosen, known, family)
        matches = match_by_names(comparison) if is_layout_name else _match_values(comparison, checkpoints, on_progress)
        if state_dict is None:
            _check_state_dicts(opened, chosen.path, matches)
        derived = build_mapping(comparison, matches)
        check_unchanged(checkpoints)
    if allow_partial or derived.complete:
        with atomic_file(path, force) as fd:
            write_all(fd, memoryview(derived.text.encode()))
    return replace(derived, output=str(path), written=allow_partial or derived.complete)


def _make_comparison(layout: str, source: str, chosen: StateDict, target: Checkpoint | str, family: str) -> Comparison:
    """Return the tensors of a state dict and those of the target, which is a checkpoint or the name of a layout."""
    infos = unwrapped_names({**chosen.tensors, **chosen.unselected}, source)
    tensors = {name: lazy_read(info) for name, info in infos.items()}
    selected = {name: tensors[name] for name, info in infos.items() if info.key in chosen.tensors}
    if isinstance(target, str):
        canonical, expected, name = registry.canonical(registry.load(target).family), {}, target
    else:
        plan = _plan_target(target, family)
        canonical, expected, name = plan.target, plan.outputs | plan.extra_tensors, target.name
    return Comparison(layout, source, tensors, selected, chosen.prefix, name, canonical, expected)


def _plan_target(opened: Checkpoint, family: str) -> Plan:
    """Plan the conversion of the target to canonical names; an error unless it has one encoder, of `family` if set."""
    encoders = {name: detected for name, detected in detect_families(opened).items() if family in ("", name)}
    if not encoders:
        hint = "list the known layouts with: dsocr-convert mapping list"
        raise LayoutError(f"{opened.name}: TARGET has no known layout", hint)
    if len(encoders) > 1:
        raise UsageError(f"{opened.name}: contains {' and '.join(encoders)}", "choose one with --family")
    ((name, detected),) = encoders.items()
    if len(detected) > 1:
        hint = f"convert one of them to a file: dsocr-convert {name} with --prefix or --state-dict"
        raise UsageError(f"{opened.name}: TARGET holds {len(detected)} {name.upper()} encoders", hint)
    return plan_to_canonical(opened, detected[0], ConvertOptions(name))


def _match_values(comparison: Comparison, checkpoints: list[Checkpoint], on_progress: OnProgress) -> list[TensorMatch]:
    # Imported here, since comparing names does not need torch.
    from converter.derivation.search import match_by_values

    for opened, tensors in zip(checkpoints, (comparison.selected, comparison.expected), strict=True):
        opened.fetch(all_source_tensors(tensors.values()), on_progress)
    total = sum(map(nbytes, (*comparison.selected.values(), *comparison.expected.values())))
    return match_by_values(comparison, progress_counter(on_progress, "reading", total))


def _check_state_dicts(opened: Checkpoint, path: str, matches: list[TensorMatch]) -> None:
    """Raise LayoutError if a second state dict, such as an EMA, has all matched names too."""
    names = {name for match in matches for name in match.sources}
    for other in select_state_dicts(opened, None):
        if other.path != path and names and names <= unwrapped_names(other.tensors, opened.name).keys():
            raise LayoutError(
                f"{opened.name}: the state dicts {path or '.'} and {other.path or '.'} have the same names",
                f"choose one, such as --state-dict {path or '.'}",
            )

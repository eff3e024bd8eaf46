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
from converter.layouts.detect import detect_layouts, select_state_dicts
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
    by_names = str(target) in registry.layout_names() and not Path(target).exists()
    with open_checkpoints([source] if by_names else [source, target], hub) as checkpoints:
        opened, *others = checkpoints
        check_not_source(path, checkpoints)
        chosen = largest_state_dict(select_state_dicts(opened, state_dict, prefix), opened.name)
        comparison = _compare(name or path.stem, opened.name, chosen, others[0] if others else str(target), family)
        matches = _match_values(comparison, checkpoints, on_progress) if others else match_by_names(comparison)
        if state_dict is None:
            _check_state_dicts(opened, chosen.path, matches)
        derived = build_mapping(comparison, matches)
        check_unchanged(checkpoints)
    if allow_partial or derived.complete:
        with atomic_file(path, force) as fd:
            write_all(fd, memoryview(derived.text.encode()))
    return replace(derived, output=str(path), written=allow_partial or derived.complete)


def _compare(layout: str, source: str, chosen: StateDict, target: Checkpoint | str, family: str) -> Comparison:
    """Name the tensors of a state dict, and plan those of the target: a checkpoint, or the name of a layout."""
    read = unwrapped_names({**chosen.tensors, **chosen.unselected}, source)
    tensors = {key: lazy_read(tensor) for key, tensor in read.items()}
    selected = {key: tensors[key] for key, tensor in read.items() if tensor.key in chosen.tensors}
    if isinstance(target, str):
        canonical, expected, name = registry.canonical(registry.load(target).family), {}, target
    else:
        plan = _plan_target(target, family)
        canonical, expected, name = plan.target, plan.outputs | plan.extra_tensors, target.name
    return Comparison(layout, source, tensors, selected, chosen.prefix, name, canonical, expected)


def _plan_target(opened: Checkpoint, family: str) -> Plan:
    """Return the plan to canonical names; an error unless the target contains one encoder, of `family` if given."""
    state_dicts, families = select_state_dicts(opened, None), [family] if family else registry.families()
    found = [found for name in families for found in detect_layouts(opened, registry.layouts(name), state_dicts)]
    names = list(dict.fromkeys(detected.match.layout.family for detected in found))
    if not found:
        hint = "list the known layouts with: dsocr-convert mapping list"
        raise LayoutError(f"{opened.name}: TARGET has no known layout", hint)
    if len(names) > 1:
        raise UsageError(f"{opened.name}: contains {' and '.join(names)}", "choose one with --family")
    if len(found) > 1:
        hint = f"convert one of them to a file: dsocr-convert {names[0]} with --prefix or --state-dict"
        raise UsageError(f"{opened.name}: TARGET holds {len(found)} {names[0].upper()} encoders", hint)
    return plan_to_canonical(opened, found[0], ConvertOptions(names[0]))


def _match_values(comparison: Comparison, checkpoints: list[Checkpoint], on_progress: OnProgress) -> list[TensorMatch]:
    # Imported here, since comparing names does not need torch.
    from converter.derivation.search import match_by_values

    for opened, tensors in zip(checkpoints, (comparison.selected, comparison.expected), strict=True):
        opened.fetch(all_source_tensors(tensors.values()), on_progress)
    total = sum(map(nbytes, (*comparison.selected.values(), *comparison.expected.values())))
    return match_by_values(comparison, progress_counter(on_progress, "reading", total))


def _check_state_dicts(opened: Checkpoint, path: str, matches: list[TensorMatch]) -> None:
    """Raise LayoutError if another state dict than the one at `path` has all matched names too, such as an EMA."""
    names = {name for match in matches for name in match.sources}
    for other in select_state_dicts(opened, None):
        if other.path != path and names and names <= unwrapped_names(other.tensors, opened.name).keys():
            raise LayoutError(
                f"{opened.name}: the state dicts {path or '.'} and {other.path or '.'} have the same names",
                f"choose one, such as --state-dict {path or '.'}",
            )

"""Derives a mapping file from two checkpoints of the same weights, or from a checkpoint and a layout's names."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

from converter.checkpoint.open import check_unchanged, open_checkpoint
from converter.checkpoint.state_dict import largest_state_dict, unwrapped_names
from converter.derivation.comparison import Comparison, plan_target
from converter.derivation.mapping import Derived, build_mapping
from converter.derivation.matches import TensorMatch
from converter.derivation.names import match_by_names
from converter.layouts import registry
from converter.layouts.detect import select_state_dicts
from converter.output.target import check_not_source, check_target
from converter.storage.atomic_output import atomic_file, remove_stale, write_all
from converter.storage.progress import OnProgress, progress_counter
from converter.tensors.lazy_tensor import lazy_read, nbytes, source_tensors


def derive(
    source: str | Path,
    target: str | Path,
    *,
    out: str | Path = "my.yaml",
    name: str = "",
    family: str = "",
    state_dict: str | None = None,
    force: bool = False,
    allow_partial: bool = False,
    on_progress: OnProgress = lambda what, done, total: None,
) -> Derived:
    """Write the mapping file that turns `source`, in an unknown layout, into what `target` holds.

    The text is parsed and planned for `source` before it is written: it gives exactly what was matched.

    Args:
        source: The checkpoint.
        target: The same weights in a known layout; or a layout's name, then names and shapes alone decide.
        out: The file to write. It is written if all of the target was found, or with `allow_partial`.
        name: The layout's name; by default the file's without its ending.
        family: Which encoder, if `target` holds several.
        state_dict: Which state dict of `source`, as in `convert`.
        force: Replace an existing file.
        allow_partial: Write the rules that were found even if tensors of the target have no match.
        on_progress: Called with what is being done, how much of it is done, and of how much.

    Raises:
        SourceError: The target has no known layout, tensors fit equally well, or some are left over in the encoder.
    """
    path = Path(out)
    remove_stale(path)
    check_target(path, force, 0)
    with ExitStack() as stack:
        opened = stack.enter_context(closing(open_checkpoint(source)))
        entry = largest_state_dict(select_state_dicts(opened, state_dict), opened.name)
        tensors = {key: lazy_read(tensor) for key, tensor in unwrapped_names(entry.tensors, opened.name).items()}
        if str(target) in registry.layout_names() and not Path(target).exists():
            canonical, checkpoints = registry.canonical(registry.load(str(target)).family), [opened]
            comparison = Comparison(name or path.stem, opened.name, tensors, str(target), canonical, {})
        else:
            other = stack.enter_context(closing(open_checkpoint(target)))
            plan, checkpoints = plan_target(other, family), [opened, other]
            expected = {**plan.outputs, **plan.extra_tensors}
            comparison = Comparison(name or path.stem, opened.name, tensors, other.name, plan.target, expected)
            other.fetch((tensor for value in expected.values() for tensor in source_tensors(value)), on_progress)
            opened.fetch(entry.tensors.values(), on_progress)
        check_not_source(path, checkpoints)
        matches = _find_matches(comparison, on_progress)
        derived = build_mapping(comparison, matches)
        check_unchanged(checkpoints)
    if allow_partial or derived.complete:
        with atomic_file(path, force) as fd:
            write_all(fd, memoryview(derived.text.encode()))
    return replace(derived, output=str(path), written=allow_partial or derived.complete)


def _find_matches(comparison: Comparison, on_progress: OnProgress) -> list[TensorMatch]:
    """Return all matches; LayoutError if tensors fit equally well."""
    if comparison.expected:
        # Only values need torch.
        from converter.derivation.search import match_by_values

        total = sum(map(nbytes, (*comparison.tensors.values(), *comparison.expected.values())))
        return match_by_values(comparison, progress_counter(on_progress, "reading", total))
    return match_by_names(comparison)

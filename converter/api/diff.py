"""Compares two checkpoints under common names, whatever their containers and layouts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

from converter.checkpoint.open import Checkpoint, check_unchanged, open_checkpoints
from converter.checkpoint.state_dict import state_dicts
from converter.comparison.align import NamedTensors, Side, align, select_side
from converter.comparison.difference import Block, Change, Difference, PairStatistics, block_of
from converter.comparison.streams import Pairs, differing, names_by_digest
from converter.errors import UsageError, natural_sort_key
from converter.options import HubOptions
from converter.output.names import grouped
from converter.storage.progress import OnProgress, progress_counter
from converter.tensors.dtypes import BY_NAME
from converter.tensors.lazy_tensor import LazyTensor, all_source_tensors, nbytes, source_tensors
from converter.tensors.tensor_info import TensorInfo


def diff(
    a: str | Path,
    b: str | Path,
    *,
    state_dict: str | None = None,
    prefix: str | None = None,
    on_progress: OnProgress = lambda what, done, total: None,
    **hub_options: Any,
) -> Difference:
    """Compare two checkpoints: names, types, shapes, values, and the relative L2 change of each layer.

    An encoder that both contain is compared under its canonical names; all other tensors under their names in the
    files. Memory does not grow with the checkpoints.

    Args:
        a: A checkpoint: a file, a folder or an index, local or on a hub (`hf://org/name@revision`, `org/name`).
        b: Another checkpoint.
        state_dict: Which state dict of a file with several (model, ema; `.` for the top); `A,B` for different ones.
        prefix: The prefix of the encoder to compare (`.` for none); it is ignored for a checkpoint without such names
            if the other one has some. `A,B` for different prefixes.
        on_progress: Called with what is done, the bytes done and all bytes, as bytes are compared, measured or
            fetched; when fetching, also from other threads.
        **hub_options: The fields of `converter.options.HubOptions`, for both checkpoints.

    Returns:
        The tensors that are the same, changed, renamed, or in one checkpoint only.

    Raises:
        UsageError: A state dict or a prefix does not exist, or an option lacks a value before or after its comma.
        LayoutError: A checkpoint has several state dicts of the same size.
        DsocrError: A checkpoint cannot be read, or a checksum does not match.
    """
    paths, prefixes = _split_option("--state-dict", state_dict), _split_option("--prefix", prefix)
    with open_checkpoints([a, b], HubOptions(**hub_options)) as [left, right]:
        if prefix is not None and "," not in prefix:
            prefixes = _prefix_of_each(prefix, left, right)
        sides = select_side(left, paths[0], prefixes[0]), select_side(right, paths[1], prefixes[1])
        difference = _compare(sides, on_progress)
        check_unchanged((left, right))
    return difference


def _split_option(option: str, value: str | None) -> tuple[str | None, str | None]:
    """Return the values of an option for A and B, which a comma separates; without one, the same value."""
    if value is None or "," not in value:
        return value, value
    halves = value.split(",")
    if len(halves) != 2 or not all(halves):
        raise UsageError(f"{option} {value}: expected one value for both checkpoints, or two with a comma between: A,B")
    return halves[0], halves[1]


def _prefix_of_each(prefix: str, a: Checkpoint, b: Checkpoint) -> tuple[str | None, str | None]:
    """Return the prefix for A and B: None for one that has no such names, if the other one has some."""
    in_a, in_b = (any(entry.under(prefix).tensors for entry in state_dicts(side.contents)) for side in (a, b))
    return prefix if in_a or not in_b else None, prefix if in_b or not in_a else None


def _compare(sides: tuple[Side, Side], on_progress: OnProgress) -> Difference:
    aligned = align(*sides)
    a, b, notes = aligned.a, aligned.b, aligned.notes
    pairs = {name: (a[name], b[name]) for name in sorted(a.keys() & b.keys(), key=natural_sort_key)}
    removed, added = _only_in_side(a, pairs, 0, notes), _only_in_side(b, pairs, 1, notes)
    uncompared = {name: types for name, pair in pairs.items() if (types := _unreadable_types(pair))}
    pairs = {name: pair for name, pair in pairs.items() if name not in uncompared}
    same_shape = {name: pair for name, pair in pairs.items() if pair[0].shape == pair[1].shape}
    for side, named in zip(sides, (a, b), strict=True):
        side.opened.fetch(all_source_tensors(named.values()), on_progress)
    unequal = _unequal(same_shape, on_progress)
    renamed = _renamed({name: a[name] for name in removed}, {name: b[name] for name in added})
    stats = _measure_changed_blocks(same_shape, unequal, on_progress)
    differ = [name for name in pairs if name in unequal or name not in same_shape]
    same = [name for name in same_shape if name not in unequal]
    changed = [_change(name, pairs[name], stats.get(name)) for name in differ]
    same_values = {*same, *(change.name for change in changed if change.differing == 0)}
    equal = {family: names.issubset(same) for family, names in aligned.encoders.items()}
    return Difference(
        a=sides[0].opened.name,
        b=sides[1].opened.name,
        containers=[sorted(set(side.opened.containers)) for side in sides],
        layouts=[[detected.match.name for detected in side.detected.values()] for side in sides],
        names=aligned.layouts,
        notes=notes,
        same=same,
        changed=changed,
        removed=[name for name in removed if name not in renamed],
        added=[name for name in added if name not in renamed.values()],
        renamed=renamed,
        blocks=_blocks(same_shape, unequal, stats),
        uncompared=uncompared,
        encoders=equal,
        cast=[family for family, names in aligned.encoders.items() if names <= same_values and not equal[family]],
    )


def _unreadable_types(values: Iterable[LazyTensor]) -> str:
    """Return the types of the tensors that cannot be read, such as "sparse"."""
    return ", ".join(dict.fromkeys(value.dtype.name for value in values if not value.dtype.bits))


def _only_in_side(named: NamedTensors, pairs: Pairs, index: int, notes: list[str]) -> list[str]:
    """Return the names that only A (index 0) or B (1) has. Second names of tensors that both have are noted instead."""
    shared_names = {_location(tensor): name for name, pair in pairs.items() for tensor in source_tensors(pair[index])}
    unpaired = []
    for name in sorted(named.keys() - pairs.keys(), key=natural_sort_key):
        aliases = {shared_names.get(_location(tensor)) for tensor in source_tensors(named[name])}
        if len(aliases) == 1 and None not in aliases:
            notes.append(f"{'AB'[index]}'s {name} shares its bytes with {aliases.pop()}: not counted")
        else:
            unpaired.append(name)
    return unpaired


def _location(tensor: TensorInfo) -> tuple[object, ...]:
    """Return a key that is equal for tensors that view the same elements."""
    return id(tensor.storage), tensor.byte_offset, tensor.shape, tensor.strides


def _unequal(same_shape: Pairs, on_progress: OnProgress) -> set[str]:
    unequal = {name for name, (a, b) in same_shape.items() if a.dtype != b.dtype}
    compared = {name: pair for name, pair in same_shape.items() if name not in unequal}
    total = sum(nbytes(a) for a, _ in compared.values())
    return unequal | differing(compared, progress_counter(on_progress, "comparing", total))


def _renamed(removed: NamedTensors, added: NamedTensors) -> dict[str, str]:
    """Map names only in A to names only in B of bit-identical tensors. Several identical ones are paired in order."""
    # Only tensors whose type and shape occur on both sides are read.
    in_a = {(value.dtype, value.shape) for value in removed.values() if value.dtype.bits}
    in_b = {(value.dtype, value.shape) for value in added.values() if value.dtype.bits}
    old_names, new_names = (
        names_by_digest({name: value for name, value in side.items() if (value.dtype, value.shape) in in_a & in_b})
        for side in (removed, added)
    )
    renamed: dict[str, str] = {}
    for digest, names in old_names.items():
        renamed.update(zip(names, new_names.get(digest, []), strict=False))
    return renamed


def _measure_changed_blocks(same_shape: Pairs, unequal: set[str], on_progress: OnProgress) -> dict[str, PairStatistics]:
    """Measure all tensors of each changed block, as its relative change needs the norm of the whole block."""
    changed = {block_of(name) for name in unequal}
    if not changed:
        return {}
    # Imports torch, which takes two seconds: only if checkpoints differ.
    from converter.comparison.measure import measure_differences

    measured = {
        name: pair
        for name, pair in same_shape.items()
        if block_of(name) in changed and all(value.dtype.name in BY_NAME for value in pair)
    }
    total = sum(nbytes(a) for a, _ in measured.values())
    return measure_differences(measured, progress_counter(on_progress, "measuring", total))


def _change(name: str, pair: tuple[LazyTensor, LazyTensor], stats: PairStatistics | None) -> Change:
    dtypes, shapes = [value.dtype.name for value in pair], [list(value.shape) for value in pair]
    if stats is None:
        return Change(name, dtypes, shapes)
    # Imports torch, which measuring has imported.
    from converter.comparison.measure import difference_rank

    rank = difference_rank(*pair) if stats.sum_diff_sq else None
    return Change(name, dtypes, shapes, stats.differing, stats.maximum, stats.relative, stats.cosine, rank)


def _blocks(same_shape: Pairs, unequal: set[str], stats: Mapping[str, PairStatistics]) -> list[Block]:
    names_by_block = grouped((block_of(name), name) for name in same_shape)
    # Only floating-point tensors: position indices and counters are not trained.
    weights = {name: measured for name, measured in stats.items() if same_shape[name][0].dtype.is_float}
    blocks = []
    for block, names in names_by_block.items():
        total = reduce(PairStatistics.plus, (weights[name] for name in names if name in weights), PairStatistics())
        blocks.append(Block(block, len(names), len(unequal.intersection(names)), total.relative, total.maximum))
    return blocks

"""Finds the operations that turn one tensor into another, by comparing their elements."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from converter.tensors.ops import Deinterleave, Op, Permute, Reorder, Reshape, Squeeze, Unsqueeze

# Numbers of equal parts of the rows: q, k and v in another order, or interleaved head by head.
_NUM_PARTS = (2, 3, 4)
_MAX_HEADS = 128
# Permutations are tried up to the five dimensions of a video's patch embedding.
_MAX_DIMS = 5
# An odd number with random bits.
_MULTIPLIER = -1640531535

Dims = tuple[int, ...]
Ops = tuple[Op, ...]


def find_operations(tensor: torch.Tensor, target: torch.Tensor) -> Ops | None:
    """Return the operations that turn `tensor` into `target`, or None.

    They are a reshape and a permutation in any order, then those that move rows; each of them is optional.
    """
    if tensor.numel() != target.numel():
        return None
    arrangements = sorted(_arrangements(tuple(tensor.shape), tuple(target.shape)), key=lambda item: len(item[0]))
    for ops, before, shape, after in arrangements:
        value = tensor.permute(before).reshape(shape).permute(after)
        if torch.equal(value, target):
            return ops
        for rows, index in _row_operations(value, target):
            if torch.equal(value[index], target):
                return (*ops, *rows)
    return None


def _arrangements(source: Dims, target: Dims) -> Iterator[tuple[Ops, Dims, Dims, Dims]]:
    """Yield the ways to give a tensor another shape: operations; a permutation, a shape, and another permutation."""
    same, kept = tuple(range(len(source))), tuple(range(len(target)))
    for dims, permute in _permutations(kept):
        shape = tuple(target[dims.index(i)] for i in kept)
        yield (*_reshape(source, shape), *permute), same, shape, dims
    # Heads or parts in a dimension of their own, which is not next to the one that it is joined with.
    for dims, permute in _permutations(same) if len(source) > len(target) else ():
        yield (*permute, *_reshape(tuple(source[dim] for dim in dims), target)), dims, target, kept


def _permutations(dims: Dims) -> Iterator[tuple[Dims, Ops]]:
    """Yield orders of dimensions, each with its operation: none for the order that they have."""
    for order in itertools.permutations(dims) if len(dims) <= _MAX_DIMS else [dims]:
        yield order, () if order == dims else (Permute(order),)


def _reshape(before: Dims, after: Dims) -> Ops:
    """Return the operation from one shape to another; squeeze and unsqueeze suit models of any size."""
    if before == after:
        return ()
    longer, shorter, op = (before, after, Squeeze) if len(before) > len(after) else (after, before, Unsqueeze)
    ones = [dim for dim, size in enumerate(longer) if size == 1]
    for dims in itertools.combinations(ones, len(longer) - len(shorter)):
        if dims and tuple(size for dim, size in enumerate(longer) if dim not in dims) == shorter:
            return (op(dims),)
    return (Reshape(before, after),)


def mix(elements: torch.Tensor) -> torch.Tensor:
    """Return a number with random bits for each element. Their sum tells tensors apart, but not orders of elements."""
    mixed = elements.int() * _MULTIPLIER
    return mixed ^ (mixed >> 15)


def _row_operations(tensor: torch.Tensor, target: torch.Tensor) -> Iterator[tuple[Ops, torch.Tensor]]:
    """Yield operations that may bring rows into the target's order, with the indices of the rows in that order."""
    num_rows = len(target) if target.dim() and target.numel() else 0
    rows, expected = (mix(value).reshape(num_rows or 1, -1).sum(1) for value in (tensor, target))
    # Hashes of rows are compared before whole tensors are rearranged.
    for ops, index in _row_orders(num_rows) if torch.equal(rows.sort().values, expected.sort().values) else ():
        for num_parts in (1, *_NUM_PARTS) if ops else _NUM_PARTS:
            if num_rows % num_parts == 0 and (order := _find_order(rows[index], expected, num_parts)):
                reorder = (Reorder(order),) if num_parts > 1 else ()
                parts = index.chunk(num_parts)
                yield (*ops, *reorder), torch.cat([parts[i] for i in order])


def _row_orders(num_rows: int) -> Iterator[tuple[Ops, torch.Tensor]]:
    """Yield the identity and each Deinterleave of some rows, with the indices of the rows in their new order."""
    index = torch.arange(num_rows)
    yield (), index
    for parts, heads in itertools.product(_NUM_PARTS, range(2, _MAX_HEADS + 1)):
        for outer, inner in ((heads, parts), (parts, heads)) if num_rows and num_rows % (heads * parts) == 0 else ():
            yield (Deinterleave(outer, inner),), index.reshape(outer, inner, -1).transpose(0, 1).reshape(-1)


def _find_order(rows: torch.Tensor, target: torch.Tensor, num_parts: int) -> Dims | None:
    """Return the order in which equal parts of the rows give the target, or None if there is none or several."""
    parts = rows.chunk(num_parts)
    equal = [[i for i, part in enumerate(parts) if torch.equal(part, t)] for t in target.chunk(num_parts)]
    order = tuple(indices[0] if len(indices) == 1 else -1 for indices in equal)
    return order if sorted(order) == list(range(num_parts)) else None

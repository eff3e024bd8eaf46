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

Ops = tuple[Op, ...]


def find_operations(tensor: torch.Tensor, target: torch.Tensor) -> Ops | None:
    """Return the fewest operations that turn `tensor` into `target`, or None.

    The operations are a reshape, a permutation, and one that moves rows; each of them is optional.
    """
    if tensor.numel() != target.numel():
        return None
    arranged = sorted(_arrangements(tensor, tuple(target.shape)), key=lambda item: len(item[0]))
    for find_rows in (_equal, _reorder, _deinterleave):
        for ops, value in arranged:
            rows = find_rows(value, target)
            if rows is not None:
                return (*ops, *rows)
    return None


def _arrangements(tensor: torch.Tensor, shape: tuple[int, ...]) -> Iterator[tuple[Ops, torch.Tensor]]:
    """Yield the tensor in `shape` by a reshape and each permutation, the identity first."""
    identity = tuple(range(len(shape)))
    for dims in itertools.permutations(identity) if len(shape) <= _MAX_DIMS else [identity]:
        before = tuple(shape[dims.index(i)] for i in identity)
        reshape = _reshape(tuple(tensor.shape), before)
        yield reshape if dims == identity else (*reshape, Permute(dims)), tensor.reshape(before).permute(dims)


def _reshape(before: tuple[int, ...], after: tuple[int, ...]) -> Ops:
    """Return the operation from one shape to another; squeeze and unsqueeze suit models of any size."""
    if before == after:
        return ()
    longer, shorter, op = (before, after, Squeeze) if len(before) > len(after) else (after, before, Unsqueeze)
    ones = [dim for dim, size in enumerate(longer) if size == 1]
    for dims in itertools.combinations(ones, len(longer) - len(shorter)):
        if dims and tuple(size for dim, size in enumerate(longer) if dim not in dims) == shorter:
            return (op(dims),)
    return (Reshape(before, after),)


def _equal(tensor: torch.Tensor, target: torch.Tensor) -> Ops | None:
    return () if torch.equal(tensor, target) else None


def _reorder(tensor: torch.Tensor, target: torch.Tensor) -> Ops | None:
    """Return a Reorder of equal parts of the rows, or None."""
    for num_parts in _NUM_PARTS:
        if target.dim() and len(target) and len(target) % num_parts == 0:
            parts = tensor.chunk(num_parts)
            equal = [[i for i, part in enumerate(parts) if torch.equal(part, t)] for t in target.chunk(num_parts)]
            order = tuple(indices[0] if len(indices) == 1 else -1 for indices in equal)
            if sorted(order) == list(range(num_parts)):
                return (Reorder(order),)
    return None


def _deinterleave(tensor: torch.Tensor, target: torch.Tensor) -> Ops | None:
    """Return a Deinterleave of the rows, or None."""
    num_rows = len(target) if target.dim() else 0
    # The first column is compared before whole tensors are rearranged.
    first, expected = (value.reshape(num_rows or 1, -1)[:, 0] for value in (tensor, target))
    if num_rows < 4 or not torch.equal(first.sort().values, expected.sort().values):
        return None
    for parts, heads in itertools.product(_NUM_PARTS, range(2, _MAX_HEADS + 1)):
        for outer, inner in ((heads, parts), (parts, heads)) if num_rows % (heads * parts) == 0 else ():
            order = torch.arange(num_rows).reshape(outer, inner, -1).transpose(0, 1).reshape(-1)
            if torch.equal(first[order], expected) and torch.equal(tensor[order], target):
                return (Deinterleave(outer, inner),)
    return None

"""The operations that turn one tensor into another, found by trying."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from converter.tensors.ops import Deinterleave, Op, Permuted, Reshaped, Squeeze, Unsqueeze

# Interleaved rows: this many tensors in one (q, k, v), and at most so many heads.
_INTERLEAVED = (2, 3, 4)
_MOST_HEADS = 128
# Of more dimensions than a video's patch embedding has, no permutations are tried.
_MOST_DIMS = 5


def chain(tensor: torch.Tensor, wanted: torch.Tensor) -> tuple[Op, ...] | None:
    """The fewest operations that make one tensor of another: reshape, permute, deinterleave; None where they do not."""
    if tensor.numel() != wanted.numel():
        return None
    tried = sorted(_moved(tensor, tuple(wanted.shape)), key=lambda item: len(item[0]))
    equal = next((ops for ops, moved in tried if torch.equal(moved, wanted)), None)
    if equal is not None:
        return equal
    rows = ((ops, _interleaved(moved, wanted)) for ops, moved in tried)
    return next(((*ops, last) for ops, last in rows if last is not None), None)


def _moved(tensor: torch.Tensor, wanted: tuple[int, ...]) -> Iterator[tuple[tuple[Op, ...], torch.Tensor]]:
    """The tensor brought to a shape by a reshape and each permutation, the one that moves nothing first."""
    straight = tuple(range(len(wanted)))
    for dims in itertools.permutations(straight) if len(wanted) <= _MOST_DIMS else [straight]:
        shape = tuple(wanted[dims.index(i)] for i in straight)
        reshape = _reshaping(tuple(tensor.shape), shape)
        yield reshape if dims == straight else (*reshape, Permuted(dims)), tensor.reshape(shape).permute(dims)


def _interleaved(tensor: torch.Tensor, wanted: torch.Tensor) -> Deinterleave | None:
    """How rows are interleaved head by head, if they are."""
    rows = wanted.shape[0] if wanted.dim() else 0
    # Asked of the first column before whole tensors are rearranged.
    first, expected = tensor.reshape(rows or 1, -1)[:, 0], wanted.reshape(rows or 1, -1)[:, 0]
    if rows < 4 or not torch.equal(first.sort().values, expected.sort().values):
        return None
    for parts, heads in itertools.product(_INTERLEAVED, range(2, _MOST_HEADS + 1)):
        if rows % (heads * parts):
            continue
        for one, other in ((heads, parts), (parts, heads)):
            order = torch.arange(rows).reshape(one, other, -1).transpose(0, 1).reshape(-1)
            if torch.equal(first[order], expected) and torch.equal(tensor[order], wanted):
                return Deinterleave(one, other)
    return None


def _reshaping(before: tuple[int, ...], after: tuple[int, ...]) -> tuple[Op, ...]:
    """The operation from one shape to another of as many elements, in words that suit all sizes if there are any."""
    if before == after:
        return ()
    for longer, shorter, op in ((before, after, Squeeze), (after, before, Unsqueeze)):
        ones = [dim for dim, size in enumerate(longer) if size == 1]
        for dims in itertools.combinations(ones, len(longer) - len(shorter)) if len(longer) > len(shorter) else ():
            if tuple(size for dim, size in enumerate(longer) if dim not in dims) == shorter:
                return (op(dims),)
    return (Reshaped(before, after),)

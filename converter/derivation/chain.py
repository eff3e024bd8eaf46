"""The operations that turn one tensor into another, found by trying."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from converter.mapping.ops import Deinterleave, Op, Permuted, Reshaped, Squeeze, Unsqueeze

# Interleaved rows: this many tensors in one (q, k, v), and at most so many heads.
_INTERLEAVED = (2, 3, 4)
_MOST_HEADS = 128


def chain(tensor: torch.Tensor, wanted: torch.Tensor) -> tuple[Op, ...] | None:
    """The fewest operations that make one tensor of another: reshape, permute, deinterleave; None where they do not."""
    if tensor.numel() != wanted.numel():
        return None
    if torch.equal(tensor.reshape(-1), wanted.reshape(-1)):
        return reshaping(tuple(tensor.shape), tuple(wanted.shape))
    found = [(reshaping(tuple(tensor.shape), shape), dims, shape) for dims, shape in _before(tuple(wanted.shape))]
    tried = [
        (
            (*reshape, Permuted(dims)) if dims != tuple(range(len(dims))) else reshape,
            tensor.reshape(shape).permute(dims),
        )
        for reshape, dims, shape in sorted(found, key=lambda item: (len(item[0]), item[1]))
    ]
    equal = next((ops for ops, moved in tried if _equal(moved, wanted)), None)
    if equal is not None:
        return equal
    rows = ((ops, _interleaved(moved, wanted)) for ops, moved in tried)
    return next(((*ops, last) for ops, last in rows if last is not None), None)


def _before(shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Each permutation that gives a shape, and the shape it gives it from."""
    if len(shape) > 5:
        return
    for dims in itertools.permutations(range(len(shape))):
        yield dims, tuple(shape[dims.index(i)] for i in range(len(dims)))


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether all elements are equal; most that are not differ in the first row."""
    return a.shape == b.shape and torch.equal(a[:1], b[:1]) and torch.equal(a, b)


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


def reshaping(before: tuple[int, ...], after: tuple[int, ...]) -> tuple[Op, ...]:
    """The operation from one shape to another of as many elements, in words that suit all sizes if there are any."""
    if before == after:
        return ()
    for longer, shorter, op in ((before, after, Squeeze), (after, before, Unsqueeze)):
        ones = [dim for dim, size in enumerate(longer) if size == 1]
        for dims in itertools.combinations(ones, len(longer) - len(shorter)) if len(longer) > len(shorter) else ():
            if tuple(size for dim, size in enumerate(longer) if dim not in dims) == shorter:
                return (op(dims),)
    return (Reshaped(before, after),)

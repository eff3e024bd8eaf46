from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from memory import Memory, copied, expr, raw, stored

from converter.errors import ContainerError
from converter.storage.byte_range import ByteRange, Segment, Storage, merge
from converter.tensors.evaluate import evaluate, tensor_bytes
from converter.tensors.lazy_tensor import (
    Cast,
    LazyTensor,
    View,
    arange,
    byte_ranges,
    cast,
    lazy_read,
    nbytes,
    resampled,
)
from converter.tensors.ops import (
    Deinterleave,
    Fuse,
    Op,
    Permute,
    Reorder,
    Reshape,
    Split,
    Squeeze,
    Unsqueeze,
    apply_op,
)

Tensors = list[torch.Tensor]


def numbered(*shape: int, dtype: torch.dtype = torch.float32, first: int = 0) -> torch.Tensor:
    return torch.arange(first, first + math.prod(shape)).to(dtype).reshape(shape)


def by_hand(op: Op, values: Tensors) -> Tensors:
    """What an operation does, in torch's own words."""
    match op:
        case Fuse(dim=dim):
            return [torch.cat(values, dim)]
        case Split(num_parts=parts, dim=dim):
            return list(values[0].tensor_split(parts, dim))
        case Squeeze(dims=dims):
            return [value.squeeze(dims) for value in values]
        case Unsqueeze(dims=dims):
            for dim in sorted(dims):
                values = [value.unsqueeze(dim) for value in values]
            return values
        case Reshape(after=after):
            return [value.reshape(after) for value in values]
        case Permute(dims=dims):
            return [value.permute(dims) for value in values]
        case Deinterleave(num_heads=heads, num_parts=parts):
            split = [value.reshape(heads, parts, len(value) // heads // parts, *value.shape[1:]) for value in values]
            return [part.transpose(0, 1).reshape(value.shape) for part, value in zip(split, values, strict=True)]
        case Reorder(order=order):
            return [torch.cat([value.chunk(len(order))[part] for part in order]) for value in values]
    raise AssertionError(op)


def assert_is(value: LazyTensor, expected: torch.Tensor) -> None:
    """The expression says the tensor's shape and type beforehand, computes it, and copies it where it says it can."""
    assert (value.shape, value.dtype.name) == (tuple(expected.shape), str(expected.dtype).removeprefix("torch."))
    found = evaluate(value)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert bytes(tensor_bytes(value)) == raw(expected)
    assert nbytes(value) == len(raw(expected))
    segments = byte_ranges(value)
    if segments is not None:
        assert copied(segments) == copied(merge(segments)) == raw(expected)


qkv = [numbered(4, 6), numbered(4, 6, first=100), numbered(4, 6, first=200)]
OPS: dict[str, tuple[Op, Tensors, bool]] = {
    # operation, what it is given, whether copying is enough
    "fuse": (Fuse(3), qkv, True),
    "fuse in another order": (Fuse(3), [qkv[2], qkv[0], qkv[1]], True),
    "fuse vectors": (Fuse(2), [numbered(5), numbered(5, first=7)], True),
    "fuse columns": (Fuse(3, 1), qkv, False),
    "fuse nothing": (Fuse(2), [numbered(0, 3), numbered(0, 3)], True),
    "split": (Split(3), [numbered(6, 2)], True),
    "split columns": (Split(2, 1), [numbered(3, 4)], False),
    "squeeze": (Squeeze((0, 2)), [numbered(1, 3, 1)], True),
    "unsqueeze": (Unsqueeze((0, 2)), [numbered(3)], True),
    "unsqueeze at the end": (Unsqueeze((3, 2)), [numbered(3, 2)], True),
    "reshape": (Reshape((2, 6), (3, 4)), [numbered(2, 6)], True),
    "permute": (Permute((2, 0, 1)), [numbered(2, 3, 4)], False),
    "transpose": (Permute((1, 0)), [numbered(2, 3)], False),
    "deinterleave": (Deinterleave(4, 3), [numbered(24, 2)], True),
    "reorder": (Reorder((1, 2, 0)), [numbered(6, 2)], True),
    "interleave": (Deinterleave(3, 4), [numbered(24, 2)], True),
}


@pytest.mark.parametrize(("op", "given", "copies"), OPS.values(), ids=OPS)
def test_does_what_torch_does(op: Op, given: Tensors, copies: bool) -> None:
    made = apply_op(op, tuple(map(expr, given)))
    for value, expected in zip(made, by_hand(op, given), strict=True):
        assert_is(value, expected)
        assert (byte_ranges(value) is not None) == copies


@pytest.mark.parametrize(("op", "given", "copies"), OPS.values(), ids=OPS)
def test_the_inverse_undoes_it(op: Op, given: Tensors, copies: bool) -> None:
    # Whether or not one way is a copy, both ways are.
    undone = apply_op(op.inverse(), apply_op(op, tuple(map(expr, given))))
    for value, original in zip(undone, given, strict=True):
        assert_is(value, original)
        assert byte_ranges(value) is not None
    assert op.inverse().inverse() == op


def test_heads_are_taken_apart_row_by_row() -> None:
    # Two heads of q, k and v, one row each: q0 k0 v0 q1 k1 v1.
    (value,) = apply_op(Deinterleave(2, 3), (expr(torch.tensor([10, 20, 30, 11, 21, 31])),))
    assert evaluate(value).tolist() == [10, 11, 20, 21, 30, 31]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float8_e4m3fn"])
def test_cast_rounds_as_torch_does(dtype: str) -> None:
    value = torch.tensor([1 / 3, -2.5, 65504.0, 1e-7, float("inf")])
    made = cast(expr(value), dtype)
    assert_is(made, value.to(getattr(torch, dtype)))
    assert (byte_ranges(made) is not None) == (dtype == "float32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("before", "after"), [(16, 24), (24, 16), (3, 4), (4, 1)])
def test_resample_is_that_of_deepseek_ocrs_clip(before: int, after: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    table = torch.randn(1 + before**2, 8).to(dtype)
    # get_abs_pos in deepencoder.py of DeepSeek-OCR.
    old = table[1:].view(1, before, before, 8).permute(0, 3, 1, 2).contiguous().to(torch.float32)
    new = torch.nn.functional.interpolate(
        old, size=(after, after), mode="bicubic", antialias=True, align_corners=False
    ).to(dtype)
    expected = torch.cat([table[:1], new.permute(0, 2, 3, 1).view(after * after, 8)])
    made = resampled(expr(table), "tokens", after)
    assert_is(made, expected)
    assert raw(evaluate(made)[:1]) == raw(table[:1])


def test_resampling_to_the_same_grid_and_casting_to_the_same_type_change_nothing() -> None:
    table = expr(numbered(10, 2))
    assert resampled(table, "tokens", 3) is table
    assert cast(table, "float32") is table


@pytest.mark.parametrize("shape", [(5,), (1, 5), (0,)])
def test_arange_is_copied_and_computed_alike(shape: tuple[int, ...]) -> None:
    assert_is(arange(shape), torch.arange(math.prod(shape)).reshape(shape))


@pytest.mark.parametrize(
    ("op", "given", "complaint"),
    [
        (Fuse(2), [numbered(2, 3), numbered(3, 3)], r"shapes \[2, 3\] and \[3, 3\]"),
        (Fuse(2), [numbered(2), numbered(2, dtype=torch.float16)], "float32 with float16"),
        (Fuse(2, 1), [numbered(2), numbered(2)], r"shape \[2\] has no dimension 1"),
        (Split(2), [numbered(3, 2)], r"shape \[3, 2\] into 2"),
        (Split(2, 2), [numbered(2, 2)], "no dimension 2"),
        (Split(2), [torch.tensor(1.0)], "no dimension 0"),
        (Squeeze((0,)), [numbered(2, 1)], r"dimensions \[0\] of shape \[2, 1\]"),
        (Squeeze((2,)), [numbered(1, 1)], "no dimension 2"),
        (Unsqueeze((3,)), [numbered(2, 2)], r"dimension 3 into shape \[2, 2\]"),
        (Reshape((4,), (2, 2)), [numbered(2, 2)], r"expected shape \[4\], found \[2, 2\]"),
        (Permute((1, 0)), [numbered(2)], r"shape \[2\] by \[1, 0\]"),
        (Reorder((1, 0)), [numbered(3, 2)], r"split shape \[3, 2\] into 2 equal parts"),
        (Deinterleave(2, 3), [numbered(9, 2)], r"2 heads of 3 parts from shape \[9, 2\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(op: Op, given: Tensors, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        apply_op(op, tuple(map(expr, given)))


@pytest.mark.parametrize("shape", [(11, 2), (1, 2), (1, 10, 2)])
def test_only_a_class_token_and_a_square_grid_can_be_resampled(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="not a class token and a square grid"):
        resampled(expr(numbered(*shape)), "tokens", 4)


def test_only_grids_up_to_a_limit_and_floating_point_types() -> None:
    with pytest.raises(ValueError, match="a grid of 586: larger than 585"):
        resampled(expr(numbered(10, 2)), "tokens", 586)
    with pytest.raises(ValueError, match="int64 to float16"):
        cast(expr(torch.arange(3)), "float16")


def test_no_two_different_operations_or_lazy_tensors_are_equal() -> None:
    ops: list[Op] = [
        Fuse(3),
        Fuse(2),
        Split(3),
        Split(2),
        Squeeze((0,)),
        Unsqueeze((0,)),
        Permute((0,)),
        Reorder((0,)),
    ]
    ops += [Fuse(3, 2), Split(3, 2), Deinterleave(3, 2), Deinterleave(2, 3), Reshape((3,), (2,)), Fuse(3, 1)]
    assert len(set(ops)) == len(ops)
    table = expr(numbered(3, 3))
    lazy = [table, View(table.dtype, table.shape, table), Cast(table.dtype, table.shape, table)]
    assert len(set(lazy)) == len(lazy)
    assert Fuse(3) == Fuse(3) and lazy[1] == View(table.dtype, table.shape, table)


dtypes = st.sampled_from([torch.uint8, torch.float16, torch.float32, torch.int64])
shapes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 6]), max_size=3)


@st.composite
def bases(draw: st.DrawFn, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    """A tensor as checkpoints hold them: contiguous, a transposed view, or a slice of a larger storage."""
    # Zeros and ones alone would hide a wrong order.
    tensor = numbered(*shape, dtype=dtype, first=draw(st.integers(0, 50)))
    how = draw(st.sampled_from(["plain", "plain", "transposed", "slice"]))
    if how == "transposed" and len(shape) > 1:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "slice":
        return torch.cat([tensor.flatten(), tensor.flatten()])[tensor.numel() :].reshape(tensor.shape)
    return tensor


@st.composite
def operations(draw: st.DrawFn, shape: tuple[int, ...], count: int) -> Op:
    """An operation that tensors of this shape allow, or, now and then, one that they do not."""
    dims = range(len(shape))
    dim = draw(st.sampled_from([0, 0, *dims]))
    choices: list[Op] = [Fuse(count, dim), Unsqueeze((draw(st.integers(0, len(shape))),))]
    choices += [Permute(tuple(draw(st.permutations(dims)))), Reshape(shape, (math.prod(shape),))]
    choices += [Reshape(shape, shape[::-1]), Deinterleave(draw(st.sampled_from([1, 2, 3])), 2)]
    choices += [Split(draw(st.sampled_from([2, 3])), dim)] * 3
    choices += [Squeeze((i,)) for i in dims if shape[i] == 1]
    return draw(st.sampled_from(choices))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_composition_is_copied_or_computed_as_torch_does_it(data: st.DataObject) -> None:
    dtype, shape = data.draw(dtypes), data.draw(shapes)
    tensors = data.draw(st.lists(bases(dtype, shape), min_size=1, max_size=3))
    values = tuple(map(expr, tensors))
    for _ in range(data.draw(st.integers(1, 5))):
        op = data.draw(operations(values[0].shape, len(values)))
        if isinstance(op, Split):
            values, tensors = values[:1], tensors[:1]
        try:
            values = apply_op(op, values)
        except ValueError:
            assume(False)
        tensors = by_hand(op, tensors)
        # What a rule makes of one tensor may be taken in another order by the next.
        order = data.draw(st.permutations(range(len(values))))
        values, tensors = tuple(values[i] for i in order), [tensors[i] for i in order]
    for value, expected in zip(values, tensors, strict=True):
        assert_is(value, expected)


def test_neighbouring_extents_become_one() -> None:
    value = expr(numbered(12, 2))
    segments = [segment for part in apply_op(Split(3), (value,)) for segment in byte_ranges(part) or ()]
    assert len(segments) == 3
    (whole,) = merge(segments)
    assert isinstance(whole, ByteRange)
    assert (whole.start, whole.length) == (0, nbytes(value))
    assert len(merge(segments[::-1])) == 3


@pytest.mark.parametrize("crc32", [None, 0])
def test_neighbouring_storages_are_copied_as_one_unless_they_have_checksums(crc32: int | None) -> None:
    file = Memory(bytes(range(12)))
    storages = [Storage(file, (offset, offset + 4), 4, 4, "x", crc32) for offset in (0, 4, 8)]
    segments: list[Segment] = [ByteRange(storage, 0, 4) for storage in storages]
    assert merge(segments) == (segments if crc32 == 0 else [ByteRange(storages[0], 0, 12)])
    # Another file's bytes are not neighbours, wherever they are.
    other: Segment = ByteRange(Storage(Memory(bytes(8)), (4, 8), 4, 4, "x", None), 0, 4)
    assert merge([segments[0], other]) == [segments[0], other]


def test_a_damaged_storage_is_noticed_by_copying_and_by_computing() -> None:
    value = lazy_read(stored(numbered(6, 2), damaged=True))
    for damaged in (value, *apply_op(Split(3), (value,))):
        with pytest.raises(ContainerError, match="CRC-32"):
            copied(byte_ranges(damaged) or ())
        with pytest.raises(ContainerError, match="CRC-32"):
            tensor_bytes(damaged)

"""Operations of mapping rules on lazy tensors. Each operation has an inverse, so that rules work in both directions.

`Fuse` and `Split` change the number of tensors and define `apply`; all others map one tensor to one and define `one`.
Both raise ValueError for tensors whose shapes or types the operation does not allow.
"""

from __future__ import annotations

from dataclasses import dataclass

from converter.tensors.lazy_tensor import LazyTensor, concatenated, permuted, reshaped, sliced

Values = tuple[LazyTensor, ...]


@dataclass(frozen=True, slots=True)
class Fuse:
    """Concatenates `parts` tensors of equal shape along `dim`. Inverse: Split."""

    parts: int
    dim: int = 0

    def apply(self, values: Values) -> Values:
        first = values[0]
        _check_dim(first, self.dim)
        for value in values[1:]:
            if value.dtype != first.dtype:
                raise ValueError(f"cannot fuse {first.dtype.name} with {value.dtype.name}")
            # Shapes must be equal: the inverse splits into equal parts.
            if value.shape != first.shape:
                raise ValueError(f"cannot fuse shapes {list(first.shape)} and {list(value.shape)}")
        return (concatenated(values, self.dim),)

    def inverse(self) -> Op:
        return Split(self.parts, self.dim)


@dataclass(frozen=True, slots=True)
class Split:
    """Splits a tensor into `parts` equal parts along `dim`. Inverse: Fuse."""

    parts: int
    dim: int = 0

    def apply(self, values: Values) -> Values:
        (value,) = values
        return _equal_parts(value, self.dim, self.parts)

    def inverse(self) -> Op:
        return Fuse(self.parts, self.dim)


@dataclass(frozen=True, slots=True)
class Squeeze:
    """Removes dimensions of size 1; `dims` are indices into the input shape. Inverse: Unsqueeze."""

    dims: tuple[int, ...]

    def one(self, value: LazyTensor) -> LazyTensor:
        if any(_check_dim(value, dim) != 1 for dim in self.dims):
            raise ValueError(f"cannot squeeze dimensions {list(self.dims)} of shape {list(value.shape)}")
        return reshaped(value, tuple(size for dim, size in enumerate(value.shape) if dim not in self.dims))

    def inverse(self) -> Op:
        return Unsqueeze(self.dims)


@dataclass(frozen=True, slots=True)
class Unsqueeze:
    """Inserts dimensions of size 1; `dims` are indices into the output shape. Inverse: Squeeze."""

    dims: tuple[int, ...]

    def one(self, value: LazyTensor) -> LazyTensor:
        shape = list(value.shape)
        for dim in sorted(self.dims):
            if dim > len(shape):
                raise ValueError(f"cannot insert dimension {dim} into shape {list(value.shape)}")
            shape.insert(dim, 1)
        return reshaped(value, tuple(shape))

    def inverse(self) -> Op:
        return Squeeze(self.dims)


@dataclass(frozen=True, slots=True)
class Reshaped:
    """Changes the shape `before` to `after`, both fixed numbers. Inverse: `after` to `before`."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def one(self, value: LazyTensor) -> LazyTensor:
        if value.shape != self.before:
            raise ValueError(f"expected shape {list(self.before)}, found {list(value.shape)}")
        return reshaped(value, self.after)

    def inverse(self) -> Op:
        return Reshaped(self.after, self.before)


@dataclass(frozen=True, slots=True)
class Permuted:
    """Permutes dimensions: dimension i of the result is dimension `dims[i]` of the input."""

    dims: tuple[int, ...]

    def one(self, value: LazyTensor) -> LazyTensor:
        if len(value.shape) != len(self.dims):
            raise ValueError(f"cannot permute shape {list(value.shape)} by {list(self.dims)}")
        return permuted(value, self.dims)

    def inverse(self) -> Op:
        return Permuted(_inverse_order(self.dims))


@dataclass(frozen=True, slots=True)
class Deinterleave:
    """Reorders rows from head by head (q0 k0 v0 q1 k1 v1 ...) to part by part (q0 q1 ... k0 k1 ... v0 v1 ...).

    The first dimension has `heads` x `parts` x head width rows. Only rows move, so this is a copy. Inverse: the same
    operation with both numbers swapped.
    """

    heads: int
    parts: int

    def one(self, value: LazyTensor) -> LazyTensor:
        rows = _check_dim(value, 0)
        if not rows or rows % (self.heads * self.parts):
            raise ValueError(f"cannot take {self.heads} heads of {self.parts} parts from shape {list(value.shape)}")
        chunks = _equal_parts(value, 0, self.heads * self.parts)
        order = [head * self.parts + part for part in range(self.parts) for head in range(self.heads)]
        return concatenated(tuple(chunks[i] for i in order), 0)

    def inverse(self) -> Op:
        return Deinterleave(self.parts, self.heads)


@dataclass(frozen=True, slots=True)
class Reorder:
    """Splits rows into equal parts and concatenates them in another order: part i of the result is part `order[i]`.

    Only rows move, so this is a copy. Inverse: the inverse order.
    """

    order: tuple[int, ...]

    def one(self, value: LazyTensor) -> LazyTensor:
        parts = _equal_parts(value, 0, len(self.order))
        return concatenated(tuple(parts[i] for i in self.order), 0)

    def inverse(self) -> Op:
        return Reorder(_inverse_order(self.order))


Op = Fuse | Split | Squeeze | Unsqueeze | Reshaped | Permuted | Deinterleave | Reorder


def apply_op(op: Op, values: Values) -> Values:
    """Apply an operation to the tensors of one rule; ValueError if their shapes or types do not allow it."""
    if isinstance(op, Fuse | Split):
        return op.apply(values)
    return tuple(op.one(value) for value in values)


def _equal_parts(value: LazyTensor, dim: int, parts: int) -> Values:
    size = _check_dim(value, dim)
    if size % parts:
        raise ValueError(f"cannot split shape {list(value.shape)} into {parts} equal parts")
    step = size // parts
    return tuple(sliced(value, dim, i * step, step) for i in range(parts))


def _inverse_order(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(i) for i in range(len(order)))


def _check_dim(value: LazyTensor, dim: int) -> int:
    """The size of a dimension; ValueError if there is no such dimension."""
    if dim >= len(value.shape):
        raise ValueError(f"shape {list(value.shape)} has no dimension {dim}")
    return value.shape[dim]

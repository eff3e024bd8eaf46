"""Operations of mapping rules on lazy tensors. Each operation has an inverse, so that rules work in both directions.

`Fuse` and `Split` change the number of tensors and define `apply`. All other operations map each tensor to one tensor
and define `apply_one`. Both methods raise ValueError if the shapes or types do not fit.
"""

from __future__ import annotations

from dataclasses import dataclass

from converter.tensors.lazy_tensor import LazyTensor, concatenated, permuted, reshaped, sliced

Values = tuple[LazyTensor, ...]


@dataclass(frozen=True, slots=True)
class Fuse:
    """Concatenates `num_parts` tensors of equal shape along `dim`. Inverse: Split."""

    num_parts: int
    dim: int = 0

    def apply(self, values: Values) -> Values:
        first = values[0]
        _dim_size(first, self.dim)  # Raises if there is no such dimension.
        for value in values:
            if value.dtype != first.dtype:
                raise ValueError(f"cannot fuse {first.dtype.name} with {value.dtype.name}: save them in one type")
            # Shapes must be equal: the inverse splits into equal parts.
            if value.shape != first.shape:
                raise ValueError(f"cannot fuse shapes {list(first.shape)} and {list(value.shape)}")
        return (concatenated(values, self.dim),)

    def inverse(self) -> Op:
        return Split(self.num_parts, self.dim)


@dataclass(frozen=True, slots=True)
class Split:
    """Splits a tensor into `num_parts` equal parts along `dim`. Inverse: Fuse."""

    num_parts: int
    dim: int = 0

    def apply(self, values: Values) -> Values:
        return _equal_parts(values[0], self.dim, self.num_parts)

    def inverse(self) -> Op:
        return Fuse(self.num_parts, self.dim)


@dataclass(frozen=True, slots=True)
class Squeeze:
    """Removes dimensions of size 1; `dims` are indices into the input shape. Inverse: Unsqueeze."""

    dims: tuple[int, ...]

    def apply_one(self, value: LazyTensor) -> LazyTensor:
        if any(_dim_size(value, dim) != 1 for dim in self.dims):
            raise ValueError(f"cannot squeeze dimensions {list(self.dims)} of shape {list(value.shape)}")
        return reshaped(value, tuple(size for dim, size in enumerate(value.shape) if dim not in self.dims))

    def inverse(self) -> Op:
        return Unsqueeze(self.dims)


@dataclass(frozen=True, slots=True)
class Unsqueeze:
    """Inserts dimensions of size 1; `dims` are indices into the output shape. Inverse: Squeeze."""

    dims: tuple[int, ...]

    def apply_one(self, value: LazyTensor) -> LazyTensor:
        shape = list(value.shape)
        for dim in sorted(self.dims):
            if dim > len(shape):
                raise ValueError(f"cannot insert dimension {dim} into shape {list(value.shape)}")
            shape.insert(dim, 1)
        return reshaped(value, tuple(shape))

    def inverse(self) -> Op:
        return Squeeze(self.dims)


@dataclass(frozen=True, slots=True)
class Reshape:
    """Changes the shape from `before` to `after`. Inverse: from `after` to `before`."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def apply_one(self, value: LazyTensor) -> LazyTensor:
        if value.shape != self.before:
            raise ValueError(f"expected shape {list(self.before)}, found {list(value.shape)}")
        return reshaped(value, self.after)

    def inverse(self) -> Op:
        return Reshape(self.after, self.before)


@dataclass(frozen=True, slots=True)
class Permute:
    """Permutes dimensions: dimension i of the result is dimension `dims[i]` of the input."""

    dims: tuple[int, ...]

    def apply_one(self, value: LazyTensor) -> LazyTensor:
        if len(value.shape) != len(self.dims):
            raise ValueError(f"cannot permute shape {list(value.shape)} by {list(self.dims)}")
        return permuted(value, self.dims)

    def inverse(self) -> Op:
        return Permute(_inverse_order(self.dims))


@dataclass(frozen=True, slots=True)
class Deinterleave:
    """Reorders rows from head by head (q0 k0 v0 q1 k1 v1 ...) to part by part (q0 q1 ... k0 k1 ... v0 v1 ...).

    The size of dimension 0 is `num_heads` x `num_parts` x head width. Inverse: Deinterleave with both numbers swapped.
    """

    num_heads: int
    num_parts: int

    def apply_one(self, value: LazyTensor) -> LazyTensor:
        rows = _dim_size(value, 0)
        if not rows or rows % (self.num_heads * self.num_parts):
            heads = f"{self.num_heads} heads of {self.num_parts} parts"
            raise ValueError(f"cannot take {heads} from shape {list(value.shape)}")
        order = (head * self.num_parts + part for part in range(self.num_parts) for head in range(self.num_heads))
        return Reorder(tuple(order)).apply_one(value)

    def inverse(self) -> Op:
        return Deinterleave(self.num_parts, self.num_heads)


@dataclass(frozen=True, slots=True)
class Reorder:
    """Splits dimension 0 into equal parts and reorders them: part i of the result is part `order[i]` of the input."""

    order: tuple[int, ...]

    def apply_one(self, value: LazyTensor) -> LazyTensor:
        parts = _equal_parts(value, 0, len(self.order))
        return concatenated(tuple(parts[i] for i in self.order), 0)

    def inverse(self) -> Op:
        return Reorder(_inverse_order(self.order))


Op = Fuse | Split | Squeeze | Unsqueeze | Reshape | Permute | Deinterleave | Reorder


def apply_op(op: Op, values: Values) -> Values:
    """Apply an operation to the tensors of one rule; ValueError if their shapes or types do not allow it."""
    if isinstance(op, Fuse | Split):
        return op.apply(values)
    return tuple(op.apply_one(value) for value in values)


def _equal_parts(value: LazyTensor, dim: int, num_parts: int) -> Values:
    size = _dim_size(value, dim)
    if size % num_parts:
        raise ValueError(f"cannot split shape {list(value.shape)} into {num_parts} equal parts")
    step = size // num_parts
    return tuple(sliced(value, dim, i * step, step) for i in range(num_parts))


def _inverse_order(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(i) for i in range(len(order)))


def _dim_size(value: LazyTensor, dim: int) -> int:
    """Return the size of a dimension; ValueError if there is no such dimension."""
    if dim >= len(value.shape):
        raise ValueError(f"shape {list(value.shape)} has no dimension {dim}")
    return value.shape[dim]

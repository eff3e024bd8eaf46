"""The rank of the difference of two matrices: a merged LoRA adapter has a low one."""

from __future__ import annotations

import torch

from converter.tensors.evaluate import torch_dtype
from converter.tensors.lazy_tensor import LazyTensor, byte_ranges, sliced

# Rows that are read, evenly spaced: ranks up to half of them are found.
_MAX_ROWS = 256
_MAX_COLUMNS = 1 << 16


def difference_rank(a: LazyTensor, b: LazyTensor) -> int | None:
    """Return the rank of B - A, without what rounding alone adds.

    Returns:
        None for tensors that are no matrices of numbers, and for a rank of more than half of the sampled rows or of the
        columns: the difference of a full fine-tune.
    """
    if len(a.shape) != 2 or a.shape != b.shape or not 0 < a.shape[1] <= _MAX_COLUMNS:
        return None
    if not all(value.dtype.is_float and value.dtype.bits >= 16 for value in (a, b)):
        return None
    before, after = _some_rows(a), _some_rows(b)
    if before is None or after is None or not (before.isfinite().all() and after.isfinite().all()):
        return None
    difference = after - before
    squares = torch.linalg.eigvalsh(difference @ difference.T).clamp(min=0)
    eps = max(torch.finfo(torch_dtype(value.dtype.name)).eps for value in (a, b))
    # The largest singular value of a matrix of independent roundings of the elements.
    rows, columns = difference.shape
    noise = eps * float(after.square().mean().sqrt()) * (rows**0.5 + columns**0.5)
    rank = int((squares.sqrt() > noise).sum())
    return rank if 0 < 2 * rank <= min(rows, columns) else None


def _some_rows(value: LazyTensor) -> torch.Tensor | None:
    """Read some rows of a matrix in float64; None if they must be computed."""
    count, columns = value.shape
    number = min(count, _MAX_ROWS)
    rows = []
    for index in range(number):
        ranges = byte_ranges(sliced(value, 0, index * count // number, 1))
        if ranges is None:
            return None
        rows.append(b"".join(part if isinstance(part, bytes) else part.read() for part in ranges))
    flat = torch.frombuffer(bytearray().join(rows), dtype=torch_dtype(value.dtype.name))
    return flat.reshape(number, columns).double()

"""Sums along the outermost axes of memory by PyTorch's batch-norm kernels, kept right.

Those kernels read a matrix once or twice and make nothing of its size, but add row by row (torch
2.13: 100,000 equal terms are 2e-4 off). So they get few rows, of many columns: the rows are cut in
blocks that lie side by side. What is of the blocks' size is then summed as everywhere.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch

from keras_bn.kernels.torch.sums import sum_over
from keras_bn.types import Tensor

Axes = tuple[int, ...]

# Rows that a kernel adds one by one: of 32 terms, equal or nearly so, the sum can miss the
# contract's bound. The fewest that make it worth while.
_MOST, _FEWEST = 16, 8
# Elements of a matrix below which Python takes longer than the sums.
SMALL = 1 << 14
# κ up to which one pass is right: each row may add a rounding error of the size of the mean.
_NEAR = 2.0


class _Matrices(NamedTuple):
    """A tensor as matrices: one, or one for each index of the axes outside of the rows.

    Attributes:
        order: The tensor's axes, outermost in memory first.
        sums: Shape of the sums, in that order.
        number: Number of matrices.
        rows: Number of rows of a matrix.
        cells: Shape of what there is for each column: outer axes, blocks of rows, inner axes.
        pooled: Which of those axes are summed over.
    """

    order: Axes
    sums: tuple[int, ...]
    number: int
    rows: int
    cells: tuple[int, ...]
    pooled: Axes

    @property
    def together(self) -> int:
        """How many cells belong to one sum."""
        return prod(self.cells[axis] for axis in self.pooled)

    def of(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """Return the matrices of a tensor of that shape; None where it lies otherwise in memory."""
        dense = x.permute(self.order)
        shape = (self.number, self.rows, -1)
        return dense.view(shape).unbind() if dense.is_contiguous() else None

    def spread(self, sums: Tensor) -> Tensor:
        """Give what belongs to a sum to each of its columns, a row for each matrix."""
        ones = (1 if axis in self.pooled else size for axis, size in enumerate(self.cells))
        # The kernels read memory without regard to strides (torch 2.13).
        cells = sums.permute(self.order).reshape(*ones).expand(self.cells)
        return cells.reshape(self.number, -1).contiguous()

    def cells_of(self, results: Sequence[Tensor]) -> Tensor:
        """Return what came of each matrix, in the shape of the cells."""
        joined = results[0] if len(results) == 1 else torch.stack(results)
        return joined.view(self.cells)

    def total(self, cells: Tensor) -> Tensor:
        """Sum over the cells that belong together, and keep the axes."""
        return cells if self.together == 1 else sum_over(cells, self.pooled, cells.dtype)

    def placed(self, sums: Tensor) -> Tensor:
        """Put sums in the order of memory into the tensor's."""
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return sums.reshape(self.sums).permute(back)


def _matrices(x: Tensor, axes: Axes) -> _Matrices | None:
    """Return the view of a tensor; None where these kernels do not serve."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.numel() < SMALL:
        return None
    return _seen(tuple(x.shape), x.stride(), axes)


@lru_cache(maxsize=1024)
def _seen(shape: tuple[int, ...], strides: tuple[int, ...], axes: Axes) -> _Matrices | None:
    """Return the view of a tensor of that shape and those strides."""
    order = tuple(sorted(range(len(shape)), key=strides.__getitem__, reverse=True))
    sizes = [shape[axis] for axis in order]
    # Elsewhere than in a dense tensor two elements share a place, or there are gaps.
    if any(strides[axis] != prod(sizes[i + 1 :]) for i, axis in enumerate(order) if sizes[i] > 1):
        return None
    sums = tuple(1 if axis in axes else shape[axis] for axis in order)
    starts = (i for i, size in enumerate(sums) if size == 1 and (i == 0 or sums[i - 1] != 1))
    found = (_rows_from(order, sizes, sums, first) for first in starts)
    return next((matrices for matrices in found if matrices is not None), None)


def _rows_from(
    order: Axes, sizes: list[int], sums: tuple[int, ...], first: int
) -> _Matrices | None:
    """Return matrices whose rows go along neighbouring summed axes; None where they are too few."""
    inner = next((i for i in range(first, len(sums)) if sums[i] != 1), len(sums))
    number, height = prod(sizes[:first]), prod(sizes[first:inner])
    rows = next((rows for rows in range(_MOST, _FEWEST - 1, -1) if height % rows == 0), None)
    # A few rows in all: each column is nearly as much as what it sums, and may be far from 0.
    if rows is None or height < 2 * _FEWEST or prod(sizes[first:]) < SMALL:
        return None
    cells = (*sizes[:first], height // rows, *sizes[inner:])
    kept = (*sums[:first], 1, *sums[inner:])
    pooled = tuple(axis for axis, size in enumerate(kept) if size == 1)
    return _Matrices(order, sums, number, rows, cells, pooled)


def moments(x: Tensor, axes: Axes, dtype: torch.dtype) -> tuple[Tensor, Tensor | None] | None:
    """Return mean and m2 of `x` over `axes`; None where these kernels do not serve.

    The m2 is None where a mean is so far from 0, in standard deviations, that it needs a pass more
    to be right; the mean is then near enough to begin with.
    """
    seen = _matrices(x, axes)
    if seen is None:
        return None
    # Their dtype is that of the results, which otherwise is that of x.
    width = prod(seen.cells) // seen.number
    unused = x.new_zeros(2, width, dtype=dtype) if x.dtype != dtype else (None, None)
    update = torch.batch_norm_update_stats
    parts = [update(matrix, *unused, 0.0) for matrix in seen.of(x) or ()]
    means, variances = map(seen.cells_of, zip(*parts, strict=True))
    mean = seen.total(means) / seen.together
    spread = seen.total(variances.add_((means - mean).square_()))
    is_near = (mean.abs() <= _NEAR * (spread / seen.together).sqrt()).all()
    return seen.placed(mean), seen.placed(spread * seen.rows) if is_near else None


def products(
    x: Tensor, dy: Tensor, center: Tensor, axes: Axes, dtype: torch.dtype
) -> list[Tensor] | None:
    """Return Σ dy and Σ dy·(x - center); None where these kernels do not serve."""
    seen = _matrices(x, axes)
    gradients = None if seen is None or dy.dtype != x.dtype else seen.of(dy)
    if seen is None or gradients is None:
        return None
    centers = seen.spread(center)
    one = torch.ones_like(centers[0])
    weight = None if x.dtype == dtype else one
    backward = torch.ops.aten.native_batch_norm_backward
    parts = [
        backward(d, part, weight, c, one, None, None, False, 0.0, [False, True, True])[1:]
        for d, part, c in zip(gradients, seen.of(x) or (), centers, strict=True)
    ]
    second, first = map(seen.cells_of, zip(*parts, strict=True))
    return [seen.placed(seen.total(first)), seen.placed(seen.total(second))]

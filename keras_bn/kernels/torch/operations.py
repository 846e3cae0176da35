"""The compiled passes as functions of tensors in the CPU's memory.

In compiled code what is made in one pass, and its gradients, are operations, which PyTorch's
compiler takes as they are; sums and maps by themselves it joins with what is around them.
"""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keras_bn.core.affine import Affine
from keras_bn.core.estimators import Average
from keras_bn.kernels.compiled import TYPES, dims, library

Axes = tuple[int, ...]

SPACE = torch.library.Library("keras_bn", "FRAGMENT")
# Part of the operations' names: PyTorch keeps compiled code on disk, with the shapes that an
# operation of that name had.
_EDITION = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
_library: Any = library()
# The dtypes that the passes take, as calls.h numbers them; none without a library.
TYPE = {getattr(torch, name): number for name, number in TYPES.items() if _library is not None}
if _library is not None and not _library.keras_bn_reads_half():
    del TYPE[torch.float16]


def sums_of(x: Tensor, axes: Any) -> Axes:
    """Return the shape of sums over axes."""
    return tuple([1 if axis in axes else size for axis, size in enumerate(x.shape)])


def moments(
    x: Tensor, weights: Any, counts: Any, number: int, axes: Axes, is_centered: bool
) -> Tensor:
    """Return pivots, offsets and m2, of weights' sums or else of a number of elements."""
    out = x.new_empty((3, *sums_of(x, axes)), dtype=torch.float32)
    shape = None if weights is None else weights.shape
    nest = dims(x.shape, x.stride(), None, None, shape, out.shape[1:])
    done = _library.keras_bn_moments(
        x.ndim, nest, *_data(x), *_addresses(weights, counts), number, is_centered,
        out.numel() // 3, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if not done:
        (x,) = _without_gaps(x)
        return moments(x, weights, counts, number, axes, is_centered)
    return out


def products(x: Tensor, dy: Tensor, center: Tensor) -> Tensor:
    """Return Σ dy and Σ dy·(x - center)."""
    out = x.new_empty((2, *center.shape), dtype=torch.float32)
    nest = dims(x.shape, x.stride(), dy.stride(), None, None, center.shape)
    done = _library.keras_bn_products(
        x.ndim, nest, *_data(x), *_data(dy), center.data_ptr(), center.numel(), out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    if not done:
        x, dy = _without_gaps(x, dy)
        return products(x, dy, center)
    return out


def mapped_products(
    x: Tensor, dy: Tensor, center: Tensor, scale: Tensor, shift: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor]:
    """Return Σ gamma·dy and Σ gamma·dy·z of each cell; Σ dy and Σ dy·z of each column."""
    out, columns = (x.new_empty((2, *p.shape), dtype=torch.float32) for p in (center, gamma))
    nest = dims(x.shape, x.stride(), dy.stride(), None, None, center.shape, gamma.shape)
    done = _library.keras_bn_mapped_products(
        x.ndim, nest, *_data(x), *_data(dy), *_addresses(center, scale, shift, gamma),
        center.numel(), gamma.numel(), out.data_ptr(), columns.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if not done:
        x, dy = _without_gaps(x, dy)
        return mapped_products(x, dy, center, scale, shift, gamma)
    return out, columns


def mapped(x: Tensor, affine: Affine, gamma: Any, beta: Any, dtype: torch.dtype) -> Tensor:
    """Return ((x - center)·scale + shift)·gamma + beta."""
    y = torch.empty_like(x, dtype=dtype)
    column = None if gamma is None else gamma.shape
    nest = dims(x.shape, x.stride(), None, y.stride(), None, affine.scale.shape, column)
    done = _library.keras_bn_map(
        x.ndim, nest, *_data(x), *_data(y), *_addresses(*affine, gamma, beta), x.requires_grad,
        torch.get_num_threads(),
    )  # fmt: skip
    if not done:
        (x,) = _without_gaps(x)
        return mapped(x, affine, gamma, beta, dtype)
    return y


def combined(
    x: Tensor, dy: Tensor, affine: Affine, factor: Tensor, weights: Any, gamma: Any
) -> Tensor:
    """Return gamma·dy·factor + w·((x - center)·scale + shift), in the dtype of x."""
    dx = torch.empty_like(x)
    shapes = [None if part is None else part.shape for part in (weights, factor, gamma)]
    nest = dims(x.shape, x.stride(), dy.stride(), dx.stride(), *shapes)
    done = _library.keras_bn_combined(
        x.ndim, nest, *_data(x), *_data(dy), *_data(dx),
        *_addresses(weights, *affine, factor, gamma), torch.get_num_threads(),
    )  # fmt: skip
    if not done:
        x, dy = _without_gaps(x, dy)
        return combined(x, dy, affine, factor, weights, gamma)
    return dx


def moved(
    mean: Tensor, variance: Tensor, batch: list[Tensor], divisor: float, average: Average
) -> tuple[Tensor, Tensor, bool]:
    """Return a mean and a variance moved towards moments, and whether any of these are known."""
    out = mean.new_empty((2, *mean.shape))
    epsilon = -1.0 if average.epsilon is None else average.epsilon
    are_any = _library.keras_bn_move(
        *_addresses(mean, variance, *batch), mean.numel(), divisor, average.momentum, epsilon,
        out.data_ptr(),
    )  # fmt: skip
    return (*out.unbind(), bool(are_any))


def _operation(shapes: Callable[..., Any]) -> Callable[..., Any]:
    """Return what makes a function of tensors and numbers an operation for compiled code, too.

    Args:
        shapes: Makes results without values.

    Returns:
        A decorator, which gives the function an attribute, `operation`; no result of the function
        may be one of its arguments.
    """

    def made(function: Any) -> Any:
        name = f"{function.__name__}_{_EDITION}"
        # `custom_op` would call further functions of Python, which take longer than a small pass.
        if not hasattr(torch.ops.keras_bn, name):  # the module may be imported anew
            SPACE.define(name + torch.library.infer_schema(function, mutates_args=()))
        SPACE.impl(name, function, "CPU")
        torch.library.register_fake(f"keras_bn::{name}", shapes, lib=SPACE)
        function.operation = getattr(torch.ops.keras_bn, name).default
        return function

    return made


def _empty_merged(center: Tensor, *others: Any) -> Tensor:
    return center.new_empty((3, 1, *center.shape[1:]))


@_operation(_empty_merged)
def merged(center: Tensor, offset: Tensor, m2: Tensor, count: int) -> Tensor:
    """Return pivots, offsets and m2 of sets of a number of elements, in rows, all together."""
    out = _empty_merged(center)
    done = _library.keras_bn_merge(
        *_addresses(center, offset, m2), center.shape[0], out.numel() // 3, count, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    if not done:
        raise NotImplementedError
    return out


def _empty_whole(
    x: Tensor, gamma: Any, beta: Any, kept: Any, limits: Any, axes: Any, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, dtype = options
    sums = sums_of(x, axes)
    affine = x.new_empty((3, *sums), dtype=torch.float32)
    rest = affine.new_empty((2 if kept is None else 4, *sums))
    return torch.empty_like(x, dtype=dtype), affine, rest


@_operation(_empty_whole)
def normalize(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    kept: Tensor | None,
    limits: Tensor | None,
    axes: list[int],
    varies: bool,
    together: int,
    epsilon: float,
    is_centered: bool,
    is_training: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y; center, scale and shift of each cell; offsets, m2, and r and d."""
    options = (varies, together, epsilon, is_centered, is_training, dtype)
    y, affine, rest = _empty_whole(x, gamma, beta, kept, limits, axes, *options)
    column = (1,) * x.ndim if gamma is None else gamma.shape
    nest = dims(x.shape, x.stride(), None, y.stride(), None, affine.shape[1:], column)
    cells = affine.numel() // 3
    learned = _addresses(gamma, beta)
    correction = [None, 0, None, None]
    if kept is not None:
        columns, (to, ends, r) = kept.numel() // 2, _addresses(kept, limits, rest[2])
        correction = [to, columns, ends, r]
    done = _library.keras_bn_normalize(
        x.ndim, nest, x.data_ptr(), TYPE[x.dtype], y.data_ptr(), TYPE[dtype], *learned, varies,
        x.numel() // cells, together, epsilon, is_centered, cells, math.prod(column),
        affine.data_ptr(), rest.data_ptr(), *correction, is_training, torch.get_num_threads(),
    )  # fmt: skip
    if done:
        return y, affine, rest
    z, *small = normalize(*_without_gaps(x), gamma, beta, kept, limits, axes, *options)
    return _laid_as(y, z), *small


def _empty_gradients(
    x: Tensor, dy: Tensor, gamma: Any, affine: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    columns = (1,) * x.ndim if gamma is None else gamma.shape
    return torch.empty_like(x), affine.new_empty((2, *columns))


@_operation(_empty_gradients)
def gradients(
    x: Tensor,
    dy: Tensor,
    gamma: Tensor | None,
    affine: Tensor,
    varies: bool,
    together: int,
    is_centered: bool,
) -> tuple[Tensor, Tensor]:
    """Return dx; Σ dy and Σ dy·z of each column."""
    dx, found = _empty_gradients(x, dy, gamma, affine)
    # The passes take both alike.
    dy = dy if dy.dtype in TYPE and dy.stride() == x.stride() else torch.empty_like(x).copy_(dy)
    nest = dims(
        x.shape, x.stride(), dy.stride(), dx.stride(), None, affine.shape[1:], found.shape[1:]
    )
    cells = affine.numel() // 3
    done = _library.keras_bn_gradients(
        x.ndim, nest, x.data_ptr(), TYPE[x.dtype], dy.data_ptr(), TYPE[dy.dtype], dx.data_ptr(),
        TYPE[x.dtype], None if gamma is None else gamma.data_ptr(), varies, x.numel() // cells,
        together, is_centered, cells, found.numel() // 2, affine.data_ptr(),
        found.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if done:
        return dx, found
    dz, found = gradients(*_without_gaps(x, dy), gamma, affine, varies, together, is_centered)
    return _laid_as(dx, dz), found


def _without_gaps(*big: Tensor) -> Any:
    """Return dense copies of what the passes did not take: it has gaps along what would be lines.

    Raises:
        NotImplementedError: It has none; the passes give up so where they find no memory for sums.
    """
    if all(part.is_contiguous() for part in big):
        raise NotImplementedError
    return [part.contiguous() for part in big]


def _laid_as(empty: Tensor, values: Tensor) -> Tensor:
    """Return values that lie in memory as an empty tensor does."""
    return values if values.stride() == empty.stride() else empty.copy_(values)


def _data(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), TYPE[x.dtype]


def _addresses(*parts: Tensor | None) -> list[int | None]:
    return [None if part is None else part.data_ptr() for part in parts]

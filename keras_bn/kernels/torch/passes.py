"""Passes over a big tensor in PyTorch, without gradients.

On the CPU a tensor goes in pieces, so that what lies between two operations stays in the cache
and no copy of full size is made; elsewhere, and in compiled code, it goes in one.
"""

import math
from collections.abc import Callable, Collection, Iterator
from itertools import repeat
from typing import Any

import torch

from keras_bn.core.affine import AS_IS, Affine, Learned
from keras_bn.core.dtypes import statistics_dtype
from keras_bn.kernels import generic
from keras_bn.kernels.torch import compiled
from keras_bn.kernels.torch.sums import sum_over
from keras_bn.kernels.torch.tracing import is_transformed
from keras_bn.types import Tensor

Axes = tuple[int, ...]

# A whole normalization and its gradients, where the passes in C take it.
normalize, gradients = compiled.normalize, compiled.gradients

# Elements of a piece: 2 MiB in float32, which the cores' caches hold beside a copy.
_PIECE = 1 << 19
# Up to so many terms, a sum is not cut; nor is what has one value for so many elements.
_FEW = 64
# Elements for which Python takes longer than the operations.
_SMALL = 1 << 14


def number(x: Tensor, axes: Axes) -> int:
    """Return the number of elements along the axes."""
    return math.prod([x.shape[axis] for axis in axes])  # a list: torch 2.13 traces no generator


def moments(x: Tensor, weights: Tensor | None, count: Any, axes: Axes) -> Any:
    """Return pivot, offset and m2, in one pass; None where that cannot be had."""
    return compiled.moments(x, weights, count, axes)


def total(x: Tensor, weights: Tensor | None, axes: Axes) -> Tensor:
    """Return Σ w·x."""
    dtype = _wide(x)
    if weights is None and x.dtype == dtype:
        return sum_over(x, axes, dtype)

    def sums(part: Tensor, w: Tensor | None) -> tuple[Tensor]:
        return (sum_over(weighted(part, w), axes, dtype),)

    return _summed(sums, [axes], x, weights)[0]


def squares(x: Tensor, axes: Axes) -> Tensor:
    """Return Σ x²."""
    found = compiled.moments(x, None, number(x, axes), axes, is_centered=False)
    if found is not None:
        return found[-1]
    blocks = _row_blocks(x, axes)
    if blocks is not None:
        # The norm of a block makes no tensor of the size of x, as squares to be summed would.
        norms = torch.linalg.vector_norm(blocks, dim=-1)
        return sum_over(norms.square_(), (-1,), x.dtype).view(x.shape[: axes[0]] + (1,) * len(axes))

    def sums(part: Tensor) -> tuple[Tensor]:
        return (sum_over(part.to(_wide(x)).square(), axes, _wide(x)),)

    return _summed(sums, [axes], x)[0]


def _row_blocks(x: Tensor, axes: Axes) -> Tensor | None:
    """Return the blocks of each row of memory, the last axis; None where axes are not rows."""
    are_last = axes == tuple(range(x.ndim - len(axes), x.ndim))
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not are_last:
        return None
    length = number(x, axes)
    # The norm adds every eighth element one by one.
    size = next((size for size in range(256, 15, -1) if length % size == 0), None)
    if size is None or x.dtype != _wide(x) or not x.numel() or not x.is_contiguous():
        return None
    return x.view(x.numel() // length, -1, size)


def deviations(x: Tensor, pivot: Tensor, weights: Tensor | None, axes: Axes) -> list[Tensor]:
    """Return Σ w·(x - pivot) and Σ w·(x - pivot)²."""

    def sums(part: Tensor, center: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor]:
        deviation = part - center
        counted = weighted(deviation, w)
        first = sum_over(counted, axes, pivot.dtype)
        return first, sum_over(deviation.mul_(counted), axes, pivot.dtype)

    return _summed(sums, [axes, axes], x, pivot, weights)


def products(x: Tensor, dy: Tensor, center: Tensor | None, axes: Axes) -> list[Any]:
    """Return Σ dy, None where the center is, and Σ dy·(x - center)."""
    dtype = _wide(x)
    if center is None:
        return [None, *_summed(lambda part, d: (sum_over(part * d, axes, dtype),), [axes], x, dy)]
    found = compiled.products(x, dy, center, axes)
    if found is not None:
        return found

    def sums(part: Tensor, d: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
        return sum_over(d, axes, dtype), sum_over((part - origin).mul_(d), axes, dtype)

    return _summed(sums, [axes, axes], x, dy, center)


def mapped_products(
    x: Tensor, dy: Tensor, affine: Affine, gamma: Tensor | None, axes: Axes, shared: Axes
) -> list[Any]:
    """Return Σ gamma·dy and Σ gamma·dy·z over `axes`, Σ dy and Σ dy·z over `shared`.

    The first and third are None where the center is; z is (x - center)·scale + shift.
    """
    is_centered = affine.center is not None
    found = compiled.mapped_products(x, dy, affine, gamma, axes, shared)
    if found is not None:
        first, second, d_beta, d_gamma = found
        return found if is_centered else [None, second, None, d_gamma]
    dtype = affine.scale.dtype

    def of(values: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
        by_column = sum_over(values, shared, dtype)
        values = values if factor is None else values * factor
        return sum_over(values, axes, dtype), by_column

    def sums(part: Tensor, d: Tensor, factor: Any, center: Any, scale: Any, shift: Any) -> Any:
        second = of(_standard(part, center, scale, shift).mul_(d), factor)
        return second if center is None else (*second, *of(d, factor))

    found = _summed(sums, [axes, shared] * (1 + is_centered), x, dy, gamma, *affine)
    second, d_gamma, first, d_beta = found if is_centered else [*found, None, None]
    return [first, second, d_beta, d_gamma]


def mapped(x: Tensor, affine: Affine, dtype: str, learned: Learned = AS_IS) -> Tensor:
    """Return ((x - center)·scale + shift)·gamma + beta."""
    y = compiled.mapped(x, affine, getattr(torch, dtype), learned)
    if y is not None:
        return y

    def line(part: Any, *parts: Any, out: Any) -> Any:
        center, scale, shift, gamma, beta = parts
        if gamma is None and beta is None:
            return _standard(part, center, scale, shift, out)
        z = _standard(part, center, scale, shift)
        if beta is None:
            return torch.mul(z, gamma, out=out)
        return torch.add(z if gamma is None else z.mul_(gamma), beta, out=out)

    center, scale, shift = affine
    return _made(line, getattr(torch, dtype), x, _unless_zero(center, x), scale, shift, *learned)


def _standard(x: Tensor, center: Any, scale: Tensor, shift: Any, out: Any = None) -> Tensor:
    """Return (x - center)·scale + shift."""
    x = x if center is None else x - center
    return (
        torch.mul(x, scale, out=out) if shift is None else torch.addcmul(shift, x, scale, out=out)
    )


def _unless_zero(center: Tensor | None, x: Tensor) -> Tensor | None:
    """Return None for 0, where to see that costs less than to subtract it."""
    if center is None or torch.compiler.is_compiling() or center.device.type != "cpu":
        return center
    is_worth_it = x.numel() > max(_SMALL, _FEW * center.numel())
    return None if is_worth_it and not center.any() else center


def scaled(x: Tensor, scale: Tensor, dtype: str) -> Tensor:
    """Return x·scale."""

    def line(part: Tensor, scale: Tensor, out: Any) -> Tensor:
        return torch.mul(part, scale, out=out)

    return _made(line, getattr(torch, dtype), x, scale)


def combined(
    x: Tensor,
    dy: Tensor,
    center: Tensor | None,
    terms: tuple[Tensor, Tensor, Tensor | None],
    weights: Tensor | None = None,
    gamma: Tensor | None = None,
) -> Tensor:
    """Return gamma·dy·a + w·((x - center)·b + c), in the dtype of x, for the terms a, b, c."""
    dx = compiled.combined(x, dy, center, terms, weights, gamma)
    if dx is not None:
        return dx

    def line(part: Any, d: Any, origin: Any, w: Any, g: Any, *terms: Any, out: Any) -> Tensor:
        a, b, c = terms
        part = part if origin is None else part - origin
        values = part * b if c is None else torch.addcmul(c, part, b)
        values = weighted(values, w)
        return torch.addcmul(values, d if g is None else d * g, a, out=out)

    return _made(line, x.dtype, x, dy, _unless_zero(center, x), weights, gamma, *terms)


def weighted(values: Tensor, weights: Tensor | None) -> Tensor:
    """Return w·values."""
    return values if weights is None else values * weights


def harmless(x: Tensor, weights: Tensor) -> Tensor:
    """Return `x`, or what `generic.harmless` makes of it; mostly there is nothing to do."""
    is_seen = not torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel()
    if is_seen and not is_transformed(x):
        most = generic.moderate(str(x.dtype).removeprefix("torch."))
        low, high = torch.aminmax(x.detach())  # a NaN is both
        if low >= -most and high <= most:
            return x
    return generic.harmless(x, weights)


def _made(line: Callable[..., Tensor], dtype: torch.dtype, x: Tensor, *others: Any) -> Tensor:
    """Return what a function makes of x and others, in the dtype."""
    if _is_whole(x):
        return line(x, *others, out=None).to(dtype)
    y = torch.empty_like(x, dtype=dtype)
    # What is repeated along an axis is read again for each piece of that.
    large = [part for part in others if part is not None and part.numel() * _FEW > x.numel()]
    repeated = {axis for part in large for axis in range(x.ndim) if part.shape[axis] == 1}
    for out, *parts in _pieces(_cut(x, repeated), y, x, *others):
        line(*parts, out=out)
    return y


def _wide(x: Tensor) -> torch.dtype:
    """Return the dtype of the sums."""
    dtype: torch.dtype = getattr(torch, statistics_dtype(str(x.dtype).removeprefix("torch.")))
    return dtype


def _is_whole(x: Tensor) -> bool:
    """Say whether x goes in one piece."""
    if torch.compiler.is_compiling():
        return True
    return bool(x.device.type != "cpu" or x.numel() <= _PIECE)


def _cut(x: Tensor, whole: Collection[int]) -> tuple[int, int]:
    """Return the axis along which to cut, the outermost in memory, and the length of a piece.

    Args:
        x: What is cut.
        whole: Axes to leave whole, if there are others.
    """
    able = [axis for axis in range(x.ndim) if x.shape[axis] > 1 and axis not in whole]
    axis = max(able or range(x.ndim), key=x.stride)
    return axis, max(1, x.shape[axis] * _PIECE // x.numel())


def _pieces(cut: tuple[int, int], x: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Return the pieces of x beside those of the others, which may be broadcast, or None."""
    axis, length = cut
    size = x.shape[axis]
    if length >= size:
        return iter([(x, *others)])
    split = (
        repeat(other) if other is None or other.shape[axis] != size else other.split(length, axis)
        for other in others
    )
    return zip(x.split(length, axis), *split, strict=False)


def _summed(
    sums: Callable[..., tuple[Tensor, ...]], over: list[Axes], x: Tensor, *others: Any
) -> list[Tensor]:
    """Return what a function sums of x and others over axes; of pieces, added or side by side."""
    if _is_whole(x):
        return list(sums(x, *others))
    # Sums over a few elements are nearly as large as what is summed: each is made in one piece.
    few = {axis for axes in over if number(x, axes) <= _FEW for axis in axes}
    axis, _ = cut = _cut(x, few)
    parts = [sums(*pieces) for pieces in _pieces(cut, x, *others)]
    joined = (torch.cat(values, axis) for values in zip(*parts, strict=True))
    return [
        sum_over(part, (axis,), part.dtype) if axis in axes else part
        for part, axes in zip(joined, over, strict=True)
    ]

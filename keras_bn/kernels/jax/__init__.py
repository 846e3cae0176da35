"""The kernels in JAX.

`moments` states its derivative as a JVP, not a VJP: forward mode (`jvp`, `jacfwd`, `hessian`) goes
on working, and reverse mode is its transpose. `apply` needs none. Of the input's size both keep
only `x` for the backward pass, and make anew what else that needs (`jax.checkpoint`).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from keras_bn.core.affine import AS_IS, Affine, Learned
from keras_bn.core.dtypes import statistics_dtype
from keras_bn.core.moments import Moments, positive, settled
from keras_bn.types import Tensor


def moments(x: Tensor, axes: tuple[int, ...], weights: Tensor | None = None) -> Moments:
    """Return the moments of `x` over `axes`; see `keras_bn.kernels`."""
    if weights is None:
        count: Any = math.prod(x.shape[axis] for axis in axes)
    else:
        weights = jax.lax.stop_gradient(weights)
        count = jnp.sum(jnp.broadcast_to(weights, x.shape), axes, keepdims=True)
    pivot, offset, m2 = _moments(axes, x, weights, positive(count))
    return Moments(count, jax.lax.stop_gradient(pivot), offset, m2)


# Half of the terms that XLA adds one by one in tensors of up to so many elements (jax 0.10, CPU);
# those of larger ones it adds in parts.
_HALF, _LOOPED = 16, 1 << 14
# The longest axis, and the fewest sums, of `_is_short`; terms that a product may add one by one.
_SHORT, _MANY, _FEW = 512, 4096, 8


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _moments(
    axes: tuple[int, ...], x: Tensor, weights: Tensor | None, count: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return pivot, offset and m2, in two passes over `x`."""
    zero = jnp.zeros((), statistics_dtype(str(x.dtype)))
    pivot = settled(_total(_weighted(x + zero, weights), axes) / count)
    deviation = x - pivot
    counted = _weighted(deviation, weights)
    # Deviations cancel each other: unlike those of squares, their sums do not grow.
    first = _total(counted, axes)
    offset = first / count
    second = _total(counted * deviation, axes, in_halves=True)
    return pivot, offset, jnp.maximum(second - first * offset, zero)


@_moments.defjvp
def _moments_jvp(axes: tuple[int, ...], primals: Any, tangents: Any) -> tuple[Any, Any]:
    """dmean = Σ w·dx / n, dm2 = 2·Σ w·(x - mean)·dx; the pivot is a constant."""
    x, weights, count = primals
    pivot, offset, m2 = _moments(axes, x, weights, count)

    @jax.checkpoint
    def slopes(x: Tensor, weights: Tensor | None, dx: Tensor) -> Any:
        deviation = (x - pivot) - offset
        dx = _weighted(dx.astype(pivot.dtype), weights)
        # Plain sums: reverse mode is their transpose, so they must be linear.
        d_mean = jnp.sum(dx, axes, keepdims=True) / count
        return d_mean, 2.0 * jnp.sum(deviation * dx, axes, keepdims=True)

    return (pivot, offset, m2), (jnp.zeros_like(pivot), *slopes(x, weights, tangents[0]))


def _weighted(values: Tensor, weights: Tensor | None) -> Tensor:
    """Multiply by the weights."""
    return values if weights is None else values * weights


def _total(values: Tensor, axes: tuple[int, ...], in_halves: bool = False) -> Tensor:
    """Sum over `axes`, axes kept."""
    # XLA sums blocks of 32 along each axis, so half a million elements of one axis cost no digits;
    # of several axes it sums blocks of 32·32 and more one by one (jax 0.10, CPU). So one axis goes
    # after the other, each settled, because XLA would make one sum of them again.
    if _is_short(values.shape, axes):
        values = _folded(values)
        return _times(jnp.ones((1, len(values)), values.dtype), values)
    for axis in reversed(axes):
        if in_halves and _is_block(values.shape, axis):
            values = settled(jnp.sum(_halves(values, axis), axis + 1))
        values = settled(jnp.sum(values, axis, keepdims=True))
    return values


def _is_block(shape: tuple[int, ...], axis: int) -> bool:
    """Say whether a sum of squares, equal or nearly so, can miss the bound of a variance."""
    size = shape[axis]
    is_block = isinstance(size, int) and _HALF < size <= 2 * _HALF  # in an export it is a symbol
    is_large = _is_known(shape) and math.prod(shape) > _LOOPED
    return is_block and not is_large


def _halves(values: Tensor, axis: int) -> Tensor:
    """Split an axis in two, one for the halves and one along them; an odd size grows by a 0."""
    before, (size, *after) = values.shape[:axis], values.shape[axis:]
    even = jnp.pad(values, [(0, size % 2) if a == axis else (0, 0) for a in range(values.ndim)])
    return even.reshape(*before, 2, -1, *after)


def _is_short(shape: tuple[int, ...], axes: tuple[int, ...]) -> bool:
    """Say whether the sum is over a short first axis alone, and leaves many."""
    # XLA takes 40 ms for (8, 512, 1024) on a CPU, a product with ones 0.4 ms (jax 0.10).
    is_alone = _is_known(shape) and axes == (0,)
    return is_alone and 1 < shape[0] <= _SHORT and math.prod(shape[1:]) >= _MANY


def _folded(values: Tensor) -> Tensor:
    """Add neighbours along the first axis, until there are as few as a product may add."""
    while len(values) > _FEW:
        values = jnp.pad(values, [(0, len(values) % 2)] + [(0, 0)] * (values.ndim - 1))
        # Not halves: over replicas of a batch these would be sent from one to the other.
        pairs = values.reshape(-1, 2, *values.shape[1:])
        values = pairs[:, 0] + pairs[:, 1]
    return values


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _spread(value: Tensor, size: int) -> Tensor:
    """Repeat along the first axis, by a product."""
    return _times(jnp.ones((size, 1), value.dtype), value)


@_spread.defjvp
def _spread_jvp(size: int, primals: Any, tangents: Any) -> tuple[Tensor, Tensor]:
    """Repeat, so that the transpose is the sum of `_folded`."""
    return _spread(primals[0], size), _doubled(tangents[0], size)


def _doubled(value: Tensor, size: int) -> Tensor:
    """Repeat along the first axis: few by a product, and each of these as often as it takes."""
    if size <= _FEW:
        return _times(jnp.ones((size, 1), value.dtype), value)
    few = _doubled(value, -(-size // 2))
    return jnp.stack([few, few], 1).reshape(-1, *value.shape[1:])[:size]


def _is_known(shape: tuple[int, ...]) -> bool:
    """Say whether all sizes are numbers; in an export some are symbols."""
    return all(isinstance(size, int) for size in shape)


def _times(ones: Tensor, values: Tensor) -> Tensor:
    """Multiply by a matrix along the first axis."""
    rest = values.shape[1:]
    product = jnp.matmul(ones, values.reshape(len(values), -1), precision="highest")
    return product.reshape(-1, *rest)


def second_moments(x: Tensor, axes: tuple[int, ...]) -> Moments:
    """Return the moments of `x` about 0, which stands for the mean; see `keras_bn.kernels`."""
    zero = jnp.zeros((), statistics_dtype(str(x.dtype)))
    m2 = _total(jnp.square(x + zero), axes, in_halves=True)
    count: Any = math.prod(x.shape[axis] for axis in axes)
    return Moments(count, jnp.zeros_like(m2), jnp.zeros_like(m2), m2)


def apply(x: Tensor, affine: Affine, dtype: str, learned: Learned = AS_IS) -> Tensor:
    """Return ((x - center)·scale + shift)·gamma + beta; see `keras_bn.kernels`."""

    def line(x: Tensor, affine: Affine, learned: Learned) -> Tensor:
        center, scale, shift = affine
        shift = jnp.zeros_like(scale) if shift is None else shift
        axes = tuple(axis for axis, size in enumerate(scale.shape) if size == 1 != x.shape[axis])
        if scale.ndim == x.ndim and scale.shape == shift.shape and _is_short(x.shape, axes):
            scale, shift = _spread(scale, len(x)), _spread(shift, len(x))
        y = (x if center is None else x - center) * scale + shift
        y = y if learned.gamma is None else y * learned.gamma
        return (y if learned.beta is None else y + learned.beta).astype(dtype)

    # To trace it takes longer than small arrays do; and without a center there is no x - center.
    is_kept = isinstance(x, jax.core.Tracer) and affine.center is not None
    kept: Any = jax.checkpoint(line) if is_kept else line
    return kept(x, affine, learned)

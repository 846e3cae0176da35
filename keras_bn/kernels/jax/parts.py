"""Moments and maps in JAX, each with its derivative.

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
from keras_bn.kernels.jax import compiled
from keras_bn.kernels.jax.sums import exact_sum_over, is_short, spread, sum_over
from keras_bn.types import Tensor


def moments(x: Tensor, axes: tuple[int, ...], weights: Tensor | None = None) -> Moments:
    """Return the moments of `x` over `axes`; see `keras_bn.kernels`."""
    if weights is None:
        count: Any = math.prod(x.shape[axis] for axis in axes)
    else:
        weights = jax.lax.stop_gradient(weights)
        count = exact_sum_over(jnp.broadcast_to(weights, x.shape), axes)
    pivot, offset, m2 = _moments(axes, x, weights, positive(count))
    return Moments(count, jax.lax.stop_gradient(pivot), offset, m2)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _moments(
    axes: tuple[int, ...], x: Tensor, weights: Tensor | None, count: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return pivot, offset and m2."""
    if compiled.serves(x, weights):
        counted = () if weights is None else (weights, count)
        pivot, offset, m2 = compiled.moments(_two_passes, x, axes, *counted)
    else:
        pivot, offset, m2 = _two_passes(axes, x, weights, count)
    return pivot, offset, m2


def _two_passes(axes: tuple[int, ...], x: Tensor, weights: Any = None, count: Any = None) -> Tensor:
    """Return pivot, offset and m2."""
    count = math.prod(x.shape[axis] for axis in axes) if count is None else count
    zero = jnp.zeros((), statistics_dtype(str(x.dtype)))
    pivot = settled(sum_over(_weighted(x + zero, weights), axes) / count)
    deviation = x - pivot
    counted = _weighted(deviation, weights)
    # Deviations cancel each other: unlike those of squares, their sums do not grow.
    first = sum_over(counted, axes)
    offset = first / count
    second = sum_over(counted * deviation, axes, in_halves=True)
    return jnp.stack([pivot, offset, jnp.maximum(second - first * offset, zero)])


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


def second_moments(x: Tensor, axes: tuple[int, ...]) -> Moments:
    """Return the moments of `x` about 0, which stands for the mean; see `keras_bn.kernels`."""
    zero = jnp.zeros((), statistics_dtype(str(x.dtype)))
    m2 = sum_over(jnp.square(x + zero), axes, in_halves=True)
    count: Any = math.prod(x.shape[axis] for axis in axes)
    return Moments(count, jnp.zeros_like(m2), jnp.zeros_like(m2), m2)


def apply(x: Tensor, affine: Affine, dtype: str, learned: Learned = AS_IS) -> Tensor:
    """Return ((x - center)·scale + shift)·gamma + beta; see `keras_bn.kernels`."""

    def line(x: Tensor, affine: Affine, learned: Learned) -> Tensor:
        center, scale, shift = affine
        shift = jnp.zeros_like(scale) if shift is None else shift
        axes = tuple(axis for axis, size in enumerate(scale.shape) if size == 1 != x.shape[axis])
        if scale.ndim == x.ndim and scale.shape == shift.shape and is_short(x.shape, axes):
            scale, shift = spread(scale, len(x)), spread(shift, len(x))
        y = (x if center is None else x - center) * scale + shift
        y = y if learned.gamma is None else y * learned.gamma
        return (y if learned.beta is None else y + learned.beta).astype(dtype)

    # To trace it takes longer than small arrays do; and without a center there is no x - center.
    is_kept = isinstance(x, jax.core.Tracer) and affine.center is not None
    kept: Any = jax.checkpoint(line) if is_kept else line
    return kept(x, affine, learned)

"""Passes over a big tensor in TensorFlow, without gradients."""

import math
import sys
from typing import Any

import tensorflow as tf

from keras_bn.core.affine import AS_IS, Affine, Learned
from keras_bn.core.dtypes import statistics_dtype
from keras_bn.kernels import generic
from keras_bn.kernels.normalization import How, Plan, Whole, in_one
from keras_bn.kernels.steps import Forward
from keras_bn.kernels.tensorflow import compiled
from keras_bn.kernels.tensorflow.sums import (
    made_and_summed,
    squares_over,
    sum_in_short_blocks,
    sum_over,
    weighted_sum_over,
)
from keras_bn.kernels.tensorflow.tracing import is_for_gradients, is_for_xla
from keras_bn.types import Tensor

Axes = tuple[int, ...]


def number(x: Tensor, axes: Axes) -> Tensor:
    """Return the number of elements along the axes: a Python number where it is known."""
    sizes = [x.shape[axis] for axis in axes]
    if None not in sizes:
        return math.prod(sizes)
    return tf.reduce_prod(tf.cast(tf.gather(tf.shape(x), axes), _wide(x)))


def moments(x: Tensor, weights: Tensor | None, count: Any, axes: Axes) -> Any:
    """Return pivot, offset and m2, in one pass; None where that cannot be had."""
    return compiled.moments(_moments, x, weights, count, axes)


def _moments(how: How, x: Tensor, *counted: Tensor) -> Tensor:
    """Return the same of operations of TensorFlow alone."""
    found = _own().moments(x, how.axes, counted[0] if counted else None)
    return tf.stack(found[1:])


def normalize(x: Tensor, learned: Learned, plan: Plan) -> Any:
    """Return y, the moments, and what `gradients` needs; None where that cannot be had at once."""
    return compiled.normalize(_in_one, x, learned, plan, number)


def _in_one(how: How, x: Tensor, *others: Tensor) -> Any:
    """Return the same, as the pass in C does, of operations of TensorFlow alone."""
    return in_one(_own(), how, x, *others)


def _own() -> Forward:
    """Return the kernels that these passes make."""
    return Forward(sys.modules[__name__])


def gradients(x: Tensor, dy: Tensor, learned: Learned, whole: Whole, plan: Plan) -> Any:
    """Return the gradients of x and of what is learned, from what `normalize` gave."""
    return compiled.gradients(x, dy, learned, whole, plan)


def total(x: Tensor, weights: Tensor | None, axes: Axes) -> Tensor:
    """Return Σ w·x."""
    return sum_over(weighted(tf.cast(x, _wide(x)), weights), axes)


def squares(x: Tensor, axes: Axes) -> Tensor:
    """Return Σ x²."""
    return squares_over(tf.cast(x, _wide(x)), axes)


def deviations(
    x: Tensor, pivot: Tensor, weights: Tensor | None, axes: Axes
) -> tuple[Tensor, Tensor]:
    """Return Σ w·(x - pivot) and Σ w·(x - pivot)²."""
    deviation = tf.cast(x, pivot.dtype) - pivot
    if weights is None:
        return sum_in_short_blocks(deviation, axes), squares_over(deviation, axes)
    # Of equal deviations the squares' sum less the square of theirs is 0 where both go alike.
    counted = weighted(deviation, weights)
    first = sum_in_short_blocks(counted, axes)
    return first, sum_in_short_blocks(counted * deviation, axes)


def products(
    x: Tensor, dy: Tensor, center: Tensor | None, axes: Axes
) -> tuple[Tensor | None, Tensor]:
    """Return Σ dy, None where the center is, and Σ dy·(x - center)."""
    found = None if center is None else compiled.products(x, dy, center, axes)
    if found is not None:
        return found[0], found[1]
    dy = tf.cast(dy, _wide(x))
    first = None if center is None else sum_over(dy, axes)
    return first, sum_over(dy * _difference(x, center), axes)


def mapped_products(
    x: Tensor, dy: Tensor, affine: Affine, gamma: Tensor | None, axes: Axes, shared: Axes
) -> tuple[Any, ...]:
    """Return Σ gamma·dy and Σ gamma·dy·z over `axes`, Σ dy and Σ dy·z over `shared`.

    The first and third are None where the center is; z is (x - center)·scale + shift.
    """
    dy = tf.cast(dy, affine.scale.dtype)
    product = dy * _plus(_difference(x, affine.center) * affine.scale, affine.shift)
    second = weighted_sum_over(product, gamma, axes)
    d_gamma = made_and_summed(product, shared)
    if affine.center is None:
        return None, second, None, d_gamma
    return sum_over(_times(dy, gamma), axes), second, sum_over(dy, shared), d_gamma


def mapped(x: Tensor, affine: Affine, dtype: str, learned: Learned = AS_IS) -> Tensor:
    """Return ((x - center)·scale + shift)·gamma + beta."""
    if learned.is_nothing:
        y = compiled.mapped(_mapped, x, affine, dtype)
        return _mapped(How((), dtype), x, *affine) if y is None else y
    y = _wide_map(x, affine)
    gamma, beta = learned
    if gamma is not None and beta is not None:
        rest = Affine(tf.zeros_like(gamma), gamma, beta)
        if _is_by_channel(y, rest, y.dtype.name):
            return tf.cast(_by_channel(y, rest), dtype)
    return tf.cast(_plus(_times(y, gamma), beta), dtype)


def _mapped(how: How, x: Tensor, *parts: Tensor | None) -> Tensor:
    """Return (x - center)·scale + shift of operations of TensorFlow alone."""
    affine = Affine(*parts)
    if _is_by_channel(x, affine, how.dtype):
        return _by_channel(x, affine)
    return tf.cast(_wide_map(x, affine), how.dtype)


def _wide_map(x: Tensor, affine: Affine) -> Tensor:
    y = tf.cast(x, affine.scale.dtype)
    return _plus((y if affine.center is None else y - affine.center) * affine.scale, affine.shift)


def _is_by_channel(x: Tensor, affine: Affine, dtype: str) -> bool:
    """Say whether a map is one for each element of the last axis, and there is an operation."""
    # XLA makes one pass of several operations itself, and would spoil this one: it turns
    # (x - center)·scale into x·scale - center·scale.
    if is_for_xla() or affine.center is None or affine.scale.dtype != tf.float32:
        return False
    shape = [1] * (len(x.shape) - 1) + [x.shape[-1]]
    is_known = x.dtype.name == dtype and x.shape[-1] is not None
    return is_known and all(part is not None and part.shape == shape for part in affine)


def _by_channel(x: Tensor, affine: Affine) -> Tensor:
    """Return (x - center)·scale + shift in one pass: batch normalization by a variance of 1."""
    channels = x.shape[-1]
    center, scale, shift = (tf.reshape(part, [channels]) for part in affine)
    y = tf.raw_ops.FusedBatchNormV3(
        x=tf.reshape(x, [-1, 1, 1, channels]),
        scale=scale,
        offset=shift,
        mean=center,
        # The sum is 1, and epsilon what cuDNN accepts.
        variance=tf.fill([channels], 0.999),
        epsilon=0.001,
        is_training=False,
    ).y
    return tf.reshape(y, tf.shape(x)) if None in x.shape else tf.reshape(y, x.shape)


def scaled(x: Tensor, scale: Tensor, dtype: str) -> Tensor:
    """Return x·scale."""
    return tf.cast(tf.cast(x, scale.dtype) * scale, dtype)


def combined(
    x: Tensor,
    dy: Tensor,
    center: Tensor | None,
    terms: tuple[Tensor, Tensor, Tensor | None],
    weights: Tensor | None = None,
    gamma: Tensor | None = None,
) -> Tensor:
    """Return gamma·dy·a + w·((x - center)·b + c), in the dtype of x, for the terms a, b, c."""
    dx = compiled.combined(x, dy, center, terms, weights) if gamma is None else None
    if dx is not None:
        return dx
    a, b, c = terms
    line = _plus(_difference(x, center) * b, c)
    dy = _times(tf.cast(dy, _wide(x)), gamma)
    return tf.cast(dy * a + weighted(line, weights), x.dtype)


def _difference(x: Tensor, center: Tensor | None) -> Tensor:
    """Return x - center for a derivative."""
    x = tf.cast(x, _wide(x))
    # Said otherwise than in the forward pass: a graph would keep that one's result until here.
    return x if center is None else x + (-center)


def _plus(values: Tensor, shift: Tensor | None) -> Tensor:
    return values if shift is None else values + shift


def weighted(values: Tensor, weights: Tensor | None) -> Tensor:
    """Return w·values."""
    return values if weights is None else values * tf.cast(weights, values.dtype)


def harmless(x: Tensor, weights: Tensor) -> Tensor:
    """Return `x`, or what `generic.harmless` makes of it; mostly there is nothing to do."""
    # Only in training, as `squares_over`; XLA makes no pass of its own for it.
    if is_for_xla() or not is_for_gradients():
        return generic.harmless(x, weights)
    norms = tf.raw_ops.EuclideanNorm(input=x, axis=-1)  # no less than any element; NaN with one
    is_moderate = tf.reduce_all(norms <= generic.moderate(x.dtype.name))
    return tf.cond(is_moderate, lambda: x, lambda: generic.harmless(x, weights))


def _times(values: Tensor, gamma: Tensor | None) -> Tensor:
    return values if gamma is None else values * gamma


def _wide(x: Tensor) -> str:
    """Return the dtype of the sums."""
    return statistics_dtype(x.dtype.name)

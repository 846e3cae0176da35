"""The kernels in TensorFlow: custom gradients that keep `x` and nothing else of its size.

TensorFlow 2.21 on the CPU adds the rows of a column one by one, and so does XLA in it: half a
million of them cost 2e-4. So sums go in blocks, and the blocks' sums are added in float64, which
is little to add; XLA cannot merge the two sums into one again.
"""

import math
from typing import Any

import tensorflow as tf

from keras_bn.core.affine import Affine
from keras_bn.core.dtypes import statistics_dtype
from keras_bn.core.moments import Moments, positive, settled
from keras_bn.types import Tensor

# Up to this many terms are added one by one: the error is about a third of the root of their
# number, in units in the last place.
_BLOCK = 32


def moments(x: Tensor, axes: tuple[int, ...], weights: Tensor | None = None) -> Moments:
    """Return the moments of `x` over `axes`; see `keras_bn.kernels`."""
    dtype = statistics_dtype(x.dtype.name)
    if weights is None:
        count = _number(x, axes, dtype)
    else:
        weights = tf.stop_gradient(tf.broadcast_to(weights, tf.shape(x)))
        count = block_sum(weights, axes)
    divisor = positive(count)

    @tf.custom_gradient
    def two_passes(x: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Any]:
        wide = tf.cast(x, dtype)
        pivot = settled(block_sum(_weighted(_masked(wide, weights), weights), axes) / divisor)
        deviation = _masked(wide - pivot, weights)
        first = block_sum(_weighted(deviation, weights), axes)
        offset = first / divisor
        second = block_sum(_weighted(tf.square(deviation), weights), axes)
        m2 = tf.maximum(second - first * offset, 0)

        def gradient(_: Tensor, d_mean: Tensor, d_m2: Tensor) -> Tensor:
            """dx = w·(d_mean / n + 2·d_m2·(x - mean))."""
            deviation = (tf.cast(x, dtype) - pivot) - offset
            dx = d_mean / divisor + 2.0 * d_m2 * deviation
            return tf.cast(_masked(_weighted(dx, weights), weights), x.dtype)

        return (pivot, offset, m2), gradient

    pivot, offset, m2 = two_passes(x)
    return Moments(count, tf.stop_gradient(pivot), offset, m2)


def apply(x: Tensor, affine: Affine, dtype: str) -> Tensor:
    """Return (x - center)·scale + shift in `dtype`; see `keras_bn.kernels`."""

    @tf.custom_gradient
    def affine_map(x: Tensor, center: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Any]:
        y = (tf.cast(x, scale.dtype) - center) * scale + shift
        axes = tuple(axis for axis, size in enumerate(scale.shape) if size == 1)

        def gradient(dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            """Sum dy for shift, dy·(x - center) for scale; dx is dy·scale."""
            # A tensor: of what is looked up row by row, it comes as rows and their indices.
            dy = tf.cast(tf.convert_to_tensor(dy), scale.dtype)
            d_shift = block_sum(dy, axes)
            d_scale = block_sum(dy * (tf.cast(x, scale.dtype) - center), axes)
            return tf.cast(dy * scale, x.dtype), -scale * d_shift, d_scale, d_shift

        return tf.cast(y, dtype), gradient

    return affine_map(x, *affine)


def block_sum(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Sum over `axes`, kept with size 1: blocks in the dtype of `x`, their sums in float64."""

    @tf.custom_gradient
    def total(x: Tensor) -> tuple[Tensor, Any]:
        sums = _sum_blocks(x, axes)
        # XLA would merge the two sums where both are in float64.
        sums = settled(sums) if x.dtype == tf.float64 else tf.cast(sums, tf.float64)
        sums = tf.cast(tf.reduce_sum(sums, axes, keepdims=True), x.dtype)
        return sums, lambda d_sums: tf.broadcast_to(d_sums, tf.shape(x))

    return total(x)


def _sum_blocks(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Sum over the last of `axes`, as many as fit into one block, and over blocks of the next."""
    room, whole, rest = _BLOCK, [], None
    for axis in reversed(axes):
        size = x.shape[axis]
        if size is None or size > room:
            rest = axis
            break
        whole.append(axis)
        room //= max(size, 1)
    if whole:
        x = tf.reduce_sum(x, whole, keepdims=True)
    # Where less room is left, what float64 has to sum is small enough.
    return x if rest is None or room < 8 else _fold(x, rest, room)


def _fold(x: Tensor, axis: int, room: int) -> Tensor:
    """Sum blocks of up to `room` neighbours along an axis, which keeps one element a block."""
    size = x.shape[axis]
    block = next((b for b in range(room, 7, -1) if size is not None and size % b == 0), room)
    shape = tf.shape(x)
    blocks = shape[axis] // block
    before, after = shape[:axis], shape[axis + 1 :]

    def folded(part: Tensor) -> Tensor:
        split = tf.concat([before, [blocks, block], after], 0)
        return tf.reduce_sum(tf.reshape(part, split), axis + 1)

    if size is not None and size % block == 0:
        return folded(x)
    head, tail = tf.split(x, [blocks * block, shape[axis] - blocks * block], axis)
    return tf.concat([folded(head), tf.reduce_sum(tail, axis, keepdims=True)], axis)


def _number(x: Tensor, axes: tuple[int, ...], dtype: str) -> Tensor:
    """Return the number of elements that are summed: a Python number where it is known."""
    sizes = [x.shape[axis] for axis in axes]
    if None in sizes:
        shape = tf.shape(x)
        return tf.reduce_prod(tf.cast(tf.gather(shape, axes), dtype))
    return math.prod(sizes)


def _masked(values: Tensor, weights: Tensor | None) -> Tensor:
    """Put 0 where the weight is 0, whatever stood there."""
    return values if weights is None else tf.where(weights > 0, values, tf.zeros_like(values))


def _weighted(values: Tensor, weights: Tensor | None) -> Tensor:
    """Multiply by the weights."""
    return values if weights is None else values * weights

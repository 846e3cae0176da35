"""Sums in TensorFlow that do not lose digits however many terms there are.

TensorFlow 2.21 on the CPU adds the rows of a column one by one, and so does XLA in it: half a
million of them cost 2e-4. So sums go in blocks, and the blocks' sums are added in float64, which
is little to add; XLA cannot merge the two sums into one again.
"""

import tensorflow as tf

from keras_bn.core.moments import settled
from keras_bn.types import Tensor

# Up to this many terms are added one by one: the error is about a third of the root of their
# number, in units in the last place.
_BLOCK = 32


def sum_over(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Sum over `axes`, kept with size 1: blocks in the dtype of `x`, their sums in float64."""
    sums = _sum_blocks(x, axes)
    # XLA would merge the two sums where both are in float64.
    sums = settled(sums) if x.dtype == tf.float64 else tf.cast(sums, tf.float64)
    return tf.cast(tf.reduce_sum(sums, axes, keepdims=True), x.dtype)


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

"""Sums in TensorFlow that do not lose digits however many terms there are.

TensorFlow 2.21 on the CPU adds the rows of a column one by one, and so does XLA in it: half a
million of them cost 2e-4. So sums go in blocks, and the blocks' sums are added in float64, which
is little to add.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from keras_bn.core.moments import settled
from keras_bn.kernels.tensorflow.tracing import is_for_gradients, is_for_xla
from keras_bn.types import Tensor

Axes = tuple[int, ...]
# Sums over axes, kept with size 1.
Add = Callable[[Tensor, Any], Tensor]

# Up to this many terms are added one by one: the error is about a third of the root of their
# number, in units in the last place. Of equal ones it is more: with XLA, which adds in no vectors,
# 32 squares can miss the contract's bound of a variance.
_BLOCK, _SHORT = 32, 16
# Along the last axis, where neighbours are added in vectors: of 8 elements, four of them at a time.
_ROW = 256
# Along it in a product.
_LONGEST = 2048


def sum_over(x: Tensor, axes: Axes) -> Tensor:
    """Sum over `axes`, kept with size 1: blocks in the dtype of `x`, their sums in float64."""
    return _in_blocks(_sums, x, axes)


def squares_over(x: Tensor, axes: Axes) -> Tensor:
    """Sum the squares, as `sum_over`."""
    # Only in training: XLA and other readers of an exported graph lack the norm.
    if is_for_xla() or not is_for_gradients():
        return sum_in_short_blocks(tf.square(x), axes)
    return _in_blocks(_squares, x, axes)


def sum_in_short_blocks(x: Tensor, axes: Axes) -> Tensor:
    """Sum as `sum_over`, right to the bound of a variance: deviations and their squares alike."""
    return _in_blocks(_sums, x, axes, _SHORT if is_for_xla() else _BLOCK)


def made_and_summed(x: Tensor, axes: Axes) -> Tensor:
    """Sum as `sum_over` what XLA shall compute once before, because its parts vary by row."""
    return _in_blocks(_products, x, axes) if is_for_xla() else sum_over(x, axes)


def weighted_sum_over(x: Tensor, weights: Tensor | None, axes: Axes) -> Tensor:
    """Sum x·weights as `sum_over`; rows by one factor for each column in a product with it."""
    if weights is None:
        return sum_over(x, axes)
    length = math.prod(x.shape[axis] or 0 for axis in axes)
    is_by_column = list(weights.shape) == [
        n if axis in axes else 1 for axis, n in enumerate(x.shape)
    ]
    are_rows = axes == tuple(range(len(x.shape) - len(axes), len(x.shape)))
    # The product adds in vectors, four at a time.
    if is_for_xla() or not (is_by_column and are_rows and 0 < length <= _LONGEST):
        return sum_over(x * weights, axes)
    total = tf.linalg.matvec(tf.reshape(x, [-1, length]), tf.reshape(weights, [length]))
    return tf.reshape(total, [1 if axis in axes else n for axis, n in enumerate(_sizes(x))])


def _sums(x: Tensor, axes: Any) -> Tensor:
    return tf.reduce_sum(x, axes, keepdims=True)


def _products(x: Tensor, axes: Any) -> Tensor:
    """Sum in products with ones, each over axes that are neighbours."""
    left = sorted(axes)
    while left:
        first = last = left.pop()
        while left and left[-1] == first - 1:
            first = left.pop()
        x = _product(x, first, last + 1)
    return x


def _product(x: Tensor, first: int, end: int) -> Tensor:
    """Sum over the axes from the first one on, before the end."""
    sizes = _sizes(x)
    rows = [math.prod(sizes[:first]), math.prod(sizes[first:end]), math.prod(sizes[end:])]
    total = tf.matmul(tf.ones([rows[0], 1, rows[1]], x.dtype), tf.reshape(x, rows))
    return tf.reshape(total, [*sizes[:first], *(1 for _ in range(first, end)), *sizes[end:]])


def _squares(x: Tensor, axes: Any) -> Tensor:
    # The norm of a block makes no tensor of the size of x, as squares to be summed would.
    return tf.square(tf.raw_ops.EuclideanNorm(input=x, axis=axes, keep_dims=True))


class _View(NamedTuple):
    """A tensor of which neighbouring axes that are summed over are one.

    Attributes:
        values: The tensor.
        axes: The axes that are summed over.
        factors: For each of them a number that is known to divide its size.
    """

    values: Tensor
    axes: Axes
    factors: tuple[int, ...]


def _in_blocks(add: Add, x: Tensor, axes: Axes, longest: int = _BLOCK) -> Tensor:
    """Sum what `add` gives of each block."""
    sizes = [x.shape[axis] for axis in axes]
    if None not in sizes and math.prod(sizes) <= longest:
        return add(x, axes)
    view = _joined(x, axes)
    sums = _blocks(add, view, longest)
    # XLA would merge the two sums where both are in float64.
    wide = settled(sums) if x.dtype == tf.float64 else tf.cast(sums, tf.float64)
    total = tf.cast(tf.reduce_sum(wide, view.axes, keepdims=True), x.dtype)
    if is_for_xla():
        total = _with_second_use(sums, total, view.axes)
    return tf.reshape(total, [1 if axis in axes else n for axis, n in enumerate(_sizes(x))])


def _with_second_use(sums: Tensor, total: Tensor, axes: Axes) -> Tensor:
    """Return the total, which is NaN where one of the sums is, whatever this computes."""
    # What is used twice XLA computes once and stores; it would otherwise compute the sums of the
    # blocks within the total, element by element, which takes up to seven times as long.
    unknown = tf.math.is_nan(tf.reduce_max(sums, axes, keepdims=True))
    return tf.where(unknown, tf.constant(math.nan, total.dtype), total)


def _sizes(x: Tensor) -> list[Any]:
    """Return the sizes of x: numbers where they are known."""
    sizes = list(x.shape)
    if None in sizes:
        dynamic = tf.shape(x)
        return [dynamic[axis] if n is None else n for axis, n in enumerate(sizes)]
    return sizes


def _joined(x: Tensor, axes: Axes) -> _View:
    """Join neighbouring axes that are summed over: XLA sums several of them badly."""
    sizes = _sizes(x)
    shape: list[Any] = []
    joined: list[int] = []
    factors: list[int] = []
    for axis, size in enumerate(sizes):
        known = 1 if x.shape[axis] is None else x.shape[axis]
        if axis in axes and axis - 1 in axes:
            shape[-1] *= size
            factors[-1] *= known
            continue
        if axis in axes:
            joined.append(len(shape))
            factors.append(known)
        shape.append(size)
    return _View(tf.reshape(x, shape), tuple(joined), tuple(factors))


def _blocks(add: Add, view: _View, longest: int) -> Tensor:
    """Sum over the last of the axes, as many as fit into one block, and over blocks of the next."""
    is_row = view.axes[-1:] == (len(view.values.shape) - 1,) and not is_for_xla()
    room = _ROW if is_row else longest
    whole: list[int] = []
    for axis, factor in zip(reversed(view.axes), reversed(view.factors), strict=True):
        size = view.values.shape[axis]
        if size is None or size > room:
            if room < 8:
                break  # what is left for float64 to sum is small enough
            return _folded(add, view.values, axis, whole, room, factor)
        whole.append(axis)
        room = min(room, longest) // max(size, 1)
    return add(view.values, whole)


def _folded(add: Add, x: Tensor, axis: int, whole: list[int], room: int, factor: int) -> Tensor:
    """Sum over whole axes and over blocks of up to `room` neighbours along one more."""
    block = next((b for b in range(room, 7, -1) if factor % b == 0), room)
    inner = [axis + 1, *(other + (other > axis) for other in whole)]

    def blocks(part: Tensor) -> Tensor:
        sizes = _sizes(part)
        sizes[axis : axis + 1] = [sizes[axis] // block, block]
        return tf.squeeze(add(tf.reshape(part, sizes), inner), axis + 1)

    if factor % block == 0:
        return blocks(x)
    rest = _sizes(x)[axis] % block
    head, tail = tf.split(x, [_sizes(x)[axis] - rest, rest], axis)
    return tf.concat([blocks(head), add(tail, [axis, *whole])], axis)

"""The kernels in `keras.ops`: the plain statement of each, and the path of the other backends.

The gradient is the backend's own. Used where there is no hand-written file: NumPy, OpenVINO.
"""

import math

from keras import ops
from keras.backend import backend, standardize_dtype

from keras_bn.core.affine import Affine
from keras_bn.core.dtypes import statistics_dtype
from keras_bn.core.moments import Moments, positive
from keras_bn.types import Tensor


def moments(x: Tensor, axes: tuple[int, ...], weights: Tensor | None = None) -> Moments:
    """Return the moments of `x` over `axes`, in two passes; see `keras_bn.kernels`."""
    x = ops.cast(x, statistics_dtype(standardize_dtype(x.dtype)))

    def total(values: Tensor) -> Tensor:
        # In float64, because NumPy adds the rows of a column one by one; JAX has none by default
        # and needs none, since XLA sums in blocks.
        wide = values if backend() == "jax" else ops.cast(values, "float64")
        return ops.cast(ops.sum(wide, axis=axes, keepdims=True), values.dtype)

    if weights is None:
        count = math.prod(x.shape[axis] for axis in axes)
        pivot = ops.stop_gradient(total(x) / positive(count))
        deviation = x - pivot
        first, second = total(deviation), total(ops.square(deviation))
    else:
        weights = ops.broadcast_to(weights, ops.shape(x))
        count, counted = total(weights), weights > 0
        zeros = ops.zeros_like(x)
        pivot = ops.stop_gradient(total(ops.where(counted, x, zeros) * weights) / positive(count))
        # A second `where`: what is masked out must not reach the products either.
        deviation = ops.where(counted, x - pivot, zeros)
        first, second = total(weights * deviation), total(weights * ops.square(deviation))
    offset = first / positive(count)
    # The pivot is the rounded mean, so this subtracts next to nothing.
    m2 = ops.relu(second - first * offset)
    return Moments(count, pivot, offset, m2)


def apply(x: Tensor, affine: Affine, dtype: str) -> Tensor:
    """Return (x - center)·scale + shift in `dtype`; see `keras_bn.kernels`."""
    difference = ops.cast(x, affine.center.dtype) - affine.center
    return ops.cast(difference * affine.scale + affine.shift, dtype)

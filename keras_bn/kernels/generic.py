"""The kernels in `keras.ops`: the plain statement of each, and the path of the other backends.

The gradient is the backend's own. Used where there is no hand-written file: NumPy, OpenVINO.
"""

import math

from keras import ops
from keras.backend import backend, standardize_dtype

from keras_bn.core.affine import AS_IS, Affine, Learned
from keras_bn.core.dtypes import statistics_dtype
from keras_bn.core.moments import Moments, is_static, positive, settled
from keras_bn.types import Tensor

Axes = tuple[int, ...]


def moments(x: Tensor, axes: Axes, weights: Tensor | None = None) -> Moments:
    """Return the moments of `x` over `axes`, in two passes; see `keras_bn.kernels`."""
    x = _widened(x)
    if weights is None:
        count = _number(x, axes)
        pivot = settled(ops.stop_gradient(_total(x, axes) / positive(count)))
        deviation = x - pivot
        first, second = _total(deviation, axes), _total(ops.square(deviation), axes)
    else:
        x, weights = harmless(x, weights), ops.broadcast_to(weights, ops.shape(x))
        count = _total(weights, axes)
        pivot = settled(ops.stop_gradient(_total(weights * x, axes) / positive(count)))
        deviation = x - pivot
        counted = weights * deviation
        first, second = _total(counted, axes), _total(counted * deviation, axes)
    offset = first / positive(count)
    # The pivot is the rounded mean, so this subtracts next to nothing.
    m2 = ops.relu(second - first * offset)
    return Moments(count, pivot, offset, m2)


def harmless(x: Tensor, weights: Tensor) -> Tensor:
    """Return `x` with 0 for what weighs 0 and is too large, or NaN, to become 0 by it."""
    is_moderate = ops.abs(x) <= moderate(standardize_dtype(x.dtype))  # NaN is not
    return ops.where((weights > 0) | is_moderate, x, ops.zeros_like(x))


def moderate(dtype: str) -> float:
    """Return the largest number that no product with statistics makes infinite."""
    # The largest of float16, whose statistics are float32.
    return 65504.0 if dtype == "float16" else 2.0**60


def second_moments(x: Tensor, axes: Axes) -> Moments:
    """Return the moments of `x` about 0, which stands for the mean; see `keras_bn.kernels`."""
    x = _widened(x)
    m2 = _total(ops.square(x), axes)
    return Moments(_number(x, axes), ops.zeros_like(m2), ops.zeros_like(m2), m2)


def apply(x: Tensor, affine: Affine, dtype: str, learned: Learned = AS_IS) -> Tensor:
    """Return ((x - center)·scale + shift)·gamma + beta; see `keras_bn.kernels`."""
    y = ops.cast(x, affine.scale.dtype)
    y = (y if affine.center is None else y - affine.center) * affine.scale
    y = y if affine.shift is None else y + affine.shift
    y = y if learned.gamma is None else y * learned.gamma
    return ops.cast(y if learned.beta is None else y + learned.beta, dtype)


def _widened(x: Tensor) -> Tensor:
    """Return x in the dtype of its sums."""
    return ops.cast(x, statistics_dtype(standardize_dtype(x.dtype)))


def _number(x: Tensor, axes: Axes) -> Tensor:
    """Return the number of elements along the axes: a Python number where it is known."""
    sizes = ops.shape(x)
    number = math.prod([sizes[axis] for axis in axes])
    return number if is_static(number) else ops.cast(number, x.dtype)


def _total(values: Tensor, axes: Axes) -> Tensor:
    """Sum over `axes`, axes kept."""
    # In float64, because NumPy adds the rows of a column one by one; JAX has none by default and
    # needs none, since XLA sums in blocks.
    wide = values if backend() == "jax" else ops.cast(values, "float64")
    return ops.cast(ops.sum(wide, axis=axes, keepdims=True), values.dtype)

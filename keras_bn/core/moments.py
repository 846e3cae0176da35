"""Moments that merge: count, mean and the sum of squared deviations of a set of elements.

The mean is kept in two parts, `pivot + offset`. The pivot is a constant near the mean (it carries
no gradient), the offset a small difference, so that neither a large mean nor the gap between two
large means costs digits: every formula below works with differences of pivots, which are exact
where the pivots are close, and with offsets, which are small.

References:
    Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", 1979, equations 2.1a and 2.1b.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_bn.core import native
from keras_bn.types import Shape, Tensor


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations of disjoint sets, one set per array element.

    Attributes:
        count: Number of elements, or sum of their weights; a Python number where it is the same
            for every set and known before the call. 0 for an empty set.
        pivot: A constant near the mean [x].
        offset: The mean less the pivot [x].
        m2: Sum of squared deviations from the mean [x²], never negative.
    """

    count: Tensor
    pivot: Tensor
    offset: Tensor
    m2: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean [x]; 0 for an empty set."""
        return self.pivot + self.offset

    @property
    def variance(self) -> Tensor:
        """The biased variance, m2 / count [x²]; 0 for an empty set."""
        return self.m2 / positive(self.count)

    def reshaped(self, shape: Shape) -> "Moments":
        """Return the moments in another shape."""
        full = self if is_static(self.count) else _counted(self)  # one count may stand for all
        return Moments(*(part if is_static(part) else native.reshape(part, shape) for part in full))

    @property
    def unbiased_variance(self) -> Tensor:
        """The variance of what the set is a sample of, m2 / (count - 1) [x²]."""
        return self.m2 / positive(degrees_of_freedom(self.count))


def is_static(count: Tensor) -> bool:
    """Say whether a count is a Python number, known before the call."""
    return isinstance(count, int | float)


def positive(count: Tensor) -> Tensor:
    """Return the count with 1 in place of 0, to divide sums of empty sets (which are 0) by."""
    return max(count, 1) if is_static(count) else native.where(count > 0, count, 1.0)


def degrees_of_freedom(count: Tensor) -> Tensor:
    """Return the count less 1; 1 for a count from 1 to 2, and a smaller count itself.

    So a single element keeps its variance of 0, and weights that sum to little more than 1 do not
    blow theirs up.
    """
    if is_static(count):
        return max(count - 1, min(count, 1))
    return native.where(count > 2, count - 1, native.where(count < 1, count, 1.0))


def is_known(moments: Moments) -> Tensor:
    """Say for each set whether its moments may be kept: not empty, and finite."""
    # Deviations from a mean that is not finite are not finite either; a NaN is not less.
    finite = moments.m2 < math.inf
    if is_static(moments.count):
        return finite if moments.count > 0 else ops.zeros_like(finite)
    return finite & (moments.count > 0)


def or_else(moments: Moments, other: Moments) -> Moments:
    """Return the moments, with those of `other` (of count 1) in place of empty sets."""
    if is_static(moments.count):
        return moments if moments.count > 0 else other
    filled = moments.count > 0
    parts = (native.where(filled, a, b) for a, b in zip(moments[1:], other[1:], strict=True))
    return Moments(positive(moments.count), *parts)


def settled(value: Tensor) -> Tensor:
    """Return a value that is the same number wherever it is used.

    XLA computes a value again for each use, and differently: in x - sum·(1/n), as one fused
    multiply-add, sum·(1/n) is not rounded. Then the formulas mean two pivots, a unit in the last
    place apart, and at κ = 1e4 the output is off by 1e-3. A clip of finite numbers at the largest
    ones stands between: it changes nothing, and no compiler takes it away.
    """
    if keras.backend.backend() not in ("tensorflow", "jax"):
        return value
    largest = float(np.finfo(keras.backend.standardize_dtype(value.dtype)).max)
    return native.where(native.isfinite(value), ops.clip(value, -largest, largest), value)


def merge(parts: Moments, total: Callable[[Tensor], Tensor], number: int | None = None) -> Moments:
    """Merge the moments of disjoint sets, exactly, in any order and of any sizes.

    With n_i, mean_i, m2_i of the parts: n = Σ n_i, mean = Σ n_i·mean_i / n,
    m2 = Σ m2_i + n_i·(mean_i - mean)².

    Args:
        parts: The moments of the parts.
        total: Sums an array over the parts that belong together; the result must broadcast
            against the parts, as from a sum with kept axes or from an all-reduce.
        number: How many parts belong together, where that is the same for all and known. Then
            the count stays a Python number, if it is one.

    Returns:
        The merged moments, in the shape that `total` gives.
    """
    if number is not None and is_static(parts.count):
        counts, count, share = parts.count, number * parts.count, 1.0 / number
    else:
        counts = _counted(parts).count
        count = total(counts)
        share = counts / positive(count)
    # Divided before the sum, which gives all parts the same number; a division after it need not:
    # vectorized and scalar divisions round differently (TensorFlow 2.21).
    pivot = settled(native.stop_gradient(total(share * parts.pivot)))
    distance = _distance(parts, counts, pivot)
    offset = total(share * distance)
    m2 = total(parts.m2 + counts * ops.square(distance - offset))
    return Moments(count, pivot, offset, m2)


def merge_equal(parts: Moments, find: Callable[..., Moments]) -> Moments:
    """Merge the moments of disjoint sets of one size, along the first axis, exactly, as `merge`.

    With the moments of the means, n elements in each part: m2 = Σ m2_i + n·m2 of the means.

    Args:
        parts: The moments of the parts, their count a Python number, and how many there are known.
        find: Gives the moments of an array over axes, as `kernels.moments`.

    Returns:
        The merged moments, the first axis kept.
    """
    number = parts.pivot.shape[0]
    first = native.stop_gradient(parts.pivot[:1])
    means = find((parts.pivot - first) + parts.offset, (0,))
    pivot = settled(first + means.pivot)
    # What the sum loses; TensorFlow's optimizer would add all three in another order.
    offset = settled((first - pivot) + means.pivot) + means.offset
    # So many numbers are summed by the kernels: TensorFlow's sum adds them one by one.
    m2 = number * find(parts.m2, (0,)).mean + parts.count * means.m2
    return Moments(number * parts.count, pivot, offset, m2)


def merge_replicas(own: Moments, total: Callable[[Tensor], Tensor]) -> Moments:
    """Merge the moments that each replica has of its part, in two sums, as `merge`.

    n = Σ n_i and pivot = Σ n_i·pivot_i / n; then, with d_i = mean_i - pivot,
    offset = Σ n_i·d_i / n and m2 = Σ (m2_i + n_i·d_i²) - n·offset².

    Args:
        own: The moments of this replica's part.
        total: Sums an array over the replicas, with its gradient. It is the same program on all
            of them that divides, so they come to the same pivot.

    Returns:
        The merged moments, the same on every replica.
    """
    counts = _counted(own).count
    sums = total(ops.stack([counts, native.stop_gradient(counts * own.pivot)]))
    count, weighted = sums[0], sums[1]
    pivot = settled(weighted / positive(count))
    distance = _distance(own, counts, pivot)
    sums = total(ops.stack([counts * distance, own.m2 + counts * ops.square(distance)]))
    first, second = sums[0], sums[1]
    offset = first / positive(count)
    # The pivot is the rounded mean, so this subtracts next to nothing.
    return Moments(count, pivot, offset, ops.relu(second - first * offset))


def _distance(parts: Moments, counts: Tensor, pivot: Tensor) -> Tensor:
    """Return the means less a pivot; an empty part may lie so far off that it overflows."""
    distance = (parts.pivot - pivot) + parts.offset
    return distance if is_static(counts) else native.where(counts > 0, distance, 0.0)


def union(first: Moments, second: Moments) -> Moments:
    """Return the moments of two sets together."""
    pairs = zip(_counted(first), _counted(second), strict=True)
    parts = Moments(*(ops.stack(pair) for pair in pairs))
    merged = merge(parts, lambda array: ops.sum(array, axis=0, keepdims=True))
    return Moments(*(part[0] for part in merged))


def _counted(moments: Moments) -> Moments:
    """Return the moments with a count for each set."""
    return moments._replace(count=moments.count * ops.ones_like(moments.pivot))

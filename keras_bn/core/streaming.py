"""Statistics of a data set that passes once, batch by batch, on the host.

They are NumPy float64, not the `keras.ops` of `moments.py`: the data may be float64 numbers far
from 0 (times in seconds are 1.7e9), which JAX by default, and PyTorch on some devices, cannot hold.
The mean is in two parts here too, for the same reason.

References:
    Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", 1979, equations 2.1a and 2.1b.
"""

from typing import NamedTuple, Self

import numpy as np

from keras_bn.core.pooling import reduced_axes
from keras_bn.types import Tensor


class Stored(NamedTuple):
    """The statistics in the form that a layer keeps; those of an empty set change nothing.

    Attributes:
        mean: Mean [x].
        stddev: Root of the biased variance [x]; exactly 0 where all elements are equal.
        minimum: Smallest element [x].
        maximum: Largest element [x].
        count: Number of elements.
    """

    mean: Tensor
    stddev: Tensor
    minimum: Tensor
    maximum: Tensor
    count: Tensor


# What is stored of an empty set: with it, all modes are the identity.
UNKNOWN = Stored(mean=0.0, stddev=1.0, minimum=0.0, maximum=1.0, count=0.0)


class Summary(NamedTuple):
    """What is known of disjoint sets of elements, one set per array element, in float64.

    Attributes:
        count: Number of elements; 0 for an empty set.
        pivot: A number near the mean [x]; 0 for an empty set.
        offset: The mean less the pivot [x].
        m2: Sum of squared deviations from the mean [x²].
        minimum: Smallest element [x]; infinity for an empty set.
        maximum: Largest element [x]; minus infinity for an empty set.
    """

    count: Tensor
    pivot: Tensor
    offset: Tensor
    m2: Tensor
    minimum: Tensor
    maximum: Tensor

    @classmethod
    def of(cls, x: Tensor, kept: tuple[int, ...], largest: float) -> Self:
        """Summarize an array for each element of its kept axes.

        Args:
            x: Numbers of any dtype.
            kept: The axes that are kept.
            largest: Elements of larger magnitude are missing, as is NaN.

        Returns:
            The summary, in the shape of the kept axes.
        """
        x = np.asarray(x, "float64")
        axes = reduced_axes(x.ndim, kept)
        known = np.abs(x) <= largest
        count = np.sum(known, axis=axes, keepdims=True, dtype="float64")
        pivot = np.sum(x, axis=axes, keepdims=True, where=known) / _positive(count)
        deviation = np.where(known, x - pivot, 0.0)
        # NumPy adds the rows of a column one by one; what that cost the mean is in the offset. The
        # deviations of equal numbers are exactly the offset, so their m2 is exactly 0.
        first = np.sum(deviation, axis=axes, keepdims=True)
        offset = first / _positive(count)
        m2 = np.sum(np.square(deviation), axis=axes, keepdims=True) - first * offset
        minimum = np.min(x, axis=axes, keepdims=True, where=known, initial=np.inf)
        maximum = np.max(x, axis=axes, keepdims=True, where=known, initial=-np.inf)
        parts = (count, pivot, offset, np.maximum(m2, 0.0), minimum, maximum)
        shape = [x.shape[axis] for axis in kept]
        return cls(*(np.reshape(part, shape) for part in parts))

    @classmethod
    def of_stored(cls, stored: Stored) -> Self:
        """Return the summary that was stored."""
        mean, stddev, minimum, maximum, count = stored
        filled = count > 0
        return cls(
            count,
            np.where(filled, mean, 0.0),
            np.zeros_like(mean),
            count * np.square(stddev),
            np.where(filled, minimum, np.inf),
            np.where(filled, maximum, -np.inf),
        )

    def stored(self) -> Stored:
        """Return the summary in the form that a layer keeps."""
        count, pivot, offset, m2, minimum, maximum = self
        stddev = np.sqrt(m2 / _positive(count))
        found = Stored(pivot + offset, stddev, minimum, maximum, count)
        pairs = zip(found, UNKNOWN, strict=True)
        return Stored(*(np.where(count > 0, value, unknown) for value, unknown in pairs))

    def merge(self, other: Self) -> Self:
        """Return the summary of the union with disjoint sets.

        With n, mean, m2 of the one and n', mean', m2' of the other, and distance = mean' - mean:
        mean + distance·n'/(n + n') and m2 + m2' + distance²·n·n'/(n + n').
        """
        count = self.count + other.count
        share = other.count / _positive(count)
        # The pivot of an empty set may be far off.
        pivot, offset = np.where(self.count > 0, self[1:3], other[1:3])
        distance = (other.pivot - pivot) + (other.offset - offset)
        return type(self)(
            count,
            pivot,
            offset + distance * share,
            self.m2 + other.m2 + np.square(distance) * self.count * share,
            np.minimum(self.minimum, other.minimum),
            np.maximum(self.maximum, other.maximum),
        )


def three_parts(value: Tensor, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return a float64 number as the sum of three in `dtype`.

    In float32 two hold 48 bits of it and three all 53, so that a constant feature is found
    constant again.
    """
    high = value.astype(dtype)
    middle = (value - high).astype(dtype)
    return high, middle, (value - high - middle).astype(dtype)


def _positive(count: Tensor) -> Tensor:
    return np.where(count > 0, count, 1.0)

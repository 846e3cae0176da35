"""The oracle of the tests: the formulas in NumPy float64, written to be read.

Nothing here is fast or shares code with what it judges. Axes that are summed over are kept with
size 1, so that every result broadcasts against `x`.
"""

from typing import NamedTuple

import numpy as np

from keras_bn.types import Tensor


class Exact(NamedTuple):
    """Count, mean [x] and sum of squared deviations [x²] in float64."""

    count: Tensor
    mean: Tensor
    m2: Tensor

    @property
    def variance(self) -> Tensor:
        """The biased variance [x²]; 0 for an empty set."""
        return self.m2 / np.where(self.count > 0, self.count, 1)


def moments(x: Tensor, axes: tuple[int, ...], weights: Tensor | None = None) -> Exact:
    """Return the weighted moments of `x` over `axes`; an empty set has mean 0 and m2 0."""
    x = np.asarray(x, "float64")
    w = np.broadcast_to(1.0 if weights is None else np.asarray(weights, "float64"), x.shape)
    x = np.where(w > 0, x, 0.0)
    count = np.sum(w, axis=axes, keepdims=True)
    mean = np.sum(w * x, axis=axes, keepdims=True) / np.where(count > 0, count, 1)
    # NumPy adds the rows of a column one by one; what that cost is in the mean deviation.
    mean = mean + np.sum(w * (x - mean), axis=axes, keepdims=True) / np.where(count > 0, count, 1)
    return Exact(count, mean, np.sum(w * (x - mean) ** 2, axis=axes, keepdims=True))


def merge(parts: list[Exact]) -> Exact:
    """Return the moments of the union of disjoint sets, by Chan's formula."""
    count = sum(part.count for part in parts)
    mean = sum(part.count * part.mean for part in parts) / np.where(count > 0, count, 1)
    m2 = sum(part.m2 + part.count * (part.mean - mean) ** 2 for part in parts)
    return Exact(count, mean, m2)


def normalize(
    x: Tensor,
    axes: tuple[int, ...],
    *,
    gamma: Tensor = 1.0,
    beta: Tensor = 0.0,
    epsilon: float = 1e-3,
    weights: Tensor | None = None,
    r: Tensor = 1.0,
    d: Tensor = 0.0,
) -> Tensor:
    """Return y = gamma·(r·(x - mean)/√(variance + epsilon) + d) + beta."""
    exact = moments(x, axes, weights)
    standardized = (np.asarray(x, "float64") - exact.mean) / np.sqrt(exact.variance + epsilon)
    return gamma * (r * standardized + d) + beta


def weight_normalize(v: Tensor, g: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return g·v / |v|, with |v| over `axes` and g broadcastable; 0 where v is 0."""
    v = np.asarray(v, "float64")
    norm = np.sqrt(np.sum(v**2, axis=axes, keepdims=True))
    return g * v / np.where(norm > 0, norm, 1)


def weight_gradients(
    v: Tensor, g: Tensor, dk: Tensor, axes: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Return the gradients of Σ dk·weight_normalize(v) to v and, with kept axes, to g.

    dg = Σ dk·v / |v|, dv = g / |v|·(dk - dg·v / |v|): equation 3 of the paper. v is not 0.
    """
    v, dk = np.asarray(v, "float64"), np.asarray(dk, "float64")
    norm = np.sqrt(np.sum(v**2, axis=axes, keepdims=True))
    dg = np.sum(dk * v / norm, axis=axes, keepdims=True)
    return g / norm * (dk - dg * v / norm), dg


def gradients(
    x: Tensor,
    dy: Tensor,
    axes: tuple[int, ...],
    *,
    gamma: Tensor = 1.0,
    epsilon: float = 1e-3,
    weights: Tensor | None = None,
    r: Tensor = 1.0,
    d: Tensor = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of Σ dy·normalize(x) to x, and, element by element, to gamma and beta.

    The last two have the shape of `x`: the caller sums them over the axes along which gamma and
    beta are shared. r and d are constants, as in batch renormalization. With s = √(variance +
    epsilon), z = (x - mean)/s, g = gamma·r·dy, w the weights and n their sum:
    dx = (g - w·(Σg + z·Σ(g·z)) / n) / s.
    """
    x, dy = np.asarray(x, "float64"), np.asarray(dy, "float64")
    w = np.broadcast_to(1.0 if weights is None else np.asarray(weights, "float64"), x.shape)
    exact = moments(x, axes, weights)
    s = np.sqrt(exact.variance + epsilon)
    z = (x - exact.mean) / s
    g = gamma * r * dy
    sum_g = np.sum(g, axis=axes, keepdims=True)
    sum_gz = np.sum(g * z, axis=axes, keepdims=True)
    dx = (g - w * (sum_g + z * sum_gz) / np.where(exact.count > 0, exact.count, 1)) / s
    return dx, dy * (r * z + d), dy

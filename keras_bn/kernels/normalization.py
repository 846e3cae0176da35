"""The whole of a normalization: the kernels and the algebra between them."""

from collections.abc import Callable

from keras_bn.core.affine import Learned, compose, standardize
from keras_bn.core.moments import Moments, merge, or_else
from keras_bn.core.pooling import Pooling
from keras_bn.kernels import active
from keras_bn.types import Tensor

# r and d of batch renormalization, from the moments of the batch; constants for gradients.
Correction = Callable[[Moments], tuple[Tensor, Tensor] | None]


def normalize(
    x: Tensor,
    pooling: Pooling,
    learned: Learned,
    epsilon: float,
    dtype: str,
    correct: Correction | None = None,
    kept: Moments | None = None,
) -> tuple[Tensor, Moments]:
    """Return y = gamma·(r·(x - mean)/√(variance + epsilon) + d) + beta and the moments.

    Args:
        x: The input.
        pooling: Which of its elements belong to one set.
        learned: gamma and beta, broadcast over `x`.
        epsilon: Added to the variance.
        dtype: Dtype of y.
        correct: Gives r and d; None for 1 and 0.
        kept: Moments in place of those of an empty set; None to take 0.

    Returns:
        y and the moments; those of an empty set have count 0.
    """
    moments = pooled(x, pooling)
    affine = standardize(moments if kept is None else or_else(moments, kept), epsilon)
    correction = None if correct is None else correct(moments)
    if correction is not None:
        affine = compose(affine, *map(active.hold, correction))
    return active.apply(x, compose(affine, *learned), dtype), moments


def pooled(x: Tensor, pooling: Pooling) -> Moments:
    """Return the moments of each set, once for each of its cells."""
    cells = active.moments(x, pooling.axes, pooling.weights)
    return cells if pooling.total is None else merge(cells, pooling.total)

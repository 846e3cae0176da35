"""Batch renormalization."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from keras_bn import kernels
from keras_bn.core import native
from keras_bn.core.estimators import Correction, Limits, linear_ramp
from keras_bn.core.moments import Moments, is_static
from keras_bn.layers.batch_statistics import BatchStatistics
from keras_bn.types import Shape


class BatchRenormalization(BatchStatistics):
    """Normalize by the batch, corrected towards the moving statistics that inference uses.

    In training, with s = √(variance + epsilon) of the batch and σ = √(moving_variance + epsilon),

        r = clip(s / σ, 1 / r_max, r_max),  d = clip((mean - moving_mean) / σ, -d_max, d_max)
        y = gamma · ((x - mean) / s · r + d) + beta
        moving_mean = momentum · moving_mean + (1 - momentum) · mean
        σ           = momentum · σ           + (1 - momentum) · s

    r and d carry no gradient. r_max rises linearly from 1 to `rmax` and d_max from 0 to `dmax`, so
    that the layer starts as plain batch normalization and the correction comes in as the moving
    statistics settle. Otherwise (`training` False, None, or `trainable=False`) the layer is
    `BatchNormalization` with the same weights. Training and inference then agree even where
    batches are small or their samples depend on each other.

    Pools: batch and space, then corrected towards what is kept.
    Keeps: moving mean and variance (σ² - epsilon), and the number of training steps; it is a
        weight, so the warm-up goes on under compilation and over saving and several `fit`s. With
        `debias` or `momentum=None` also a count, as in `BatchNormalization`.

    A batch that is empty or masked out as a whole leaves statistics and step as they are. A
    channel with a NaN or an infinity shows it in its output; its statistics do not take it up.

    Args:
        axis: The axis that is kept, or a tuple of those that are kept; all others are pooled.
        momentum: Share of the old moving statistics at each step, in [0, 1]; None for a cumulative
            average, in which each batch counts by its elements.
        epsilon: Added to the variance [x²].
        center: Whether to add beta.
        scale: Whether to multiply by gamma.
        beta_initializer: Initializer of beta.
        gamma_initializer: Initializer of gamma.
        moving_mean_initializer: Initializer of the moving mean.
        moving_variance_initializer: Initializer of the moving variance.
        beta_regularizer: Regularizer of beta.
        gamma_regularizer: Regularizer of gamma.
        beta_constraint: Constraint on beta.
        gamma_constraint: Constraint on gamma.
        rmax: Final limit of r, at least 1.
        dmax: Final limit of |d|, at least 0.
        rmax_steps: Where r_max begins and ends to rise [steps]; None for `rmax` from the start.
        dmax_steps: Where d_max begins and ends to rise [steps]; None for `dmax` from the start.
        debias: Whether to take the initial value out of the moving statistics, as in
            `BatchNormalization`. The first step, where nothing is kept yet, is not corrected.
        unbiased: Whether σ takes up √(m2 / (count - 1) + epsilon) instead of s.
        virtual_batch_size: Number of samples in the largest ghost, as in `BatchNormalization`: s
            and mean are then those of a ghost, each with its own r and d.
        synchronized: Whether s and mean are those of all replicas, as in `BatchNormalization`.
        axis_name: Name of the mapped axis of replicas in JAX, as in `BatchNormalization`.
        **kwargs: `name`, `dtype`, `trainable`.

    Call arguments:
        inputs: Any rank from 2, the sizes of the kept axes known.
        training: Whether to use and update the statistics of the batch.
        mask: As for `BatchNormalization`.

    Shapes:
        Input and output the same. gamma, beta and the statistics have the shape of the kept axes.

    Raises:
        ValueError: An option out of range; in `build`, an axis that the input lacks, a kept axis of
            unknown size, or ghosts of a batch axis that is kept; in the call, a mask that does not
            fit.
        TypeError: An option of the wrong kind.

    Example:
        >>> import numpy as np, keras, keras_bn
        >>> x = np.array([[1.0], [3.0]], "float32")
        >>> layer = keras_bn.BatchRenormalization(rmax_steps=None, dmax_steps=None)
        >>> y = layer(x, training=True)  # moving mean 0, moving variance 1, before the step
        >>> s, sigma = np.sqrt(x.var() + 1e-3), np.sqrt(1 + 1e-3)
        >>> expected = (x - x.mean()) / s * (s / sigma) + x.mean() / sigma
        >>> np.allclose(keras.ops.convert_to_numpy(y), expected, atol=1e-6)
        True

    Differences:
        To `keras.layers.BatchNormalization(renorm=True)`: the limits warm up, one pair of
        statistics serves correction and inference, and weights of a plain BatchNormalization load
        (the step then starts at 0): with `set_weights`, or from a file that names the layer alike.
        In files of Sequential and functional models Keras names layers after their class.

    References:
        Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized
        Models", 2017, https://arxiv.org/abs/1702.03275, algorithm 1; the default steps are those
        of section 4.
    """

    def __init__(
        self,
        axis: int | Iterable[int] = -1,
        momentum: float | None = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        *,
        rmax: float = 3.0,
        dmax: float = 5.0,
        rmax_steps: tuple[int, int] | None = (5_000, 40_000),
        dmax_steps: tuple[int, int] | None = (5_000, 25_000),
        debias: bool = False,
        unbiased: bool = False,
        virtual_batch_size: int | None = None,
        synchronized: bool = False,
        axis_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(locals(), **kwargs)

    def build(self, input_shape: Shape) -> None:
        """Create gamma, beta, moving mean, moving variance and step."""
        super().build(input_shape)
        self.step = self._add_step()

    def limits(self) -> Limits:
        """Return the limits of r and d at the present step."""
        dtype = self.moving_mean.dtype
        is_settled = self.rmax_steps is None and self.dmax_steps is None
        step = 0 if is_settled else kernels.known_number(native.cast(self.step, "int32"))
        rmax = linear_ramp(step, 1.0, self.rmax, self.rmax_steps, dtype)
        return Limits(1.0 / rmax, rmax, linear_ramp(step, 0.0, self.dmax, self.dmax_steps, dtype))

    def load_own_variables(self, store: Mapping[str, Any]) -> None:
        """Load from a file; without a step, as from a BatchNormalization, the step starts at 0."""
        # A count has a place of its own there.
        last = len(self.weights) - (self.moving_count is not None) - 1
        missing_step = len(store) == last
        super().load_own_variables({**store, str(last): np.int32(0)} if missing_step else store)

    def _corrector(self, dtype: str) -> Correction:
        mean, variance = self._moving(dtype)
        given = self.limits()
        limits = given if is_static(given.rmax) else Limits(*(native.cast(v, dtype) for v in given))
        count = self._spread_count(self.moving_count, dtype)
        return Correction(mean, variance, limits, self.epsilon, count)

    def _update(self, batch: Moments) -> None:
        self._count_step(self._average(batch, self.epsilon))

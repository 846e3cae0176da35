"""Batch normalization."""

from collections.abc import Iterable
from typing import Any, ClassVar

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from keras_bn.core.estimators import Limits, at_least, renorm_correction
from keras_bn.core.moments import Moments
from keras_bn.layers.batch_statistics import BatchStatistics
from keras_bn.types import Shape, Tensor


class BatchNormalization(BatchStatistics):
    r"""Normalize each channel over the batch and space.

    In training, with the mean and the biased variance of the batch,

        y = gamma · (x - mean) / √(variance + epsilon) + beta
        moving_mean     = momentum · moving_mean     + (1 - momentum) · mean
        moving_variance = momentum · moving_variance + (1 - momentum) · variance

    and otherwise (`training` False, None, or `trainable=False`) with the moving statistics in
    place of the batch's.

    Pools: batch and space.
    Keeps: moving mean and variance, in float32 at least under any dtype policy.

    A batch that is empty or masked out as a whole is normalized with the moving statistics and
    leaves them as they are. A channel with a NaN or an infinity shows it in its output; its moving
    statistics do not take it up.

    Args:
        axis: The axis that is kept, or a tuple of those that are kept; all others are pooled.
        momentum: Share of the old moving statistics at each step, in [0, 1].
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
        renorm: Whether to correct each batch towards kept statistics as Keras 3.15 does. It has no
            warm-up and can diverge; `BatchRenormalization` is the paper's algorithm.
        renorm_clipping: Limits of the correction, under the keys `"rmin"`, `"rmax"`, `"dmax"`:
            numbers, or `LearningRateSchedule` objects, which count this layer's training steps.
        renorm_momentum: Share of the old statistics of `renorm` at each step, in [0, 1].
        synchronized: Whether statistics shall be taken over all replicas. Stored; this version
            does not communicate yet.
        axis_name: Name of the mapped axis of replicas in JAX. Stored, like `synchronized`.
        **kwargs: `name`, `dtype`, `trainable`.

    Call arguments:
        inputs: Any rank from 2, the sizes of the kept axes known.
        training: Whether to use and update the statistics of the batch.
        mask: Boolean, or non-negative weights: how much each element counts in the statistics.
            Broadcastable to the input without its kept axes, or, as in Keras, of the input's
            shape without its last axis. What lies under a 0 does not matter, NaN included.

    Shapes:
        Input and output the same. gamma, beta and the statistics have the shape of the kept axes.

    Raises:
        ValueError: An option out of range; in `build`, an axis that the input lacks, or a kept
            axis of unknown size; in the call, a mask that does not fit.
        TypeError: An option of the wrong kind.

    Example:
        >>> import numpy as np, keras, keras_bn
        >>> x = np.array([[1.0, 10.0], [3.0, 30.0]], "float32")
        >>> y = keras_bn.BatchNormalization(epsilon=1e-3)(x, training=True)
        >>> expected = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3)
        >>> np.allclose(keras.ops.convert_to_numpy(y), expected, atol=1e-6)
        True

    Differences:
        To Keras: statistics are right far from 0, under masks and in half precision; `axis` may be
        a tuple. To PyTorch: the moving variance is the biased one, and `momentum` is the old
        statistics' share.

    References:
        Ioffe, Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
        Internal Covariate Shift", 2015, https://arxiv.org/abs/1502.03167, algorithm 1.
    """

    # Keras 2 wrote these: `fused` chose a kernel, the other two are off.
    _legacy_options: ClassVar[dict[str, tuple[Any, ...]]] = {
        "fused": (None, True, False),
        "adjustment": (None,),
        "virtual_batch_size": (None,),
    }

    def __init__(
        self,
        axis: int | Iterable[int] = -1,
        momentum: float = 0.99,
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
        renorm: bool = False,
        renorm_clipping: dict[str, Any] | None = None,
        renorm_momentum: float = 0.99,
        synchronized: bool = False,
        *,
        axis_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(locals(), **kwargs)

    def build(self, input_shape: Shape) -> None:
        """Create the weights: 4, or with `renorm` 7, and a step if a limit is a schedule."""
        super().build(input_shape)
        if not self.renorm:
            return
        self.moving_stddev = self._add_statistic("moving_stddev", self._initial_stddev)
        self.renorm_mean = self._add_statistic("renorm_mean", self.moving_mean_initializer)
        self.renorm_stddev = self._add_statistic("renorm_stddev", self._initial_stddev)
        limits = (self.renorm_clipping or {}).values()
        is_scheduled = any(isinstance(limit, LearningRateSchedule) for limit in limits)
        self.step = self._add_step() if is_scheduled else None

    def _initial_stddev(self, shape: Shape, dtype: str | None = None) -> Tensor:
        return ops.sqrt(self.moving_variance_initializer(shape, dtype=dtype))

    def _correction(self, batch: Moments) -> tuple[Tensor, Tensor] | None:
        if not self.renorm:
            return None
        dtype = batch.pivot.dtype
        mean, stddev = (self._spread(v, dtype) for v in (self.renorm_mean, self.renorm_stddev))
        # The initial value may be 0.
        stddev = at_least(stddev, self.epsilon**0.5)
        return renorm_correction(batch, self._stddev(batch), mean, stddev, self._limits(dtype))

    def _update(self, batch: Moments, known: Tensor) -> None:
        self._move(self.moving_mean, batch.mean, self.momentum, known)
        if not self.renorm:
            self._move(self.moving_variance, batch.variance, self.momentum, known)
            return
        stddev = self._stddev(batch)
        self._move(self.renorm_mean, batch.mean, self.renorm_momentum, known)
        self._move(self.renorm_stddev, stddev, self.renorm_momentum, known)
        self._move(self.moving_stddev, stddev, self.momentum, known)
        variance = ops.square(self.moving_stddev) - self.epsilon
        self._move(self.moving_variance, ops.relu(variance), 0.0, known)
        if self.step is not None:
            self._count_step(known)

    def _limits(self, dtype: str) -> Limits:
        """Return the limits at this step."""
        step = None if self.step is None else ops.convert_to_tensor(self.step)
        now = {
            key: ops.cast(limit(step), dtype) if isinstance(limit, LearningRateSchedule) else limit
            for key, limit in (self.renorm_clipping or {}).items()
        }
        return Limits(now.get("rmin"), now.get("rmax"), now.get("dmax"))

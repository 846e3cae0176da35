"""Batch normalization."""

from collections.abc import Iterable
from typing import Any, ClassVar

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from keras_bn.core import native
from keras_bn.core.estimators import Correction, Limits
from keras_bn.core.moments import Moments, degrees_of_freedom, is_known, union
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

    The moving statistics start at an initial value that fades slowly: of it, momentum^t is left
    after t steps. With `debias=True` none is: batch i has the share momentum^(t-i) / Σ momentum^j,
    j from 0 to t - 1, so they are right from the first step and soon the same as without. With
    `momentum=None` they are the mean and the variance of all that was seen, merged exactly.

    With `virtual_batch_size` a training batch falls into ghosts, ⌈batch / virtual_batch_size⌉ of
    them: sample i belongs to ghost i mod their number, so their sizes differ by 1 at most. Each is
    normalized by its own mean and variance; the moving statistics take up those of the whole
    batch. Inference knows no ghosts.

    Pools: batch and space; with `virtual_batch_size`, slices of the batch and space.
    Keeps: moving mean and variance, in float32 at least under any dtype policy; with `debias` or
        `momentum=None` also a count, the sum of the weights that stand behind them.

    A batch that is empty or masked out as a whole is normalized with the moving statistics and
    leaves them as they are. A channel with a NaN or an infinity shows it in its output; its moving
    statistics do not take it up.

    Args:
        axis: The axis that is kept, or a tuple of those that are kept; all others are pooled.
        momentum: Share of the old moving statistics at each step, in [0, 1]; None for a cumulative
            average, in which every element counts the same.
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
        synchronized: Whether mean and variance are those of all replicas' batches together: under
            `tf.distribute`, on the mapped axis `axis_name` of JAX (`shard_map`, `pmap`, `vmap`;
            under `keras.distribution` they are so anyway), and over the layer's `process_group`
            of `torch.distributed`. A ghost stays within its replica; what is kept is of all.
            Without, replicas under `tf.distribute` keep statistics of their own, and their mean is
            saved.
        debias: Whether to take the initial value out of the moving statistics, those of `renorm`
            too. What is stored is the corrected value.
        unbiased: Whether the moving variance takes up m2 / (count - 1) instead of m2 / count; of a
            single element, 0. The batch itself is normalized by the biased variance in any case.
        virtual_batch_size: Number of samples in the largest ghost; None for the whole batch.
        axis_name: Name of the mapped axis of replicas in JAX, for `synchronized`.
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
        ValueError: An option out of range; in `build`, an axis that the input lacks, a kept axis of
            unknown size, or ghosts of a batch axis that is kept; in the call, a mask that does not
            fit.
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
        a tuple. Weights and files of a layer without a count, of Keras' own too, load into one
        that counts, and back: they then stand for settled statistics, or, with `momentum=None`,
        serve until the first step. To Keras 2: ghosts need not divide the batch, inference does
        not split it, and the moving variance includes that between ghosts. To PyTorch: the moving
        variance is the biased one, `momentum` is the old statistics' share, and its None merges
        all elements, where PyTorch averages the variances of batches.

    References:
        Ioffe, Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
        Internal Covariate Shift", 2015, https://arxiv.org/abs/1502.03167, algorithm 1; `unbiased`
        is its algorithm 2.
        Hoffer, Hubara, Soudry, "Train longer, generalize better: closing the generalization gap in
        large batch training of neural networks", 2017, https://arxiv.org/abs/1705.08741,
        algorithm 1: ghosts.
    """

    # Keras 2 wrote these: `fused` chose a kernel, the other is off.
    _legacy_options: ClassVar[dict[str, tuple[Any, ...]]] = {
        "fused": (None, True, False),
        "adjustment": (None,),
    }

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
        renorm: bool = False,
        renorm_clipping: dict[str, Any] | None = None,
        renorm_momentum: float = 0.99,
        synchronized: bool = False,
        *,
        debias: bool = False,
        unbiased: bool = False,
        virtual_batch_size: int | None = None,
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
        if is_scheduled:
            self.step = self._add_step()
        if self.debias:
            self.renorm_count = self._add_count("renorm_count", self.renorm_momentum)

    def _initial_stddev(self, shape: Shape, dtype: str | None = None) -> Tensor:
        return ops.sqrt(self.moving_variance_initializer(shape, dtype=dtype))

    def _corrector(self, dtype: str) -> Correction | None:
        if not self.renorm:
            return None
        mean, stddev = (self._spread(v, dtype) for v in (self.renorm_mean, self.renorm_stddev))
        count = self._spread_count(self.renorm_count, dtype)
        variance = self._variance(stddev)
        return Correction(mean, variance, self._limits(dtype), self.epsilon, count)

    def _update(self, batch: Moments) -> None:
        if not self.renorm and self.momentum is not None:
            self._average(batch)
            return
        batch = batch.reshaped(self._parameter_shape)
        if self.renorm:
            self._update_renorm(batch, is_known(batch))
        else:
            self._merge(batch, is_known(batch), self.moving_count)

    def _merge(self, batch: Moments, known: Tensor, counter: Any) -> None:
        """Merge the batch with all that the moving statistics stand for."""
        dtype = batch.pivot.dtype
        kept = self._kept_moments(dtype).reshaped(self._parameter_shape)
        count = ops.cast(counter.count, dtype)
        divisor = degrees_of_freedom(count) if self.unbiased else count
        whole = union(kept._replace(count=count, m2=kept.m2 * divisor), batch)
        self._move(self.moving_mean, whole.mean, 0.0, known)
        self._move(self.moving_variance, self._variance_to_keep(whole), 0.0, known)
        self._share(counter, None, batch, known)

    def _update_renorm(self, batch: Moments, known: Tensor) -> None:
        momentum = self._share(self.moving_count, self.momentum, batch, known)
        renorm_momentum = self._share(self.renorm_count, self.renorm_momentum, batch, known)
        stddev = self._stddev(self._variance_to_keep(batch))
        self._move(self.renorm_mean, batch.mean, renorm_momentum, known)
        self._move(self.renorm_stddev, stddev, renorm_momentum, known)
        self._move(self.moving_mean, batch.mean, momentum, known)
        self._move(self.moving_stddev, stddev, momentum, known)
        variance = self._variance(native.value_of(self.moving_stddev))
        self._move(self.moving_variance, variance, 0.0, known)
        if self.step is not None:
            self._count_step(known)

    def _variance(self, stddev: Tensor) -> Tensor:
        """Return what a kept √(variance + epsilon) stands for; its initial value may be 0."""
        return native.relu(native.square(stddev) - self.epsilon)

    def _limits(self, dtype: str) -> Limits:
        """Return the limits at this step."""
        step = None if self.step is None else ops.convert_to_tensor(self.step)
        now = {
            key: ops.cast(limit(step), dtype) if isinstance(limit, LearningRateSchedule) else limit
            for key, limit in (self.renorm_clipping or {}).items()
        }
        return Limits(now.get("rmin"), now.get("rmax"), now.get("dmax"))

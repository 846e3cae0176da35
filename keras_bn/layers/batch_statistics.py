"""What batch normalization and renormalization share: statistics that are kept between steps."""

import warnings
from typing import Any

from keras import ops

from keras_bn import kernels
from keras_bn.core.affine import compose, standardize
from keras_bn.core.dtypes import statistics_dtype
from keras_bn.core.estimators import moving_average
from keras_bn.core.moments import Moments, is_known, is_static
from keras_bn.core.pooling import Pooling, reduced_axes
from keras_bn.layers.base import Normalization
from keras_bn.types import Shape, Tensor


class BatchStatistics(Normalization):
    """A layer that normalizes by the batch in training, and by moving statistics otherwise."""

    def build(self, input_shape: Shape) -> None:
        """Create gamma, beta, moving mean and moving variance."""
        super().build(input_shape)
        self.moving_mean = self._add_statistic("moving_mean", self.moving_mean_initializer)
        self.moving_variance = self._add_statistic(
            "moving_variance", self.moving_variance_initializer
        )
        self._has_warned = False

    def call(
        self, inputs: Tensor, training: bool | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return the normalized input; in training, update what is kept."""
        x, weights = self._prepared(inputs, mask)
        dtype = self._statistics_dtype(x)
        kept = self._kept_moments(dtype)
        if not (training and self.trainable):
            stored = compose(standardize(kept, self.epsilon), *self._learned(dtype))
            return kernels.apply(x, stored, self.compute_dtype)
        pooling = Pooling(reduced_axes(len(x.shape), self._kept), weights)
        y, batch = self._normalized(x, pooling, correct=self._correction, kept=kept)
        self._warn_of_one_element(batch)
        self._update(batch, is_known(batch))
        return y

    def _correction(self, batch: Moments) -> tuple[Tensor, Tensor] | None:
        """Return r and d, by which a training batch is corrected; None for 1 and 0."""
        return None

    def _update(self, batch: Moments, known: Tensor) -> None:
        """Update what is kept.

        Args:
            batch: The moments of the batch.
            known: For each, whether it may be kept: neither empty nor infinite nor NaN.
        """
        raise NotImplementedError

    def _add_statistic(self, name: str, initializer: Any) -> Any:
        return self.add_weight(
            shape=self._parameter_shape,
            name=name,
            initializer=initializer,
            dtype=statistics_dtype(self.variable_dtype),
            trainable=False,
            autocast=False,
        )

    def _add_step(self) -> Any:
        return self.add_weight(
            shape=(),
            name="step",
            initializer="zeros",
            dtype="int32",
            trainable=False,
            autocast=False,
        )

    def _kept_moments(self, dtype: str) -> Moments:
        """Return the moving statistics as the moments of one element."""
        mean, variance = (self._spread(v, dtype) for v in (self.moving_mean, self.moving_variance))
        # A copy: in PyTorch it would be a view, saved for the gradient, of what a later call moves.
        return Moments(1, ops.copy(mean), ops.zeros_like(mean), variance)

    def _stddev(self, moments: Moments) -> Tensor:
        return ops.sqrt(moments.variance + self.epsilon)

    def _move(self, variable: Any, new: Tensor, momentum: float, known: Tensor) -> None:
        """Move a kept statistic towards its new value, where that is known."""
        old = ops.convert_to_tensor(variable)
        new, known = ops.reshape(new, old.shape), ops.reshape(known, old.shape)
        moved = moving_average(old, ops.cast(new, old.dtype), momentum)
        variable.assign(ops.where(known, moved, old))

    def _count_step(self, known: Tensor) -> None:
        """Count a training step, unless nothing of it was known."""
        self.step.assign(self.step + ops.cast(ops.any(known), "int32"))

    def _warn_of_one_element(self, moments: Moments) -> None:
        if is_static(moments.count) and moments.count == 1 and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{type(self).__name__} '{self.name}' trains on one element per channel: its "
                "variance is 0 and its output is beta. Use larger batches, or GroupNormalization.",
                stacklevel=2,
            )

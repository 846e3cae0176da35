"""What batch normalization and renormalization share: statistics that are kept between steps."""

import warnings
from typing import Any

from keras import ops

from keras_bn import kernels
from keras_bn.core import pooling
from keras_bn.core.affine import Affine, standardize
from keras_bn.core.dtypes import statistics_dtype
from keras_bn.core.estimators import moving_average
from keras_bn.core.moments import Moments, is_known, is_static, or_else
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
        kept = self._kept_moments(self._statistics_dtype(x))
        if not (training and self.trainable):
            return self._applied(x, standardize(kept, self.epsilon))
        moments = kernels.moments(x, pooling.reduced_axes(len(x.shape), self._kept), weights)
        self._warn_of_one_element(moments)
        affine = self._training_map(or_else(moments, kept), is_known(moments))
        return self._applied(x, affine)

    def _training_map(self, batch: Moments, known: Tensor) -> Affine:
        """Return the map for a training batch, before gamma and beta; update what is kept.

        Args:
            batch: The moments of the batch; of an empty one, the kept ones.
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
        return Moments(1, mean, ops.zeros_like(mean), variance)

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

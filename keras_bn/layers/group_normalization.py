"""Group normalization."""

import functools
from typing import Any

from keras import ops

from keras_bn.core.pooling import Pooling, group_total, reduced_axes, split_groups
from keras_bn.layers.base import Normalization
from keras_bn.types import Shape, Tensor


class GroupNormalization(Normalization):
    """Normalize each sample over space and over groups of neighbouring channels.

    With the mean and the biased variance of a sample's group,

        y = gamma · (x - mean) / √(variance + epsilon) + beta

    in training and inference alike; gamma and beta are per channel. `groups=1` pools all channels,
    `groups=-1` each channel on its own (instance normalization).

    Pools: space, the channels of a group.
    Keeps: nothing.

    Args:
        groups: Number of groups, a divisor of the number of channels; -1 for one per channel.
        axis: The channel axis; not the batch's.
        epsilon: Added to the variance [x²].
        center: Whether to add beta.
        scale: Whether to multiply by gamma.
        beta_initializer: Initializer of beta.
        gamma_initializer: Initializer of gamma.
        beta_regularizer: Regularizer of beta.
        gamma_regularizer: Regularizer of gamma.
        beta_constraint: Constraint on beta.
        gamma_constraint: Constraint on gamma.
        **kwargs: `name`, `dtype`, `trainable`.

    Call arguments:
        inputs: Batch first, any rank from 2, the number of channels known.
        mask: Boolean, or non-negative weights: how much each position counts in the statistics.
            Broadcastable to the input without its channel axis, or, as in Keras, of the input's
            shape without its last axis. What lies under a 0 does not matter, NaN included.

    Shapes:
        Input and output the same. gamma and beta: (channels,).

    Raises:
        ValueError: An option out of range; in `build`, an axis that the input lacks, an unknown
            number of channels, or one that the groups do not divide; in the call, a mask that
            does not fit.
        TypeError: An option of the wrong kind.

    Example:
        >>> import numpy as np, keras, keras_bn
        >>> x = np.arange(8, dtype="float32").reshape(1, 2, 4)  # 2 positions, 4 channels
        >>> y = keras_bn.GroupNormalization(groups=2, epsilon=1e-3)(x)
        >>> group = x[..., :2]
        >>> expected = (group - group.mean()) / np.sqrt(group.var() + 1e-3)
        >>> np.allclose(keras.ops.convert_to_numpy(y)[..., :2], expected, atol=1e-6)
        True

    Differences:
        To Keras: masks count; `groups=-1` stays -1 in the config; the statistics are right far
        from 0. To PyTorch: `epsilon` is 1e-3, not 1e-5.

    References:
        Wu, He, "Group Normalization", 2018, https://arxiv.org/abs/1803.08494, equations 1, 2, 6, 7.
    """

    def __init__(
        self,
        groups: int = 32,
        axis: int = -1,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(locals(), **kwargs)
        if not isinstance(self.axis, int):
            raise self._invalid("axis", "an integer", axis, kind=TypeError)

    def build(self, input_shape: Shape) -> None:
        """Create gamma and beta."""
        (channel_axis,) = self._kept_axes(input_shape)
        channels = input_shape[channel_axis]
        if channel_axis == 0:
            raise self._invalid(
                "axis", "an axis other than 0, the batch's", self.axis, input_shape=input_shape
            )
        if channels is not None and self.groups != -1 and channels % self.groups:
            raise self._invalid(
                "groups",
                "a divisor of the number of channels",
                self.groups,
                "Choose another number, or -1 for one group per channel.",
                channels=channels,
            )
        super().build(input_shape)

    def call(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the normalized input."""
        x, weights = self._prepared(inputs, mask)
        (axis,) = self._kept
        pooling = Pooling(reduced_axes(len(x.shape), (0, axis)), weights)
        if self.groups == -1:
            return self._normalized(x, pooling)
        if not pooling.axes:
            return self._normalized_without_space(x, weights)
        # The channels of an image are not split: that would cost more than all sums together.
        channels = x.shape[axis]
        together = channels // self.groups
        pooling = pooling._replace(
            total=group_total(axis, channels, self.groups), together=together, are_neighbours=True
        )
        return self._normalized(x, pooling)

    def _normalized_without_space(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """Normalize an input of rank 2, whose groups lie side by side."""
        split = functools.partial(split_groups, axis=1, groups=self.groups)
        pooling = Pooling((2,), None if weights is None else split(weights))
        y = self._normalized(split(x), pooling, split)
        return ops.reshape(y, ops.shape(x))

"""Group normalization."""

from typing import Any

from keras_bn import kernels
from keras_bn.core import pooling
from keras_bn.core.affine import standardize
from keras_bn.core.moments import Moments, merge
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

    def build(self, input_shape: Shape) -> None:
        """Create gamma and beta."""
        (channel_axis,) = self._kept_axes(input_shape)
        channels = input_shape[channel_axis]
        if channel_axis == 0:
            raise self._invalid(
                "axis", "an axis other than 0, the batch's", self.axis, input_shape=input_shape
            )
        if channels is not None and channels % self._groups_of(channels):
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
        return self._applied(x, standardize(self._moments(x, weights), self.epsilon))

    def _groups_of(self, channels: int) -> int:
        return channels if self.groups == -1 else self.groups

    def _moments(self, x: Tensor, weights: Tensor | None) -> Moments:
        """Return the moments of each sample's groups, once for each of their channels."""
        (axis,) = self._kept
        channels = x.shape[axis]
        space = pooling.reduced_axes(len(x.shape), (0, axis))
        if self.groups == -1:
            return kernels.moments(x, space, weights)
        if space:
            # Splitting the channels of an image would cost more than all sums together.
            total = pooling.group_total(axis, channels, self.groups)
            return merge(kernels.moments(x, space, weights), total)
        grouped = pooling.split_groups(x, axis, self.groups)
        if weights is not None:
            weights = pooling.split_groups(weights, axis, self.groups)
        moments = kernels.moments(grouped, (axis + 1,), weights)
        return moments.map(lambda array: pooling.join_groups(array, axis, channels))

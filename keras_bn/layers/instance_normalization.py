"""Instance normalization."""

from typing import Any

from keras_bn.core.pooling import Pooling, reduced_axes
from keras_bn.layers.base import Normalization
from keras_bn.types import Shape, Tensor


class InstanceNormalization(Normalization):
    """Normalize each channel of each sample over space.

    With the mean and the biased variance of a channel of a sample,

        y = gamma · (x - mean) / √(variance + epsilon) + beta

    in training and inference alike; gamma and beta are per channel.

    Pools: space.
    Keeps: nothing.

    Args:
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
        inputs: Batch first, any rank from 3, the number of channels known.
        mask: Boolean, or non-negative weights: how much each position counts in the statistics.
            Broadcastable to the input without its channel axis, or, as in Keras, of the input's
            shape without its last axis. What lies under a 0 does not matter, NaN included.

    Shapes:
        Input and output the same. gamma and beta: (channels,).

    Raises:
        ValueError: An option out of range; in `build`, an axis that the input lacks, an input
            without space, or an unknown number of channels; in the call, a mask that does not fit.
        TypeError: An option of the wrong kind.

    Example:
        >>> import numpy as np, keras, keras_bn
        >>> x = np.arange(12, dtype="float32").reshape(2, 3, 2)  # 3 positions, 2 channels
        >>> y = keras_bn.InstanceNormalization(epsilon=1e-3)(x)
        >>> mean, variance = x.mean(1, keepdims=True), x.var(1, keepdims=True)
        >>> expected = (x - mean) / np.sqrt(variance + 1e-3)
        >>> np.allclose(keras.ops.convert_to_numpy(y), expected, atol=1e-6)
        True

    Differences:
        To Keras: it has none of this name; `GroupNormalization(groups=-1)` is the same. To
        PyTorch: `epsilon` is 1e-3, not 1e-5; gamma and beta are there by default; nothing is kept.

    References:
        Ulyanov, Vedaldi, Lempitsky, "Instance Normalization: The Missing Ingredient for Fast
        Stylization", 2016, https://arxiv.org/abs/1607.08022, equation 7.
    """

    def __init__(
        self,
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
        (axis,) = self._kept_axes(input_shape)
        if axis == 0:
            raise self._invalid(
                "axis", "an axis other than 0, the batch's", self.axis, input_shape=input_shape
            )
        if len(input_shape) < 3:
            raise self._invalid(
                "input_shape",
                "of rank 3 or more, as there must be space to pool",
                input_shape,
                "Use LayerNormalization for vectors.",
            )
        super().build(input_shape)

    def call(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the normalized input."""
        x, weights = self._prepared(inputs, mask)
        pooling = Pooling(reduced_axes(len(x.shape), (0, *self._kept)), weights)
        return self._normalized(x, pooling)

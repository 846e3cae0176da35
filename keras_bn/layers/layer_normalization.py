"""Layer normalization, and root mean square normalization."""

from collections.abc import Iterable
from typing import Any, ClassVar

from keras_bn.core.pooling import Pooling
from keras_bn.layers.base import Normalization
from keras_bn.types import Tensor


class LayerNormalization(Normalization):
    """Normalize each position of each sample over its features.

    With the mean and the biased variance over the normalized axes of one position,

        y = gamma · (x - mean) / √(variance + epsilon) + beta

    in training and inference alike; gamma and beta have the shape of the normalized axes.

    Pools: the normalized axes of one position.
    Keeps: nothing.

    Args:
        axis: The normalized axis, or several; they need not be the last.
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
        inputs: Any rank from 2, the sizes of the normalized axes known.
        mask: Handed on; it changes nothing, since no position sees another.

    Shapes:
        Input and output the same. gamma and beta: the sizes of the normalized axes.

    Raises:
        ValueError: An option out of range; in `build`, an axis that the input lacks, or whose
            size is unknown.
        TypeError: An option of the wrong kind.

    Example:
        >>> import numpy as np, keras, keras_bn
        >>> x = np.arange(12, dtype="float32").reshape(2, 6)
        >>> y = keras_bn.LayerNormalization(epsilon=1e-3)(x)
        >>> mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        >>> expected = (x - mean) / np.sqrt(variance + 1e-3)
        >>> np.allclose(keras.ops.convert_to_numpy(y), expected, atol=1e-6)
        True

    Differences:
        To Keras: right far from 0; `axis` stays in the config as it was given; no `rms_scaling`
        (use `RMSNormalization`). To PyTorch: `epsilon` is 1e-3, not 1e-5.

    References:
        Ba, Kiros, Hinton, "Layer Normalization", 2016, https://arxiv.org/abs/1607.06450,
        equations 3 and 4.
    """

    # Keras 3 writes it; True is deprecated there and not what its name says.
    _legacy_options: ClassVar[dict[str, tuple[Any, ...]]] = {"rms_scaling": (False,)}

    def __init__(
        self,
        axis: int | Iterable[int] = -1,
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

    def call(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the normalized input."""
        x, _ = self._prepared(inputs, None)
        return self._normalized(x, Pooling(self._kept))


class RMSNormalization(Normalization):
    """Divide each position of each sample by the root mean square of its features.

    With sums over the n features of the normalized axes of one position,

        y = scale · x / √(Σ x² / n + epsilon)

    in training and inference alike: layer normalization whose mean is held at 0. `scale` has the
    shape of the normalized axes and starts at 1.

    Pools: the normalized axes of one position.
    Keeps: nothing.

    Args:
        axis: The normalized axis, or several; they need not be the last.
        epsilon: Added to the mean square [x²].
        **kwargs: `name`, `dtype`, `trainable`.

    Call arguments:
        x: Any rank from 2, the sizes of the normalized axes known.
        mask: Handed on; it changes nothing, since no position sees another.

    Shapes:
        Input and output the same. scale: the sizes of the normalized axes.

    Raises:
        ValueError: An option out of range; in `build`, an axis that the input lacks, or whose
            size is unknown.
        TypeError: An option of the wrong kind.

    Example:
        >>> import numpy as np, keras, keras_bn
        >>> x = np.arange(12, dtype="float32").reshape(2, 6)
        >>> y = keras_bn.RMSNormalization()(x)
        >>> expected = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6)
        >>> np.allclose(keras.ops.convert_to_numpy(y), expected, atol=1e-6)
        True

    Differences:
        To Keras: squares are summed in float32 at least under every dtype policy; `axis` stays in
        the config as it was given. To PyTorch: `epsilon` is 1e-6, not the dtype's.

    References:
        Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019,
        https://arxiv.org/abs/1910.07467, equation 4.
    """

    def __init__(
        self, axis: int | Iterable[int] = -1, epsilon: float = 1e-6, **kwargs: Any
    ) -> None:
        super().__init__(locals(), **kwargs)

    def _add_parameters(self) -> None:
        self.scale = self.gamma = self.add_weight(
            shape=self._parameter_shape, name="scale", initializer="ones", autocast=False
        )

    def call(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the input, divided by its root mean square."""
        x, _ = self._prepared(x, None)
        return self._normalized(x, Pooling(self._kept, is_centered=False))

"""Fixup: the scalars and the initializer that let residual networks do without normalization."""

from typing import Any

import keras
from keras import ops

from keras_bn import kernels
from keras_bn.core.affine import Affine, compose
from keras_bn.layers.base import Configured
from keras_bn.layers.options import checked
from keras_bn.types import Shape, Tensor


class Scalar(Configured):
    """A layer that learns one number, by which it scales its input or which it adds to it."""

    gamma: Any = None
    beta: Any = None

    def call(self, inputs: Tensor) -> Tensor:
        """Return the input times gamma plus beta."""
        x = self._summable(inputs)
        shape, dtype = (1,) * len(x.shape), self._statistics_dtype(x)
        zero = ops.zeros(shape, dtype)
        learned = (
            None if value is None else ops.reshape(ops.cast(value, dtype), shape)
            for value in (self.gamma, self.beta)
        )
        # By the kernel: its sums over the whole tensor are the gradient of a scalar.
        affine = compose(Affine(zero, ops.ones(shape, dtype), zero), *learned)
        return kernels.apply(x, affine, self.compute_dtype)


class FixupBias(Scalar):
    """Add one learned number to the whole input.

    y = x + beta

    Fixup puts it before each convolution, dense layer and activation of a residual network, the
    classification layer included; `FixupBranch` does so within a branch.

    Args:
        beta_initializer: Initializer of beta.
        beta_regularizer: Regularizer of beta.
        beta_constraint: Constraint on beta.
        **kwargs: `name`, `dtype`, `trainable`.

    Call arguments:
        inputs: Any rank from 1. A mask passes on.

    Shapes:
        Input and output the same. beta: ().

    Raises:
        TypeError: An option of the wrong kind.

    Example:
        >>> import numpy as np, keras, keras_bn
        >>> x = np.array([[1.0, -2.0]], "float32")
        >>> y = keras_bn.FixupBias(beta_initializer=keras.initializers.Constant(0.5))(x)
        >>> np.allclose(keras.ops.convert_to_numpy(y), x + 0.5, atol=1e-6)
        True

    Differences:
        To the `bias` of Keras' layers: one number for all channels, added before the layer.

    References:
        Zhang, Dauphin, Ma, "Fixup Initialization: Residual Learning Without Normalization", 2019,
        https://arxiv.org/abs/1901.09321, section 3, rule 3.
    """

    def __init__(
        self,
        beta_initializer: Any = "zeros",
        beta_regularizer: Any = None,
        beta_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(locals(), **kwargs)

    def build(self, input_shape: Shape) -> None:
        """Create beta."""
        self.beta = self._add_parameter("beta")


class FixupScale(Scalar):
    """Multiply the whole input by one learned number.

    y = gamma · x

    Fixup puts it at the end of each residual branch; `FixupBranch` does so.

    Args:
        gamma_initializer: Initializer of gamma.
        gamma_regularizer: Regularizer of gamma.
        gamma_constraint: Constraint on gamma.
        **kwargs: `name`, `dtype`, `trainable`.

    Call arguments:
        inputs: Any rank from 1. A mask passes on.

    Shapes:
        Input and output the same. gamma: ().

    Raises:
        TypeError: An option of the wrong kind.

    Example:
        >>> import numpy as np, keras, keras_bn
        >>> x = np.array([[1.0, -2.0]], "float32")
        >>> y = keras_bn.FixupScale(gamma_initializer=keras.initializers.Constant(0.5))(x)
        >>> np.allclose(keras.ops.convert_to_numpy(y), 0.5 * x, atol=1e-6)
        True

    Differences:
        To `keras.layers.Rescaling`: the factor is learned.

    References:
        Zhang, Dauphin, Ma, "Fixup Initialization: Residual Learning Without Normalization", 2019,
        https://arxiv.org/abs/1901.09321, section 3, rule 3.
    """

    def __init__(
        self,
        gamma_initializer: Any = "ones",
        gamma_regularizer: Any = None,
        gamma_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(locals(), **kwargs)

    def build(self, input_shape: Shape) -> None:
        """Create gamma."""
        self.gamma = self._add_parameter("gamma")


@keras.saving.register_keras_serializable("keras_bn")
class FixupInitializer(keras.initializers.VarianceScaling):
    """Draw weights of a residual branch: He's initialization, smaller the deeper the network is.

    A truncated normal distribution of mean 0 and

        standard deviation = √(2 / fan_in) · depth^(-1 / (2·branch_layers - 2))

    It is for all layers of a branch but the last, which starts at 0; so a step of gradient descent
    changes the output of the network by as much at any depth. `FixupBranch` applies both rules.

    Args:
        depth: Number of residual branches in the network.
        branch_layers: Number of layers with a kernel in each branch, at least 2: the only layer of
            a branch is also its last one and starts at 0.
        seed: An integer, for the same values each time; a `keras.random.SeedGenerator`; or None,
            which draws a seed once, when the initializer is made.

    Call arguments:
        shape: Of the kernel: (..., inputs, outputs).
        dtype: Of the kernel; None for Keras' default.

    Shapes:
        The output has the shape that is asked for.

    Raises:
        ValueError: `depth` below 1 or `branch_layers` below 2.
        TypeError: `depth` or `branch_layers` is no integer.

    Example:
        >>> import numpy as np, keras, keras_bn
        >>> initializer = keras_bn.FixupInitializer(depth=54, branch_layers=2, seed=0)
        >>> kernel = keras.ops.convert_to_numpy(initializer((3, 3, 64, 64)))
        >>> np.allclose(kernel.std(), np.sqrt(2 / (3 * 3 * 64)) * 54**-0.5, rtol=0.02)
        True

    Differences:
        To `keras.initializers.HeNormal`: the factor that depends on `depth`. To the authors' code:
        `fan_in`, not `fan_out`; truncated at two standard deviations, as in Keras.

    References:
        Zhang, Dauphin, Ma, "Fixup Initialization: Residual Learning Without Normalization", 2019,
        https://arxiv.org/abs/1901.09321, section 3, rule 2.
        He, Zhang, Ren, Sun, "Delving Deep into Rectifiers: Surpassing Human-Level Performance on
        ImageNet Classification", 2015, https://arxiv.org/abs/1502.01852, equation 10.
    """

    def __init__(self, depth: int, branch_layers: int, seed: Any = None) -> None:
        self.depth = checked("FixupInitializer", "depth", depth)
        self.branch_layers = checked("FixupInitializer", "branch_layers", branch_layers)
        # VarianceScaling takes the variance, which is the square.
        scale = 2.0 * self.depth ** (-1.0 / (self.branch_layers - 1))
        super().__init__(scale, mode="fan_in", distribution="truncated_normal", seed=seed)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        seed = super().get_config()["seed"]
        return {"depth": self.depth, "branch_layers": self.branch_layers, "seed": seed}

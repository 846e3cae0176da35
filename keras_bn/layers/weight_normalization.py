"""Weight normalization."""

from typing import Any

import keras
from keras import ops

from keras_bn import kernels
from keras_bn.core.dtypes import UNIT_ROUNDOFF, statistics_dtype
from keras_bn.core.moments import Moments, is_known
from keras_bn.core.pooling import mask_weights, reduced_axes
from keras_bn.layers.options import checked
from keras_bn.layers.wrapped import Kernel, channel_axes, has_bias_per_channel, kernels_of
from keras_bn.layers.wrapper import Wrapper
from keras_bn.types import Shape, Tensor


@keras.saving.register_keras_serializable("keras_bn")
class WeightNormalization(Wrapper):
    r"""Give the kernel of a layer a length and a direction of their own.

    The layer inside computes as ever, with

        kernel = g · v / |v|

    where v is its own kernel variable, which nothing but the optimizer changes, and |v| the
    Euclidean norm of what makes one output. g is learned; it starts as |v|, so the wrapped layer
    starts as the plain one. With `data_init` the first training batch (the first that is finite
    and not empty) says where g and the bias start: with its mean μ and standard deviation σ of
    each output channel before the activation,

        g ← g / σ,  bias ← (bias - μ) / σ

    which gives outputs of mean 0 and variance 1, on that very batch, before the first gradient.
    A channel that is constant in that batch is centered only.

    Pools: all axes of the kernel but the output's. `Dense` and `Conv`: all but the last;
        transposed convolutions: all but the last but one; depthwise ones: space, so each pair of
        channel and multiplier has its g; separable ones: both kernels, each in its way;
        `EinsumDense`: the kernel's axes that the output lacks; `Embedding`: the row of a token,
        which is the output for it, so a token's length and direction are its own, and tokens that
        a batch lacks have no gradient. Each call normalizes the whole table.
    Keeps: nothing; with `data_init` where g and the bias start, and whether that is settled. g
        and the bias variable then hold what training adds (g begins at 0), because a compiled
        step of JAX cannot set what it trains. Several replicas would each start from their own
        part of the batch: let one of them see a batch first.

    Regularizers and constraints of the layer inside apply to the variables they were given for:
    those of the kernel to v, not to g · v / |v|. Norm and division are computed in float32 at
    least. Where v is 0 it has no direction: the kernel is 0 there, and so is g to begin with, so
    nothing of it learns. Do not initialize v with zeros.

    Args:
        layer: `Dense`, `EinsumDense`, `Embedding`, a convolution (transposed, depthwise and
            separable ones included), or of a class derived from one. It may be built, with weights
            that are kept, but in no model yet. Its dtype policy is that of the wrapper.
        data_init: Whether the first training batch sets where g and the bias start. Needs a bias
            for each output channel.
        **kwargs: `name`, `trainable` (default: the layer's).

    Call arguments:
        inputs: As for the layer inside.
        training: Whether the batch may be the first of `data_init`.
        mask: Boolean, or non-negative weights: how much each position of the output counts in
            `data_init`. What lies under a 0 does not matter, NaN included.

    Shapes:
        Input and output as for the layer inside. g: the axes of the kernel that are not pooled.

    Raises:
        ValueError: A layer without a kernel, or one that is quantized, has LoRA weights, is in a
            model or wrapped already; `data_init` without a bias for each output channel; a
            `dtype`; in the call, a mask that does not fit.
        TypeError: An argument of the wrong kind.

    Example:
        >>> import numpy as np, keras, keras_bn
        >>> x = np.array([[1.0, 2.0], [3.0, 5.0]], "float32")
        >>> layer = keras_bn.WeightNormalization(keras.layers.Dense(3))
        >>> layer.build(x.shape)
        >>> g, v = np.array([1.0, 2.0, 3.0]), np.array([[3.0, 0.0, 1.0], [4.0, 2.0, 1.0]])
        >>> layer.set_weights([g, v, np.zeros(3)])  # the last is the bias
        >>> expected = x @ (g * v / np.sqrt((v**2).sum(axis=0)))
        >>> np.allclose(keras.ops.convert_to_numpy(layer(x)), expected, atol=1e-5)
        True

    Differences:
        To `torch.nn.utils.parametrizations.weight_norm`: the output's axes follow from the layer;
        v = 0 gives 0, not NaN; and there is `data_init`.

    References:
        Salimans, Kingma, "Weight Normalization: A Simple Reparameterization to Accelerate Training
        of Deep Neural Networks", 2016, https://arxiv.org/abs/1602.07868, equations 2, 3, 5 and 6.
    """

    def __init__(self, layer: Any, *, data_init: bool = False, **kwargs: Any) -> None:
        name = type(self).__name__
        inside = kernels_of(name, layer)
        data_init = checked(name, "data_init", data_init)
        if data_init and not has_bias_per_channel(layer):
            raise self._invalid(
                "layer",
                "one with a bias for each output channel, which `data_init` sets",
                layer,
                "Give it a bias, or leave `data_init` out.",
                data_init=data_init,
            )
        super().__init__(layer, **kwargs)
        self._kernels = inside
        self.data_init = data_init

    def get_config(self) -> dict[str, Any]:
        """Return the options."""
        return super().get_config() | {"data_init": self.data_init}

    def build(self, input_shape: Shape) -> None:
        """Build the layer inside, unless it is; create g, and what `data_init` keeps."""
        super().build(input_shape)
        for kernel in self._kernels[:-1]:
            self._add_length(kernel.length, kernel)
        last = self._kernels[-1]
        if not self.data_init:
            self._add_length(last.length, last)
            return
        wide = {"dtype": statistics_dtype(self.variable_dtype), "trainable": False}
        self._add_length(last.length, last, initializer="zeros")
        self._add_length("g_start", last, **wide)
        self._add("bias_start", self._variable("bias").shape, **wide)
        self._add("initialized", (), dtype="bool", trainable=False)

    def call(
        self, inputs: Tensor, training: bool | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return the output of the layer inside, computed with the normalized kernel."""
        if self.data_init and training and self.trainable:
            self._initialize(inputs, mask)
        return self._output(inputs)

    def _add_length(self, name: str, kernel: Kernel, **options: Any) -> None:
        """Create a weight for the lengths of a kernel, by default with those it has now."""
        v, kept = self._variable(kernel.name), self._kept(kernel)

        def lengths(_: Shape, dtype: str | None = None) -> Tensor:
            return ops.cast(kernels.length(ops.convert_to_tensor(v), kept), dtype)

        shape = tuple(v.shape[axis] for axis in kept)
        self._add(name, shape, **({"initializer": lengths} | options))

    def _add(self, name: str, shape: Shape, **options: Any) -> None:
        """Create a weight and keep it under its name."""
        own = {"shape": shape, "name": name, "initializer": "zeros", "autocast": False}
        setattr(self, name, self.add_weight(**(own | options)))

    def _kept(self, kernel: Kernel) -> tuple[int, ...]:
        """Return the kept axes of a kernel, counted from 0."""
        rank = len(self._variable(kernel.name).shape)
        return tuple(axis % rank for axis in kernel.kept)

    def _replaced(self) -> dict[str, Tensor]:
        """Return the normalized kernels, and the bias of `data_init`."""
        values = {}
        for kernel in self._kernels:
            v = ops.convert_to_tensor(self._variable(kernel.name))
            values[kernel.name] = kernels.with_length(v, self._length(kernel), self._kept(kernel))
        if self.data_init:
            values["bias"] = self._sum(self._variable("bias"), self.bias_start)
        return values

    def _length(self, kernel: Kernel) -> Tensor:
        g = getattr(self, kernel.length)
        is_started = self.data_init and kernel.name == self._kernels[-1].name
        return self._sum(g, self.g_start) if is_started else ops.convert_to_tensor(g)

    def _sum(self, trained: Any, start: Any) -> Tensor:
        return ops.cast(trained, start.dtype) + start

    # Data-dependent initialization.

    def _initialize(self, inputs: Tensor, mask: Tensor | None) -> None:
        """Set where g and the bias start, unless an earlier batch has."""
        state = (self.initialized, self.g_start, self.bias_start)
        old = [ops.copy(variable) for variable in state]
        new = ops.cond(old[0], lambda: old, lambda: self._started(old, inputs, mask))
        for variable, value in zip(state, new, strict=True):
            variable.assign(value)

    def _started(self, old: list[Tensor], inputs: Tensor, mask: Tensor | None) -> list[Tensor]:
        """Return the state after this batch, with which its outputs have mean 0, variance 1."""
        y = self._before_activation(inputs)
        channels = channel_axes(self.layer, len(y.shape))
        pooled = reduced_axes(len(y.shape), channels)
        batch = kernels.moments(y, pooled, self._weights(mask, y, channels))
        known, stddev = ops.all(is_known(batch)), self._stddev(batch)
        # g has the order of the kernel's axes, the bias that of the output's.
        of_g = ops.reshape(ops.transpose(stddev, (*channels, *pooled)), self.g_start.shape)
        mean, of_bias = (ops.reshape(part, self.bias_start.shape) for part in (batch.mean, stddev))
        last, bias = self._kernels[-1], self._variable("bias")
        g = self._length(last) / of_g - getattr(self, last.length)
        bias = (self._sum(bias, self.bias_start) - mean) / of_bias - bias
        new = (ops.stop_gradient(ops.where(known, *pair)) for pair in ((g, old[1]), (bias, old[2])))
        return [known, *new]

    def _stddev(self, batch: Moments) -> Tensor:
        """Return the standard deviation; 1 for a constant channel, which is left as long as it is.

        What rounding makes of a constant must not be blown up.
        """
        stddev = ops.sqrt(batch.variance)
        noise = 8 * UNIT_ROUNDOFF[self.layer.compute_dtype] * ops.abs(batch.mean)
        return ops.where(stddev > noise, stddev, ops.ones_like(stddev))

    def _weights(self, mask: Tensor | None, y: Tensor, channels: tuple[int, ...]) -> Tensor | None:
        """Return the mask as the weights of the elements of an output."""
        if mask is None:
            return None
        mask = ops.convert_to_tensor(mask)
        weights = mask_weights(mask, tuple(y.shape), channels)
        if weights is None:
            raise self._invalid(
                "mask.shape",
                "broadcastable to the output without its channel axes, or to all its axes but "
                "the last",
                tuple(mask.shape),
                output_shape=tuple(y.shape),
            )
        return ops.cast(weights, statistics_dtype(keras.backend.standardize_dtype(y.dtype)))

"""A residual branch of a network that does without normalization."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_bn.errors import invalid
from keras_bn.layers.base import Configured
from keras_bn.layers.fixup import FixupBias, FixupInitializer, FixupScale
from keras_bn.layers.options import checked
from keras_bn.types import Shape, Tensor

_ACTIVATIONS = tuple(
    getattr(keras.layers, name)
    for name in ("Activation", "ELU", "LeakyReLU", "PReLU", "ReLU", "Softmax")
)

# In the config of a layer, these speak of kernels that `kernel_initializer` does not reach.
_OUT_OF_REACH = {
    "depthwise_initializer",
    "embeddings_initializer",
    "layer",
    "layers",
    "recurrent_initializer",
}


class FixupBranch(Configured):
    """Add a residual branch to its shortcut, so initialized that it needs no normalization.

    With the layers f_1, ..., f_n of the branch,

        y = shortcut + gamma · f_n(... f_2(f_1(x + beta_1) + beta_2) ... + beta_n) + beta

    A scalar bias stands before each layer with a kernel and before each activation, a scalar factor
    and one more bias at the end. The last kernel starts at 0; so does the bias of its layer. The
    kernels before it are drawn by `FixupInitializer`.

    In a network of such branches put a `FixupBias` before each layer outside of them, and let the
    classification layer start at 0: `Dense(10, kernel_initializer="zeros")`.

    Args:
        layers: The layers of the branch, not built. Each is copied, with its kernel's initializer
            replaced, so the list may serve again. An activation within a layer is split off. No
            normalization is needed, and no bias: `use_bias=False`.
        depth: Number of residual branches in the network.
        shortcut: A layer from the branch's input, first bias added, to the shape of its output;
            None for the input itself.
        **kwargs: `name`, `dtype`, `trainable`.

    Call arguments:
        inputs: What the first of the layers takes. A mask passes on if the shortcut lets it.

    Shapes:
        Output: that of the last of the layers, which must be that of the shortcut. gamma and all
        beta: ().

    Raises:
        ValueError: `depth` below 1; layers that are built, none with a kernel, one with a kernel
            out of reach (depthwise, recurrent, embeddings, layers within layers), or an activation
            after the last kernel; in `build`, another shape than the shortcut's.
        TypeError: An option of the wrong kind.

    Example:
        >>> import numpy as np, keras, keras_bn
        >>> x = np.array([[1.0, -2.0]], "float32")
        >>> hidden = keras.layers.Dense(8, activation="relu", use_bias=False)
        >>> last = keras.layers.Dense(2, use_bias=False)
        >>> branch = keras_bn.FixupBranch([hidden, last], depth=54)
        >>> bool(keras.ops.all(branch(x) == x))  # the last kernel is 0
        True
        >>> branch.layers[-1].set_weights([np.ones((8, 2))])
        >>> (kernel,) = branch.layers[0].get_weights()
        >>> expected = x + np.maximum(x @ kernel, 0).sum()
        >>> np.allclose(keras.ops.convert_to_numpy(branch(x)), expected, atol=1e-5)
        True

    Differences:
        To the authors' code: the activation after the addition is the user's; the scalars learn as
        fast as the kernels, not at a tenth of their rate, so SGD may need a smaller rate for all.

    References:
        Zhang, Dauphin, Ma, "Fixup Initialization: Residual Learning Without Normalization", 2019,
        https://arxiv.org/abs/1901.09321, section 3, rules 1 to 3, and figure 1.
    """

    def __init__(
        self,
        layers: Sequence[keras.layers.Layer],
        depth: int,
        *,
        shortcut: keras.layers.Layer | None = None,
        **kwargs: Any,
    ) -> None:
        depth = checked("FixupBranch", "depth", depth)
        layers = _initialized(checked("FixupBranch", "layers", layers), depth)
        super().__init__(locals(), **kwargs)
        self.branch = self._with_scalars()

    def build(self, input_shape: Shape) -> None:
        """Build all layers, after a look at their shapes."""
        self.compute_output_shape(input_shape)
        shape = input_shape
        for layer in self.branch:
            layer.build(shape)
            shape = layer.compute_output_shape(shape)
        if self.shortcut is not None and not self.shortcut.built:
            self.shortcut.build(input_shape)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Return the shape of the branch's output and of the shortcut's."""
        shape = input_shape
        for layer in self.branch:
            shape = tuple(layer.compute_output_shape(shape))
        wanted = input_shape
        if self.shortcut is not None:
            wanted = tuple(self.shortcut.compute_output_shape(input_shape))
        if not _match(shape, wanted):
            raise self._invalid(
                "layers",
                "layers whose output has the shape of the shortcut",
                _names(self.layers),
                "Give `shortcut` a layer with that output.",
                output_shape=shape,
                shortcut_shape=wanted,
            )
        return shape

    def compute_mask(self, inputs: Tensor, previous_mask: Tensor | None) -> Tensor | None:
        """Return the mask as the shortcut passes it on."""
        if self.shortcut is None or previous_mask is None:
            return previous_mask
        passes = self.shortcut.supports_masking
        return self.shortcut.compute_mask(inputs, previous_mask) if passes else None

    def call(self, inputs: Tensor) -> Tensor:
        """Return the sum of shortcut and branch."""
        first, *others = self.branch
        y = biased = first(inputs)
        for layer in others:
            y = layer(y)
        x = inputs if self.shortcut is None else self.shortcut(biased)
        return ops.cast(ops.add(x, y), self.compute_dtype)

    def _with_scalars(self) -> list[keras.layers.Layer]:
        """Return the layers with a bias where one belongs, a factor and a bias at the end."""
        policy = self.dtype_policy
        branch: list[keras.layers.Layer] = []
        for layer in self.layers:
            if not branch or _has_kernel(layer) or isinstance(layer, _ACTIVATIONS):
                branch.append(FixupBias(dtype=policy))
            branch.append(layer)
        return [*branch, FixupScale(dtype=policy), FixupBias(dtype=policy)]


def _match(shape: Shape, other: Shape) -> bool:
    """Say whether two shapes are the same where both are known."""
    pairs = zip(shape, other, strict=False)
    return len(shape) == len(other) and all(None in pair or pair[0] == pair[1] for pair in pairs)


def _initialized(
    layers: tuple[keras.layers.Layer, ...], depth: int
) -> tuple[keras.layers.Layer, ...]:
    """Return copies of the layers as they start: the last kernel at 0, those before it small."""
    parts = [part for layer in layers for part in _split(layer)]
    kernels = [part for part in parts if _has_kernel(part)]
    fault = _fault(layers, parts)
    if fault is not None:
        expected, advice = fault
        raise invalid("FixupBranch", "layers", expected, _names(layers), advice)
    return tuple(_started(part, kernels, depth) for part in parts)


def _fault(
    layers: tuple[keras.layers.Layer, ...], parts: list[keras.layers.Layer]
) -> tuple[str, str] | None:
    """Return what the layers must be but are not, and what to do; None if they will do."""
    if any(layer.built and layer.weights for layer in layers):
        return "layers that are not built", "The branch initializes new weights."
    if any(_OUT_OF_REACH & set(layer.get_config()) for layer in layers):
        return (
            "layers with one kernel each, or none",
            "Name the layers one by one; depthwise and recurrent layers cannot be used.",
        )
    kinds = [part for part in parts if _has_kernel(part) or isinstance(part, _ACTIVATIONS)]
    if not any(map(_has_kernel, kinds)):
        return "layers of which one has a kernel", "Add a Dense or a convolution."
    if not _has_kernel(kinds[-1]):
        return (
            "layers without an activation after the last kernel",
            "It would see nothing but 0, where relu has no gradient. Put it after the branch.",
        )
    return None


def _started(
    layer: keras.layers.Layer, kernels: list[keras.layers.Layer], depth: int
) -> keras.layers.Layer:
    """Return a copy of a layer of the branch with the initializers by which Fixup starts it."""
    if not _has_kernel(layer):
        return _copied(layer)
    if layer is not kernels[-1]:
        return _copied(layer, kernel_initializer=FixupInitializer(depth, len(kernels)))
    names = {"kernel_initializer", "bias_initializer"} & set(layer.get_config())
    return _copied(layer, **dict.fromkeys(names, "zeros"))


def _split(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Return a copy of a layer without its activation, and that if it has one."""
    activation = getattr(layer, "activation", None)
    if not _has_kernel(layer) or activation in (None, keras.activations.linear):
        return [_copied(layer)]
    after = keras.layers.Activation(activation, dtype=layer.dtype_policy)
    return [_copied(layer, activation="linear"), after]


def _copied(layer: keras.layers.Layer, **changes: Any) -> keras.layers.Layer:
    return type(layer).from_config({**layer.get_config(), **changes})


def _has_kernel(layer: keras.layers.Layer) -> bool:
    return "kernel_initializer" in layer.get_config()


def _names(layers: tuple[keras.layers.Layer, ...]) -> list[str]:
    return [type(layer).__name__ for layer in layers]

"""What `WeightNormalization` wraps, with each layer's formula in NumPy float64."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import layers

from keras_bn import WeightNormalization
from keras_bn.kernels import reference
from tests.cases import draw
from tests.oracle import Arrays, Expected

TOKENS = np.array([[0, 2, 1], [4, 2, 2]])


class Lookup(keras.layers.Layer):
    """Multiplies the rows of some tokens by the input, which a gradient needs."""

    def __init__(self, wrapper: keras.layers.Layer) -> None:
        super().__init__(dtype=wrapper.layer.dtype_policy)
        self.tokens = keras.ops.convert_to_tensor(TOKENS)
        self.wrapper = wrapper

    def build(self, _: Any) -> None:
        if not self.wrapper.built:
            self.wrapper.build(TOKENS.shape)

    def call(self, x: Any) -> Any:
        return x * self.wrapper(self.tokens)


@dataclass(frozen=True)
class Inside:
    """A layer to be wrapped, the shape of its input, and its formula without the bias.

    `pooled` has for each kernel the axes over which its norm is taken, `kernels` the names.
    """

    name: str
    layer: type[keras.layers.Layer]
    options: dict[str, Any]
    shape: tuple[int, ...]
    formula: Callable[..., np.ndarray]
    pooled: tuple[tuple[int, ...], ...]
    kernels: dict[str, str] = field(default_factory=lambda: {"kernel": "g"})

    def make(self, *, data_init: bool = False, **more: Any) -> WeightNormalization:
        """Return the wrapper, not built."""
        return WeightNormalization(self.layer(**self.options | more), data_init=data_init)

    def built(self, **more: Any) -> WeightNormalization:
        """Return the wrapper with weights as after some training."""
        wrapper = self.make(**more)
        wrapper.build(self.shape)
        return trained(wrapper)

    def callable(self, wrapper: WeightNormalization) -> keras.layers.Layer:
        """Return the layer that takes what `x` gives."""
        if self.layer is not layers.Embedding:
            return wrapper
        lookup = Lookup(wrapper)
        lookup.build(self.shape)
        return lookup

    def x(self, seed: int = 0) -> np.ndarray:
        return draw(self.shape, seed)

    def normalized(self, weights: Arrays) -> list[np.ndarray]:
        """Return the kernels g·v / |v|."""
        return [
            reference.weight_normalize(weights[v], np.expand_dims(weights[g], axes), axes)
            for (v, g), axes in zip(self.kernels.items(), self.pooled, strict=True)
        ]

    def expected(self, weights: Arrays, x: np.ndarray, dy: np.ndarray) -> tuple[Expected, Expected]:
        """Return what must come out, and how large the sums are of which it consists."""
        kernels = self.normalized(weights)
        bias = weights.get("bias", 0.0)
        exact = self._differentiated(kernels, np.asarray(x, "float64"), np.asarray(dy, "float64"))
        sizes = self._differentiated([np.abs(k) for k in kernels], np.abs(x), np.abs(dy))
        exact.y, sizes.y = exact.y + bias, sizes.y + np.abs(bias)
        for (v, g), axes in zip(self.kernels.items(), self.pooled, strict=True):
            length = np.expand_dims(weights[g], axes)
            dk = exact.gradients[v]
            exact.gradients[v], dg = reference.weight_gradients(weights[v], length, dk, axes)
            exact.gradients[g] = dg.reshape(weights[g].shape)
            norm = np.sqrt((weights[v] ** 2).sum(axes, keepdims=True))
            total = np.sum(sizes.gradients[v] * np.abs(weights[v]) / norm, axes, keepdims=True)
            largest = np.max(sizes.gradients[v], axes, keepdims=True)
            sizes.gradients[v] = np.abs(length) / norm * (largest + total)
            sizes.gradients[g] = total
        if "bias" in weights:
            for part, sum_of in ((exact, dy), (sizes, np.abs(dy))):
                part.gradients["bias"] = _sum_to(sum_of, weights["bias"].shape)
        return exact, sizes

    def started(self, weights: Arrays, x: np.ndarray) -> Arrays:
        """Return g and bias after the first batch, which makes outputs of mean 0, variance 1."""
        g = list(self.kernels.values())[-1]
        y = self.formula(x.astype("float64"), *self.normalized(weights)) + weights["bias"]
        axes = tuple(range(y.ndim - weights["bias"].ndim))
        mean, stddev = y.mean(axes), y.std(axes)
        turned = stddev.T if self.name == "einsum-other-order" else stddev
        return {
            g: weights[g] / turned.reshape(weights[g].shape),
            "bias": (weights["bias"] - mean) / stddev,
        }

    def _differentiated(self, kernels: list[np.ndarray], x: np.ndarray, dy: np.ndarray) -> Expected:
        """Differentiate the formula, which is linear in x and in each kernel."""
        gradients = {}
        for i, name in enumerate(self.kernels):
            of_kernel = functools.partial(self._with_kernel, x, kernels, i)
            gradients[name] = _transposed(of_kernel, kernels[i].shape, dy)
        dx = _transposed(lambda part: self.formula(part, *kernels), x.shape, dy)
        return Expected(self.formula(x, *kernels), dx, gradients)

    def _with_kernel(self, x, kernels, i, kernel):
        return self.formula(x, *kernels[:i], kernel, *kernels[i + 1 :])


def trained(wrapper: WeightNormalization, seed: int = 0) -> WeightNormalization:
    """Give a wrapper normal weights; g stays away from 0."""
    rng = np.random.default_rng(seed)
    for variable in wrapper.trainable_variables:
        value = rng.normal(size=variable.shape)
        is_length = variable.name.endswith("g")
        variable.assign((np.sign(value) * rng.uniform(0.5, 2, value.shape)) if is_length else value)
    return wrapper


def _transposed(linear, shape, dy):
    """Return the gradient of Σ dy·linear(a) to a of this shape."""
    basis = np.eye(int(np.prod(shape))).reshape(-1, *shape)
    return np.array([np.sum(dy * linear(part)) for part in basis]).reshape(shape)


def _sum_to(array, shape):
    """Sum over the axes along which an array of this shape is repeated."""
    spread = (1,) * (array.ndim - len(shape)) + shape
    axes = tuple(axis for axis, size in enumerate(spread) if size == 1)
    return array.astype("float64").sum(axes).reshape(shape)


def _window(x, start, sizes):
    return x[(slice(None), *(slice(i, i + n) for i, n in zip(start, sizes, strict=True)))]


def convolve(x, kernel):
    """Convolve, with stride 1 and no padding; each group of filters with its channels."""
    space, groups = kernel.shape[:-2], x.shape[-1] // kernel.shape[-2]
    sizes = [n - k + 1 for n, k in zip(x.shape[1:], space, strict=False)]
    parts = zip(np.split(x, groups, -1), np.split(kernel, groups, -1), strict=True)
    return np.concatenate(
        [sum(_window(a, i, sizes) @ k[i] for i in np.ndindex(space)) for a, k in parts], -1
    )


def convolve_transposed(x, kernel):
    """Spread each element over a window, with stride 1 and no padding."""
    space = kernel.shape[:-2]
    sizes = [n + k - 1 for n, k in zip(x.shape[1:], space, strict=False)]
    y = np.zeros((len(x), *sizes, kernel.shape[-2]))
    for i in np.ndindex(space):
        _window(y, i, x.shape[1:-1])[...] += x @ kernel[i].T
    return y


def convolve_depthwise(x, kernel):
    """Convolve each channel by itself, with several filters."""
    space = kernel.shape[:-2]
    sizes = [n - k + 1 for n, k in zip(x.shape[1:], space, strict=False)]
    y = sum(_window(x, i, sizes)[..., None] * kernel[i] for i in np.ndindex(space))
    return y.reshape(*y.shape[:-2], -1)


def convolve_separable(x, depthwise, pointwise):
    return convolve(convolve_depthwise(x, depthwise), pointwise)


def einsum(equation):
    return functools.partial(np.einsum, equation)


LINE, PLANE, SPACE = (3, 5, 4), (3, 4, 3, 4), (2, 3, 3, 2, 2)
BOTH = {"depthwise_kernel": "depthwise_g", "pointwise_kernel": "pointwise_g"}
SIZE = {"kernel_size": 2}
FILTERS = {"filters": 3, **SIZE}
HEADS = {"output_shape": (None, 3, 2), "bias_axes": "de"}

INSIDE = [
    Inside("dense", layers.Dense, {"units": 3}, (6, 4), np.matmul, ((0,),)),
    Inside("dense-one", layers.Dense, {"units": 1}, (6, 4), np.matmul, ((0,),)),
    Inside("dense-rank-3", layers.Dense, {"units": 3}, LINE, np.matmul, ((0,),)),
    Inside("conv-1", layers.Conv1D, FILTERS, LINE, convolve, ((0, 1),)),
    Inside("conv-2", layers.Conv2D, FILTERS, PLANE, convolve, ((0, 1, 2),)),
    Inside("conv-3", layers.Conv3D, FILTERS, SPACE, convolve, ((0, 1, 2, 3),)),
    Inside(
        "conv-groups",
        layers.Conv1D,
        {"filters": 6, "groups": 2, **SIZE},
        LINE,
        convolve,
        ((0, 1),),
    ),
    Inside(
        "transpose-1", layers.Conv1DTranspose, FILTERS, (2, 3, 4), convolve_transposed, ((0, 2),)
    ),
    Inside(
        "transpose-2",
        layers.Conv2DTranspose,
        FILTERS,
        (2, 3, 2, 4),
        convolve_transposed,
        ((0, 1, 3),),
    ),
    Inside(
        "transpose-3",
        layers.Conv3DTranspose,
        FILTERS,
        (2, 2, 3, 2, 2),
        convolve_transposed,
        ((0, 1, 2, 4),),
    ),
    Inside(
        "depthwise-1",
        layers.DepthwiseConv1D,
        {"depth_multiplier": 2, **SIZE},
        LINE,
        convolve_depthwise,
        ((0,),),
    ),
    Inside(
        "depthwise-2",
        layers.DepthwiseConv2D,
        {"depth_multiplier": 2, **SIZE},
        PLANE,
        convolve_depthwise,
        ((0, 1),),
    ),
    Inside(
        "separable-1",
        layers.SeparableConv1D,
        FILTERS,
        LINE,
        convolve_separable,
        ((0,), (0, 1)),
        BOTH,
    ),
    Inside(
        "separable-2",
        layers.SeparableConv2D,
        {"depth_multiplier": 2, **FILTERS},
        PLANE,
        convolve_separable,
        ((0, 1), (0, 1, 2)),
        BOTH,
    ),
    Inside(
        "einsum",
        layers.EinsumDense,
        {"equation": "abc,cde->abde", **HEADS},
        LINE,
        einsum("abc,cde->abde"),
        ((0,),),
    ),
    Inside(
        "einsum-other-order",
        layers.EinsumDense,
        {"equation": "abc,ecd->abde", **HEADS},
        LINE,
        einsum("abc,ecd->abde"),
        ((1,),),
    ),
    Inside(
        "einsum-ellipsis",
        layers.EinsumDense,
        {"equation": "...c,cd->...d", "output_shape": 3, "bias_axes": "d"},
        LINE,
        einsum("...c,cd->...d"),
        ((0,),),
    ),
    Inside(
        "einsum-shared-axis",
        layers.EinsumDense,
        {"equation": "abc,bcd->abd", "output_shape": (5, 3), "bias_axes": "bd"},
        LINE,
        einsum("abc,bcd->abd"),
        ((1,),),
    ),
    Inside(
        "einsum-all-axes",
        layers.EinsumDense,
        {"equation": "ab,b->ab", "output_shape": 4},
        (6, 4),
        einsum("ab,b->ab"),
        ((),),
    ),
    Inside(
        "embedding",
        layers.Embedding,
        {"input_dim": 6, "output_dim": 4},
        (*TOKENS.shape, 4),
        lambda x, rows: x * rows[TOKENS],
        ((1,),),
        {"embeddings": "g"},
    ),
]
BY_NAME = {inside.name: inside for inside in INSIDE}


def named(*names: str) -> list[Inside]:
    """Return the rows of these names."""
    return [BY_NAME[name] for name in names]


# One row per path through the code.
FEW = named("dense", "conv-2", "separable-2", "einsum-other-order", "embedding")
WITH_BIAS = [
    row for row in INSIDE if row.layer is not layers.Embedding and row.name != "einsum-all-axes"
]

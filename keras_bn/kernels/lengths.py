"""The length of each part of a kernel, and the kernel whose parts have given lengths."""

from keras import ops
from keras.backend import standardize_dtype

from keras_bn.core.affine import Affine
from keras_bn.core.dtypes import statistics_dtype
from keras_bn.core.estimators import at_least
from keras_bn.core.pooling import reduced_axes
from keras_bn.kernels import active
from keras_bn.types import Tensor


def length(v: Tensor, kept: tuple[int, ...]) -> Tensor:
    """Return |v|, the Euclidean norm over all axes but the kept ones, in float32 at least.

    Args:
        v: A kernel.
        kept: Its axes that are not summed over, ascending and counted from 0.

    Returns:
        The norms, in the shape of the kept axes.
    """
    scaled, largest = _scaled(v, kept)
    norms = largest * ops.sqrt(_squared_length(scaled, kept))
    return ops.reshape(norms, [v.shape[axis] for axis in kept])


def with_length(v: Tensor, g: Tensor, kept: tuple[int, ...]) -> Tensor:
    """Return g·v / |v| in float32 at least; 0 where v is 0.

    Args:
        v: A kernel.
        g: The lengths, in the shape of the kept axes.
        kept: As for `length`.

    Returns:
        The kernel with these lengths.
    """
    scaled, _ = _scaled(v, kept)
    # The largest element is 1, so that only v = 0 is below: it stays 0, with the gradient of g·v.
    norms = ops.sqrt(at_least(_squared_length(scaled, kept), 0.5))
    scale = ops.reshape(ops.cast(g, norms.dtype), norms.shape) / norms
    # Two zeros: torch.compile refuses one tensor for two arguments (torch 2.13).
    affine = Affine(ops.zeros_like(scale), scale, ops.zeros_like(scale))
    return active.apply(scaled, affine, standardize_dtype(scale.dtype))


def _scaled(v: Tensor, kept: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return v divided by its largest magnitude, and that, or 1 where v is 0.

    A square would overflow above 2e19 and lose digits below 1e-19. The direction of v does not
    depend on the divisor, which is therefore a constant for gradients.
    """
    v = ops.cast(v, statistics_dtype(standardize_dtype(v.dtype)))
    axes = reduced_axes(len(v.shape), kept)
    # Not `ops.max`: torch.compile cannot trace it (Keras 3.15.1, torch 2.13).
    largest = ops.amax(ops.stop_gradient(ops.abs(v)), axes, keepdims=True)
    largest = ops.where(largest == 0, ops.ones_like(largest), largest)
    return v / largest, largest


def _squared_length(v: Tensor, kept: tuple[int, ...]) -> Tensor:
    """Return Σ v², as n·mean² + m2: the moments are exact however many elements there are."""
    moments = active.moments(v, reduced_axes(len(v.shape), kept))
    return moments.count * ops.square(moments.mean) + moments.m2

"""Sums in JAX that do not lose digits however many terms there are.

XLA on the CPU sums blocks of 32 along each axis, so half a million elements of one axis cost no
digits; of several axes it sums blocks of 32·32 and more one by one (jax 0.10). So one axis goes
after the other. Over a short first axis it takes 40 ms for (8, 512, 1024), a product with ones
0.4 ms.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from keras_bn.core.moments import settled
from keras_bn.types import Tensor

# Half of the terms that XLA adds one by one in tensors of up to so many elements (jax 0.10, CPU);
# those of larger ones it adds in parts.
_HALF, _LOOPED = 16, 1 << 14
# The longest axis, and the fewest sums, of `is_short`; terms that a product may add one by one.
_SHORT, _MANY, _FEW = 512, 4096, 8


def sum_over(values: Tensor, axes: tuple[int, ...], in_halves: bool = False) -> Tensor:
    """Sum over `axes`, axes kept."""
    if is_short(values.shape, axes):
        values = _folded(values)
        return _times(jnp.ones((1, len(values)), values.dtype), values)
    # Settled, because XLA would make one sum of several again.
    for axis in reversed(axes):
        if in_halves and _is_block(values.shape, axis):
            values = settled(jnp.sum(_halves(values, axis), axis + 1))
        values = settled(jnp.sum(values, axis, keepdims=True))
    return values


def exact_sum_over(values: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Sum positive values to the last digit, without float64, which JAX lacks by default."""
    # The leading thirds of the digits of thousands of like numbers add up without rounding.
    digits = jnp.finfo(values.dtype)
    leading = jax.lax.reduce_precision(values, digits.nexp, digits.nmant // 3)
    return sum_over(leading, axes) + sum_over(values - leading, axes)


def _is_block(shape: tuple[int, ...], axis: int) -> bool:
    """Say whether a sum of squares, equal or nearly so, can miss the bound of a variance."""
    size = shape[axis]
    is_block = isinstance(size, int) and _HALF < size <= 2 * _HALF  # in an export it is a symbol
    is_large = _is_known(shape) and math.prod(shape) > _LOOPED
    return is_block and not is_large


def _halves(values: Tensor, axis: int) -> Tensor:
    """Split an axis in two, one for the halves and one along them; an odd size grows by a 0."""
    before, (size, *after) = values.shape[:axis], values.shape[axis:]
    even = jnp.pad(values, [(0, size % 2) if a == axis else (0, 0) for a in range(values.ndim)])
    return even.reshape(*before, 2, even.shape[axis] // 2, *after)


def is_short(shape: tuple[int, ...], axes: tuple[int, ...]) -> bool:
    """Say whether the sum is over a short first axis alone, and leaves many."""
    is_alone = _is_known(shape) and axes == (0,)
    return is_alone and 1 < shape[0] <= _SHORT and math.prod(shape[1:]) >= _MANY


def _folded(values: Tensor) -> Tensor:
    """Add neighbours along the first axis, until there are as few as a product may add."""
    while len(values) > _FEW:
        values = jnp.pad(values, [(0, len(values) % 2)] + [(0, 0)] * (values.ndim - 1))
        # Not halves: over replicas of a batch these would be sent from one to the other.
        pairs = values.reshape(-1, 2, *values.shape[1:])
        values = pairs[:, 0] + pairs[:, 1]
    return values


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def spread(value: Tensor, size: int) -> Tensor:
    """Repeat along the first axis, by a product."""
    return _times(jnp.ones((size, 1), value.dtype), value)


@spread.defjvp
def _spread_jvp(size: int, primals: Any, tangents: Any) -> tuple[Tensor, Tensor]:
    """Repeat, so that the transpose is the sum of `_folded`."""
    return spread(primals[0], size), _doubled(tangents[0], size)


def _doubled(value: Tensor, size: int) -> Tensor:
    """Repeat along the first axis: few by a product, and each of these as often as it takes."""
    if size <= _FEW:
        return _times(jnp.ones((size, 1), value.dtype), value)
    few = _doubled(value, -(-size // 2))
    return jnp.stack([few, few], 1).reshape(-1, *value.shape[1:])[:size]


def _is_known(shape: tuple[int, ...]) -> bool:
    """Say whether all sizes are numbers; in an export some are symbols."""
    return all(isinstance(size, int) for size in shape)


def _times(ones: Tensor, values: Tensor) -> Tensor:
    """Multiply by a matrix along the first axis."""
    rest = values.shape[1:]
    product = jnp.matmul(ones, values.reshape(len(values), -1), precision="highest")
    return product.reshape(-1, *rest)

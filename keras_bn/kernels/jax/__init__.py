"""The kernels in JAX."""

from typing import Any

import jax.numpy as jnp

from keras_bn.core.affine import AS_IS, Learned
from keras_bn.core.estimators import Correction, Limits
from keras_bn.core.moments import Moments
from keras_bn.core.pooling import Pooling
from keras_bn.kernels import normalization
from keras_bn.kernels.jax import compiled, parts
from keras_bn.kernels.jax.operation import How
from keras_bn.kernels.jax.parts import apply, moments
from keras_bn.kernels.normalization import Plan
from keras_bn.types import Tensor

__all__ = ["apply", "has_passes", "moments", "normalize"]

has_passes = compiled.has_passes


def normalize(x: Tensor, learned: Learned, plan: Plan) -> tuple[Tensor, Moments]:
    """Return y and the moments, as `normalization.normalize`."""
    found = compiled.normalize(_whole, x, learned, plan) if plan.is_simple else None
    if found is not None:
        return found
    y, moments, _ = normalization.normalize(parts, x, learned, plan)
    return y, moments


def _whole(how: How, x: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, each cell's center, scale and shift, and its offset, m2, two zeros, maybe r and d.

    What is learned comes first, then what sets are corrected towards, and the limits.
    """

    def total(cells: Tensor) -> Tensor:
        sets = cells.reshape(-1, how.together)
        return jnp.broadcast_to(jnp.sum(sets, 1, keepdims=True), sets.shape).reshape(cells.shape)

    sets = (total, how.together, True) if how.together > 1 else ()
    pooling = Pooling(how.axes, None, *sets)._replace(is_centered=how.is_centered)
    *learned, kept, limits = others if how.is_corrected else (*others, None, None)
    correct: Any = None
    if how.is_corrected:
        correct = Correction(kept[0], kept[1], Limits(*limits), how.epsilon)
    plan = Plan(pooling, how.epsilon, how.dtype, correct)
    given = Learned(*learned) if learned else AS_IS
    y, moments, seen = normalization.normalize(parts, x, given, plan)
    zero = jnp.zeros_like(moments.m2)
    affine = [zero if part is None else part for part in seen.affine]
    rest = [moments.offset, moments.m2, zero, zero, *(seen.correction or ())]
    return y, jnp.stack(affine), jnp.stack(rest)

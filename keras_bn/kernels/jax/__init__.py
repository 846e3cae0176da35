"""The kernels in JAX."""

import functools

from keras_bn.core.affine import Learned
from keras_bn.core.moments import Moments
from keras_bn.kernels import normalization
from keras_bn.kernels.jax import compiled, parts
from keras_bn.kernels.jax.parts import apply, moments
from keras_bn.kernels.normalization import Plan
from keras_bn.types import Tensor

__all__ = ["apply", "has_passes", "moments", "normalize"]

has_passes = compiled.has_passes
_in_one = functools.partial(normalization.in_one, parts)


def normalize(x: Tensor, learned: Learned, plan: Plan) -> tuple[Tensor, Moments]:
    """Return y and the moments, as `normalization.normalize`."""
    found = compiled.normalize(_in_one, x, learned, plan) if plan.is_simple else None
    if found is not None:
        return found
    y, moments, _ = normalization.normalize(parts, x, learned, plan)
    return y, moments

"""The one map that every layer applies: y = (x - center)·scale + shift."""

from collections.abc import Iterable
from typing import NamedTuple, Self

import numpy as np
from keras.backend import standardize_dtype

from keras_bn.core import native
from keras_bn.core.moments import Moments
from keras_bn.types import Tensor


class Affine(NamedTuple):
    """An affine map, in the form that loses no digits where x is far from 0.

    Attributes:
        center: What is subtracted first [x]; None for 0.
        scale: Factor on the difference [y/x].
        shift: What is added last [y]; None for 0.
    """

    center: Tensor | None
    scale: Tensor
    shift: Tensor | None


class Learned(NamedTuple):
    """What a layer learns: a factor and a summand, in the shape of the map; None for 1 and 0."""

    gamma: Tensor | None
    beta: Tensor | None

    @property
    def is_nothing(self) -> bool:
        """Whether neither is there."""
        return self.gamma is None and self.beta is None

    @property
    def given(self) -> list[Tensor]:
        """Those that are there."""
        return [part for part in self if part is not None]

    def filled(self, given: Iterable[Tensor]) -> Self:
        """Return the same with others in place of those that are there."""
        left = iter(given)
        gamma = None if self.gamma is None else next(left)
        return type(self)(gamma, None if self.beta is None else next(left))


AS_IS = Learned(None, None)


def standardize(moments: Moments, epsilon: float) -> Affine:
    """Return the map to mean 0 and variance 1: (x - mean) / √(variance + epsilon).

    It is written (x - pivot)·scale - offset·scale: the pivot is near x, so the difference is
    exact, and the mean's last digits, which the pivot does not hold, still count.
    """
    scale = native.reciprocal(native.sqrt(moments.variance + epsilon))
    return Affine(moments.pivot, scale, -moments.offset * scale)


def uncentered(affine: Affine) -> Affine:
    """Return the map's scale alone."""
    return Affine(None, affine.scale, None)


def rescale(pivot: Tensor, offset: Tensor, width: Tensor) -> Affine:
    """Return the map (x - (pivot + offset)) / width; where the width is 0, it is taken as 1."""
    # The reciprocal of a number below the normal ones is infinite.
    tiny = float(np.finfo(standardize_dtype(width.dtype)).tiny)
    scale = 1.0 / native.where(width > tiny, width, 1.0)
    return Affine(pivot, scale, -offset * scale)


def invert(affine: Affine) -> Affine:
    """Return the map that takes y = (x - center)·scale + shift back to x."""
    return Affine(affine.shift, 1.0 / affine.scale, affine.center)


def compose(affine: Affine, gamma: Tensor | None, beta: Tensor | None) -> Affine:
    """Return the map that scales by gamma and then adds beta; None stands for 1 and 0."""
    center, scale, shift = affine
    if gamma is not None:
        scale, shift = scale * gamma, None if shift is None else shift * gamma
    if beta is not None:
        shift = beta if shift is None else shift + beta
    return Affine(center, scale, shift)

"""The kernels of the active backend; of the hand-written files, only that one is imported."""

import importlib
from collections.abc import Callable

import keras

from keras_bn.core.moments import Moments
from keras_bn.types import Tensor

_HAND_WRITTEN = ("tensorflow", "jax", "torch")

_backend = keras.backend.backend()
_kernels = importlib.import_module(
    f"keras_bn.kernels.{_backend if _backend in _HAND_WRITTEN else 'generic'}"
)

moments: Callable[..., Moments] = _kernels.moments
apply: Callable[..., Tensor] = _kernels.apply
# What the backward pass must not compute again; elsewhere nothing is moved in place.
hold: Callable[[Tensor], Tensor] = getattr(_kernels, "hold", lambda x: x)

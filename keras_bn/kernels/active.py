"""The kernels of the active backend; of the hand-written files, only that one is imported."""

import importlib
from collections.abc import Callable

import keras

from keras_bn.core.affine import Affine
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


def is_foreign(x: Tensor) -> bool:
    """Say whether `x` belongs to a graph of TensorFlow, as in `tf.data`, beside another backend."""
    module = type(x).__module__
    return _backend != "tensorflow" and module.startswith("tensorflow.") and not hasattr(x, "numpy")


def apply_foreign(x: Tensor, affine: Affine, dtype: str) -> Tensor:
    """As `apply`, of such a tensor and a map in NumPy."""
    # Whoever has such a tensor has imported TensorFlow.
    from keras_bn.kernels import tensorflow

    return tensorflow.apply(x, affine, dtype)

"""The backend's own functions, for what is as small as statistics.

There `keras.ops` takes several times as long as the arithmetic: it looks for symbolic tensors,
converts, and finds a common dtype (Keras 3.15, PyTorch: `where` six times as long). All arguments
here are tensors of the backend, of one dtype, beside Python numbers.
"""

import importlib
from operator import attrgetter
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.backend import standardize_dtype

_BACKENDS = ("tensorflow", "jax", "torch")
_backend = keras.backend.backend()
_own = importlib.import_module(_backend) if _backend in _BACKENDS else ops


def _named(other: str, *names: str) -> Any:
    """Return a function by its name in `keras.ops`, or those in TensorFlow, JAX and PyTorch."""
    given = dict(zip(_BACKENDS, names, strict=True))
    return attrgetter(given.get(_backend, other))(_own)


where = _named("where", "where", "numpy.where", "where")
sqrt = _named("sqrt", "sqrt", "numpy.sqrt", "sqrt")
square = _named("square", "square", "numpy.square", "square")
# `1.0 / x` is two operations in PyTorch.
reciprocal = _named("reciprocal", "math.reciprocal", "numpy.reciprocal", "reciprocal")
relu = _named("relu", "nn.relu", "nn.relu", "relu")
isfinite = _named("isfinite", "math.is_finite", "numpy.isfinite", "isfinite")
reduce_any = _named("any", "reduce_any", "numpy.any", "any")
_reshape = _named("reshape", "reshape", "numpy.reshape", "reshape")
stop_gradient = _named("stop_gradient", "stop_gradient", "lax.stop_gradient", "Tensor.detach")


def reshape(x: Any, shape: Any) -> Any:
    """Return a tensor in another shape."""
    if _backend == "tensorflow" and all(isinstance(size, int) for size in shape):
        # An array takes eager TensorFlow 2.21 half the time of a tuple.
        return _reshape(x, np.array(shape, np.int32))
    return _reshape(x, shape)


def snapshot(value: Any) -> Any:
    """Return a tensor that stays as it is when a variable moves whose value it is."""
    return value.clone() if _backend == "torch" else value


def value_of(variable: Any) -> Any:
    """Return a variable's value as a tensor."""
    # TensorFlow has variables of its own, to be read at one place.
    found = variable.value
    return _own.convert_to_tensor(found) if _backend == "tensorflow" else found


def cast(value: Any, dtype: Any) -> Any:
    """Return a variable, or a tensor, as a tensor in a dtype, of the backend or by its name."""
    value = value_of(value) if isinstance(value, keras.Variable) else value
    if _backend == "torch":
        wanted = getattr(_own, dtype) if isinstance(dtype, str) else dtype
        return value if value.dtype == wanted else value.to(wanted)
    is_given = standardize_dtype(value.dtype) == standardize_dtype(dtype)
    return value if is_given else ops.cast(value, dtype)

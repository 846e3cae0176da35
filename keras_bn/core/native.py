"""The backend's own functions, for what is as small as statistics.

There `keras.ops` takes several times as long as the arithmetic: it looks for symbolic tensors,
converts, and finds a common dtype (Keras 3.15, PyTorch: `where` six times as long). All arguments
here are tensors of the backend, of one dtype, beside Python numbers.
"""

import importlib
from typing import Any

import keras
from keras import ops
from keras.backend import standardize_dtype

_MODULES = {"tensorflow": "tensorflow", "jax": "jax.numpy", "torch": "torch"}
_name = _MODULES.get(keras.backend.backend())
_own = ops if _name is None else importlib.import_module(_name)

where, sqrt, reshape = _own.where, _own.sqrt, _own.reshape
# `1.0 / x` is two operations in PyTorch.
reciprocal = _own.math.reciprocal if _name == "tensorflow" else _own.reciprocal
isfinite = _own.math.is_finite if _name == "tensorflow" else _own.isfinite


def cast(value: Any, dtype: str) -> Any:
    """Return a variable, or a tensor, as a tensor in a dtype."""
    value = value.value if isinstance(value, keras.Variable) else value
    return value if standardize_dtype(value.dtype) == dtype else ops.cast(value, dtype)

"""One call of a layer with its gradients, the same way on every backend."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

# (x, dy, mask) -> y, the gradient of sum(dy · y) to x, and those to the trainable variables.
Differentiated = Callable[[Any, Any, Any], tuple[Any, Any, list[Any]]]


def tensor(values: Any, dtype: str) -> Any:
    """Return a tensor of any dtype; NumPy's own on the way, since not all can read bfloat16."""
    if not keras.backend.is_float_dtype(dtype):
        return ops.convert_to_tensor(np.asarray(values, dtype), dtype)
    wide = "float64" if dtype == "float64" else "float32"
    return ops.cast(ops.convert_to_tensor(np.asarray(values, wide), wide), dtype)


def array(value: Any) -> np.ndarray:
    """Return a tensor's values in float64."""
    half = keras.backend.standardize_dtype(value.dtype) in ("float16", "bfloat16")
    return np.array(ops.convert_to_numpy(ops.cast(value, "float32") if half else value), "float64")


def differentiated(layer: Any, mode: str, **arguments: Any) -> Differentiated:
    """Return the call of a built layer with its gradients; the layer keeps the new state."""
    functions = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}
    return functions[keras.backend.backend()](layer, mode, arguments)


def _tensorflow(layer: Any, mode: str, arguments: dict[str, Any]) -> Differentiated:
    import tensorflow as tf

    def call(x, dy, mask):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, mask=mask, **arguments)
        variables = [variable.value for variable in layer.trainable_variables]
        dx, *rest = tape.gradient(y, [x, *variables], output_gradients=dy)
        return y, dx, rest

    return call if mode == "eager" else tf.function(call, jit_compile=mode == "xla")


def _jax(layer: Any, mode: str, arguments: dict[str, Any]) -> Differentiated:
    import jax

    def pure(trainable, fixed, x, dy, mask):
        def call(trainable, x):
            # `stateless_call` would go past what Keras does before a layer's own call.
            variables = layer.trainable_variables + layer.non_trainable_variables
            values = list(zip(variables, trainable + fixed, strict=True))
            with keras.StatelessScope(values) as scope:
                y = layer(x, mask=mask, **arguments)
            return y, [scope.get_current_value(v) for v in layer.non_trainable_variables]

        y, pull_back, state = jax.vjp(call, trainable, x, has_aux=True)
        return y, pull_back(dy), state

    function = pure if mode == "eager" else jax.jit(pure)

    def call(x, dy, mask):
        fixed = layer.non_trainable_variables
        values = [[v.value for v in part] for part in (layer.trainable_variables, fixed)]
        y, (gradients, dx), state = function(*values, x, dy, mask)
        for variable, value in zip(fixed, state, strict=True):
            if value is not None:
                variable.assign(value)
        return y, dx, gradients

    return call


def _torch(layer: Any, mode: str, arguments: dict[str, Any]) -> Differentiated:
    import torch

    def call(x, mask):
        return layer(x, mask=mask, **arguments)

    forward = call
    if mode == "aot":
        # Each layer's first compilation: what it learnt of the shapes of another is nothing to it.
        torch.compiler.reset()
        forward = torch.compile(call, backend="aot_eager", fullgraph=True)

    def differentiate(x, dy, mask):
        x = x.detach().requires_grad_()
        y = forward(x, mask)
        variables = [variable.value for variable in layer.trainable_variables]
        dx, *rest = torch.autograd.grad(y, [x, *variables], dy)
        return y, dx, rest

    return differentiate

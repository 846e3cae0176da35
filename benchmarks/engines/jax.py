"""JAX: jit, and eager (op by op)."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MODES = ("jit", "eager")
EPSILON = 1e-3


def tensor(array: np.ndarray, dtype: str) -> jax.Array:
    """Return an input."""
    return jnp.asarray(array, dtype)


def stream(x: jax.Array) -> Callable[[], object]:
    """Return a pass that reads and writes as much as x."""
    negative = jax.jit(jnp.negative)
    return lambda: jax.block_until_ready(negative(x))


def layer_step(layer: Any, options: dict, x: jax.Array, dy: Any, mode: str) -> Callable:
    """Return a step of a Keras layer."""
    return _step(*_function(layer, options), x, dy, mode)


def native_step(kind: str, x: jax.Array, dy: Any, mode: str, axis: int) -> Callable | None:
    """Return a step of flax.nnx's layer, where flax is installed."""
    if not find_spec("flax") or kind not in ("BN", "GN", "IN"):
        return None
    from flax import nnx

    channels, rngs = x.shape[axis], nnx.Rngs(0)
    options = {"epsilon": EPSILON, "rngs": rngs}
    if kind == "BN":
        layer = nnx.BatchNorm(channels, axis=axis, use_running_average=dy is None, **options)
    elif axis == -1:
        layer = nnx.GroupNorm(channels, num_groups=32 if kind == "GN" else channels, **options)
    else:
        return None
    definition, parameters, kept = nnx.split(layer, nnx.Param, ...)

    def function(parameters: Any, x: jax.Array) -> Any:
        merged = nnx.merge(definition, parameters, kept)
        y = merged(x)
        return y, nnx.split(merged, nnx.Param, ...)[2]

    return _step(function, parameters, x, dy, mode)


def saved_bytes(layer: Any, options: dict, x: jax.Array) -> int:
    """Return how many bytes JAX hands to the backward pass; XLA may make some of that anew."""
    function, parameters = _function(layer, options)
    _, gradient, _ = jax.vjp(function, parameters, x, has_aux=True)
    arrays = (leaf for leaf in jax.tree.leaves(gradient) if isinstance(leaf, jax.Array))
    return sum({array.unsafe_buffer_pointer(): array.nbytes for array in arrays}.values())


def _function(layer: Any, options: dict) -> tuple[Callable, list]:
    """Return a Keras layer as a function of its parameters and x, and the parameters."""
    kept = [variable.value for variable in layer.non_trainable_variables]

    def function(parameters: list, x: jax.Array) -> Any:
        return layer.stateless_call(parameters, kept, x, **options)

    return function, [variable.value for variable in layer.trainable_variables]


def _step(function: Callable, parameters: Any, x: jax.Array, dy: Any, mode: str) -> Callable:
    def train(parameters: Any, x: jax.Array, dy: jax.Array) -> Any:
        y, gradient, kept = jax.vjp(function, parameters, x, has_aux=True)
        return y, gradient(dy), kept

    arguments = (parameters, x) if dy is None else (parameters, x, dy)
    step = function if dy is None else train
    if mode == "jit":
        step = jax.jit(step)
    return lambda: jax.block_until_ready(step(*arguments))

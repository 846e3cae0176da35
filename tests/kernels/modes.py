"""The ways in which the active backend runs a function, and how it differentiates one.

`call(mode, function, arrays)` hands NumPy arrays to a function of tensors, in the given mode, and
returns NumPy arrays in float64. The mode decides what is compiled and which sizes are known.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

BACKEND = keras.backend.backend()

# "unknown": the sizes of the first array's axes are unknown to the compiler, those kept aside.
MODES = {
    "tensorflow": ("eager", "graph", "graph-unknown", "xla", "xla-unknown"),
    "jax": ("eager", "jit"),
    "torch": ("eager", "compile", "compile-unknown"),
}.get(BACKEND, ("eager",))

# And what is saved of a graph, with nothing in its place; the graph of a gradient is not replaced.
FORWARD = (*MODES, *(("saved", "saved-unknown") if BACKEND == "tensorflow" else ()))

# One that runs the kernels as they stand, and one that rewrites them.
EXTREMES = {
    "tensorflow": ("eager", "xla"),
    "jax": ("eager", "jit"),
    "torch": ("eager", "compile"),
}.get(BACKEND, ("eager",))

DIFFERENTIABLE = BACKEND in ("tensorflow", "jax", "torch")


def call(mode: str, function: Callable, arrays: Any, kept: tuple[int, ...] = ()) -> Any:
    """Run a function on arrays (its positional arguments; None stays None)."""
    with precision(*arrays), _known_warnings():
        tensors = [tensor(array) for array in arrays]
        unknown = mode.endswith("-unknown")
        result = _compiled(mode, function, kept if unknown else None)(*tensors)
        return to_numpy(result)


def gradients(
    mode: str, function: Callable, arrays: Any, kept: tuple[int, ...] = ()
) -> tuple[np.ndarray, ...]:
    """Return the gradients of a scalar function to its arguments."""
    if BACKEND != "torch":
        return call(mode, gradient_of(function), arrays, kept)
    # torch.compile takes the function; the compiled backward runs when the gradient is asked for.
    tensors = [tensor(array) for array in arrays]
    with _known_warnings():
        unknown = mode.endswith("-unknown")
        function = _compiled(mode, function, kept if unknown else None)
        return to_numpy(_torch_gradient(function, twice=mode == "eager")(*tensors))


def gradient_of(function: Callable) -> Callable:
    """Return the function of the gradients of a scalar function, itself differentiable."""
    return {"tensorflow": _tensorflow_gradient, "jax": _jax_gradient, "torch": _torch_gradient}[
        BACKEND
    ](function)


def tensor(array: Any) -> Any:
    """Return an array as a tensor of its own dtype; None stays None."""
    if array is None:
        return None
    array = np.asarray(array)
    wide = array.astype("float32") if array.dtype.name == "bfloat16" else array
    return keras.ops.convert_to_tensor(wide, dtype=array.dtype.name)


def to_numpy(result: Any) -> Any:
    """Return tensors, in any nest of tuples, as float64 arrays."""
    if isinstance(result, tuple | list):
        return tuple(to_numpy(item) for item in result)
    return np.asarray(keras.ops.convert_to_numpy(result)).astype("float64")


def precision(*arrays: Any) -> Any:
    """Return a context in which the backend has the arrays' dtypes: JAX must be told of float64."""
    wide = any(array is not None and np.asarray(array).dtype == "float64" for array in arrays)
    if BACKEND == "jax" and wide:
        import jax

        return jax.enable_x64(True)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _known_warnings() -> Iterator[None]:
    """Let pass the deprecated functions that torch 2.13's compiler calls in torch itself."""
    with warnings.catch_warnings():
        if BACKEND == "torch":
            warnings.simplefilter("ignore", DeprecationWarning)
        yield


@functools.cache
def _compiled(mode: str, function: Callable, kept: tuple[int, ...] | None) -> Callable:
    """Compile once per function: a second call with another shape retraces."""
    kind = mode.split("-")[0]
    if kind == "eager":
        return function
    if kind == "jit":
        import jax

        return jax.jit(function)
    if kind == "compile":
        return functools.partial(_run_compiled, function, dynamic=kept is not None)
    return functools.partial(_run_graph, function, kind, kept)


@contextlib.contextmanager
def as_saved() -> Iterator[None]:
    """Run graphs of TensorFlow as they are saved: a part of its optimizer replaces functions."""
    import tensorflow as tf

    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    try:
        yield
    finally:
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": False})


def _run_graph(function: Callable, kind: str, kept: tuple[int, ...] | None, *tensors: Any) -> Any:
    import tensorflow as tf

    specs = [None if t is None else tf.TensorSpec(t.shape, t.dtype) for t in tensors]
    if kept is not None:
        sizes = [n if axis in kept else None for axis, n in enumerate(tensors[0].shape)]
        specs[0] = tf.TensorSpec(sizes, tensors[0].dtype)
    graph = tf.function(function, jit_compile=kind == "xla").get_concrete_function(*specs)
    with as_saved() if kind == "saved" else contextlib.nullcontext():
        return graph(*[t for t in tensors if t is not None])


def _run_compiled(function: Callable, *tensors: Any, dynamic: bool) -> Any:
    import torch

    # All functions of one code object share one limit of recompilations.
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, dynamic=dynamic)(*tensors)


def _tensorflow_gradient(function: Callable) -> Callable:
    import tensorflow as tf

    def gradient(*tensors: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            loss = function(*tensors)
        return tuple(tape.gradient(loss, tensors))

    return gradient


def _jax_gradient(function: Callable) -> Callable:
    import jax

    return lambda *tensors: jax.grad(function, tuple(range(len(tensors))))(*tensors)


def _torch_gradient(function: Callable, twice: bool = True) -> Callable:
    import torch

    def gradient(*tensors: Any) -> Any:
        tensors = [t if t.requires_grad else t.requires_grad_() for t in tensors]
        return torch.autograd.grad(function(*tensors), tensors, create_graph=twice)

    return gradient

"""One backend per process, chosen by KERAS_BACKEND; every test starts from the same state."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
from keras import ops

from tests.oracle import Arrays, weights_by_name
from tests.run_suite import NO_TIME, most_telling_first

BACKEND = keras.backend.backend()


# torch 2.13: what torch.compile itself does when it traces a model.
WARNINGS_OF_TORCH = [
    "ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning",
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning",
]


def pytest_configure(config: pytest.Config) -> None:
    for line in WARNINGS_OF_TORCH:
        config.addinivalue_line("filterwarnings", line)


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "skip what has not begun by then [s since the epoch]"
    parser.addoption("--until", type=float, default=math.inf, help=text)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("until") < math.inf:
        order = most_telling_first([item.nodeid for item in items])
        items[:] = [items[index] for index in order]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > item.config.getoption("until"):
        pytest.skip(NO_TIME)


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Seed, number layers from 0, and take back what a test does to the dtype policy."""
    keras.utils.set_random_seed(1)
    keras.utils.clear_session(free_memory=False)
    policy = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(policy)


@contextlib.contextmanager
def compiling_quickly() -> Iterator[None]:
    """Halve the time that JAX takes to compile; the results are the same to rounding."""
    if BACKEND != "jax":
        yield
        return
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def quick_compiler() -> Iterator[None]:
    """Let JAX skip what makes code faster, where nothing runs twice."""
    with compiling_quickly():
        yield


@pytest.fixture
def x64() -> Iterator[None]:
    """Let JAX compute in float64; the other backends always can."""
    if BACKEND != "jax":
        yield
        return
    import jax

    with jax.enable_x64(True):
        yield


class Result(NamedTuple):
    """The output, the gradients of sum(dy * y), and the weights after the call, by name."""

    y: np.ndarray
    dx: np.ndarray | None
    gradients: Arrays
    state: Arrays


@pytest.fixture
def run() -> Callable[..., Result]:
    """Return `run(layer, x, dy=None, how=..., **call)`, a call with its gradients.

    `how` is "eager", "graph" (TensorFlow), "compiled" (XLA, jax.jit, torch.compile), "traced"
    (the graphs of torch.compile, one operation after the other) or `USUAL`.
    """
    return _run


# Eager JAX compiles each operation for each shape by itself: ten times as slow here.
USUAL = "quickly compiled" if BACKEND == "jax" else "eager"


def _run(layer: Any, x: Any, dy: Any = None, how: str = USUAL, **call: Any) -> Result:
    call = {key: as_tensor(value) for key, value in call.items()}
    forward = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}[BACKEND]
    y, dx, gradients = forward(layer, as_tensor(x), as_tensor(dy), how, call)
    names = [variable.name for variable in layer.trainable_variables]
    found = {name: as_numpy(g) for name, g in zip(names, gradients, strict=True)}
    return Result(as_numpy(y), as_numpy(dx), found, weights_by_name(layer))


def as_tensor(value: Any) -> Any:
    return ops.convert_to_tensor(value) if isinstance(value, np.ndarray) else value


def as_numpy(value: Any) -> Any:
    """Return a NumPy array; bfloat16, which NumPy lacks, as float32."""
    if value is None:
        return None
    half = keras.backend.standardize_dtype(value.dtype) == "bfloat16"
    return np.array(ops.convert_to_numpy(ops.cast(value, "float32") if half else value))


def _tensorflow(layer, x, dy, how, call):
    import tensorflow as tf

    def forward(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, **call)
        if dy is None:
            return y, None, [None] * len(layer.trainable_variables)
        variables = [variable.value for variable in layer.trainable_variables]
        dx, *gradients = tape.gradient(y, [x, *variables], dy)
        return y, dx, gradients

    if how != "eager":
        forward = tf.function(forward, jit_compile=how == "compiled")
    return forward(x)


def _jax(layer, x, dy, how, call):
    import jax

    def forward(x, trainable):
        # As `stateless_call`, but through `__call__`, which may cast the input.
        mapping = list(zip(layer.trainable_variables, trainable, strict=True))
        with keras.StatelessScope(mapping) as scope:
            y = layer(x, **call)
        values = [(scope.get_current_value(v), v) for v in layer.non_trainable_variables]
        return y, [v.value if value is None else value for value, v in values]

    def step(x, trainable):
        if dy is None:
            return *forward(x, trainable), (None, [None] * len(trainable))
        y, pullback, state = jax.vjp(forward, x, trainable, has_aux=True)
        return y, state, pullback(dy)

    step = step if how == "eager" else jax.jit(step)
    with compiling_quickly() if how == USUAL else contextlib.nullcontext():
        y, state, (dx, gradients) = step(x, [v.value for v in layer.trainable_variables])
    for variable, value in zip(layer.non_trainable_variables, state, strict=True):
        variable.assign(value)
    return y, dx, gradients


def _torch(layer, x, dy, how, call):
    import torch

    def forward(x):
        return layer(x, **call)

    if how != "eager":
        backend = "aot_eager" if how == "traced" else "inductor"
        forward = torch.compile(forward, backend=backend, fullgraph=True)
    if dy is None:
        return forward(x), None, [None] * len(layer.trainable_variables)
    x = x.detach().requires_grad_(True)
    y = forward(x)
    variables = [variable.value for variable in layer.trainable_variables]
    dx, *gradients = torch.autograd.grad(y, [x, *variables], dy)
    return y, dx, gradients

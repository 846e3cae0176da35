"""TensorFlow: eager, a graph, and a graph compiled by XLA."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

MODES = ("graph", "jit", "eager")
EPSILON = 1e-3


def tensor(array: np.ndarray, dtype: str) -> tf.Tensor:
    """Return an input."""
    return tf.cast(tf.constant(array), dtype)


def stream(x: tf.Tensor) -> Callable[[], object]:
    """Return a pass that reads and writes as much as x."""
    return lambda: tf.negative(x)


def layer_step(layer: Any, options: dict, x: tf.Tensor, dy: Any, mode: str) -> Callable:
    """Return a step of a Keras layer."""
    parameters = [variable.value for variable in layer.trainable_variables]
    return _step(lambda x: layer(x, **options), parameters, x, dy, mode)


def native_step(kind: str, x: tf.Tensor, dy: Any, mode: str, axis: int) -> Callable | None:
    """Return a step through FusedBatchNormV3, on a view of the same memory."""
    if kind != "BN" or axis != -1 or mode != "graph":
        return None
    channels = x.shape[-1]
    gamma, beta = tf.Variable(tf.ones(channels)), tf.Variable(tf.zeros(channels))
    mean, variance = tf.Variable(tf.zeros(channels)), tf.Variable(tf.ones(channels))

    def function(x: tf.Tensor) -> tf.Tensor:
        kept = (mean, variance) if dy is None else (mean[:0], variance[:0])
        y, *found = tf.raw_ops.FusedBatchNormV3(
            x=tf.reshape(x, (1, 1, -1, channels)),
            **dict(zip(("scale", "offset", "mean", "variance"), (gamma, beta, *kept), strict=True)),
            epsilon=EPSILON,
            is_training=dy is not None,
        )
        if dy is not None:
            for variable, new in zip((mean, variance), found, strict=False):
                variable.assign(variable * 0.99 + new * 0.01)
        return tf.reshape(y, x.shape)

    return _step(function, [gamma, beta], x, dy, mode)


def saved_bytes(layer: Any, options: dict, x: tf.Tensor) -> None:
    """TensorFlow does not say what it keeps."""


def _step(function: Callable, parameters: list, x: tf.Tensor, dy: Any, mode: str) -> Callable:
    def train() -> object:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        return y, tape.gradient(y, [x, *parameters], dy)  # y too, or a graph leaves it out

    step = (lambda: function(x)) if dy is None else train
    return step if mode == "eager" else tf.function(step, jit_compile=mode == "jit")

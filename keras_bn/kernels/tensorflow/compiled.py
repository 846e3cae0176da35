"""The compiled passes as operations of TensorFlow; each gives None for what they do not serve."""

import os
from functools import cache
from typing import Any

import tensorflow as tf

from keras_bn.core.affine import Learned
from keras_bn.core.moments import Moments
from keras_bn.kernels.compiled import TYPES, place
from keras_bn.kernels.normalization import Plan, varies
from keras_bn.kernels.tensorflow.tracing import (
    is_for_each_of_many,
    is_for_gradients,
    is_for_xla,
)
from keras_bn.types import Tensor


@cache
def _operations() -> Any:
    """Return the module of the operations; None without a library, or beside a GPU."""
    path = place("tensorflow_ops")
    # There a graph would carry each tensor to the CPU and back.
    is_on_cpu = not tf.config.list_logical_devices("GPU")
    return tf.load_op_library(path) if path is not None and is_on_cpu else None


def normalize(x: Tensor, learned: Learned, plan: Plan) -> tuple[Tensor, Moments, Tensor] | None:
    """Return y, the moments, and the map of each cell, which the gradient needs."""
    # Only in training: a graph that is exported must not need these operations.
    is_apart = is_for_xla() or is_for_each_of_many() or not is_for_gradients()
    if is_apart or x.shape.rank is None or not {x.dtype.name, plan.dtype} <= set(TYPES):
        return None
    sums = [1 if axis in plan.pooling.axes else size for axis, size in enumerate(x.shape)]
    parts = None if _operations() is None else _filled(learned, sums, plan)
    if parts is None:
        return None
    y, affine, rest = _operations().keras_bn_normalize(
        x, *parts, U=plan.dtype, **_options(learned, plan)
    )
    affine.set_shape([3, *sums])
    rest.set_shape([4, *sums])
    count = _number(x, plan.pooling.axes) * (plan.pooling.together or 1)
    return y, Moments(count, affine[0], rest[0], rest[1]), affine


def gradients(
    x: Tensor, dy: Tensor, learned: Learned, affine: Tensor, plan: Plan
) -> tuple[Tensor, ...] | None:
    """Return the gradients of x and of what is learned, from the maps that `normalize` gave."""
    if is_for_each_of_many():
        return None
    parts: Any = _filled(learned, affine.shape[1:], plan)
    dx, found = _operations().keras_bn_gradients(
        x, tf.cast(dy, plan.dtype), parts[0], affine, **_options(learned, plan)
    )
    dx.set_shape(x.shape)
    found.set_shape([2, *parts[0].shape])
    pairs = zip((found[1], found[0]), learned, strict=True)
    return dx, *(gradient for gradient, part in pairs if part is not None)


def _options(learned: Learned, plan: Plan) -> dict[str, Any]:
    threads = tf.config.threading.get_intra_op_parallelism_threads()
    return {
        "axes": plan.pooling.axes,
        "together": plan.pooling.together or 1,
        "epsilon": plan.epsilon,
        "is_centered": plan.pooling.is_centered,
        "is_learned": not learned.is_nothing,
        "varies": varies(learned, plan.pooling.axes),
        "threads": threads or len(os.sched_getaffinity(0)),
    }


def _filled(learned: Learned, sums: Any, plan: Plan) -> list[Tensor] | None:
    """Return gamma and beta; None where the passes do not take them."""
    if learned.is_nothing:
        return [tf.ones([1] * len(sums))] * 2
    gamma, beta = learned
    gamma = tf.ones_like(beta) if gamma is None else gamma
    beta = tf.zeros_like(gamma) if beta is None else beta
    shape = gamma.shape.as_list()
    first = next((axis for axis, size in enumerate(shape) if size != 1), len(shape))
    is_whole = None not in shape and gamma.dtype == tf.float32
    # The columns of cells one after the other are the same again and again.
    is_in_turn = varies(learned, plan.pooling.axes) or shape[first:] == list(sums)[first:]
    return [gamma, beta] if is_whole and is_in_turn else None


def _number(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return the number of elements along the axes."""
    sizes = [x.shape[axis] for axis in axes]
    if None in sizes:
        return tf.cast(tf.reduce_prod(tf.gather(tf.shape(x), axes)), tf.float32)
    return int(tf.TensorShape(sizes).num_elements())

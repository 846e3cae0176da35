"""The compiled passes as operations of TensorFlow; each gives None for what they do not serve."""

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import tensorflow as tf

from keras_bn.core.affine import Affine, Learned
from keras_bn.core.moments import Moments
from keras_bn.kernels.compiled import TYPES, are_in_turn, place
from keras_bn.kernels.normalization import Plan, Whole, varies
from keras_bn.kernels.tensorflow.tracing import (
    is_for_each_of_many,
    is_for_gradients,
    is_for_xla,
)
from keras_bn.types import Tensor

Axes = tuple[int, ...]


@cache
def _operations() -> Any:
    """Return the module of the operations; None without a library, or beside a GPU."""
    path = place("tensorflow_ops")
    # There a graph would carry each tensor to the CPU and back.
    is_on_cpu = not tf.config.list_logical_devices("GPU")
    return tf.load_op_library(path) if path is not None and is_on_cpu else None


def _serves(x: Tensor, *dtypes: str) -> bool:
    """Say whether the operations take a tensor, and will be known where the graph runs."""
    if is_for_xla() or is_for_each_of_many() or x.shape.rank is None:
        return False
    return {x.dtype.name, *dtypes} <= set(TYPES) and _operations() is not None


def normalize(
    x: Tensor, learned: Learned, plan: Plan, number: Callable[[Tensor, Axes], Tensor]
) -> tuple[Tensor, Moments, Whole] | None:
    """Return y, the moments, and the map of each cell, which the gradient needs.

    Args:
        x: The input.
        learned: gamma and beta.
        plan: What to do.
        number: Gives the number of elements along some axes.

    Returns:
        All three, or None.
    """
    # Only in training: a graph that is exported must not need these operations.
    if plan.correct is not None or not is_for_gradients() or not _serves(x, plan.dtype):
        return None
    sums = _sums(x, plan.pooling.axes)
    parts = _filled(learned, sums, plan)
    if parts is None:
        return None
    y, affine, rest = _operations().keras_bn_normalize(
        x, *parts, U=plan.dtype, threads=_threads(), **_options(learned, plan)
    )
    affine.set_shape([3, *sums])
    rest.set_shape([4, *sums])
    count = number(x, plan.pooling.axes) * (plan.pooling.together or 1)
    return y, Moments(count, affine[0], rest[0], rest[1]), Whole(affine, None)


def gradients(
    x: Tensor, dy: Tensor, learned: Learned, whole: Whole, plan: Plan
) -> tuple[Tensor, ...] | None:
    """Return the gradients of x and of what is learned, from the maps that `normalize` gave."""
    affine = whole.affine
    if is_for_each_of_many():
        return None
    parts: Any = _filled(learned, affine.shape[1:], plan)
    dx, found = _operations().keras_bn_gradients(
        x,
        tf.cast(dy, plan.dtype),
        parts[0],
        affine,
        threads=_threads(),
        **_options(learned, plan),
    )
    dx.set_shape(x.shape)
    found.set_shape([2, *parts[0].shape])
    pairs = zip((found[1], found[0]), learned, strict=True)
    return dx, *(gradient for gradient, part in pairs if part is not None)


def _options(learned: Learned, plan: Plan) -> dict[str, Any]:
    return {
        "axes": plan.pooling.axes,
        "together": plan.pooling.together or 1,
        "epsilon": plan.epsilon,
        "is_centered": plan.pooling.is_centered,
        "is_learned": not learned.is_nothing,
        "varies": varies(learned, plan.pooling.axes),
    }


def moments(x: Tensor, weights: Tensor | None, count: Any, axes: Axes) -> list[Tensor] | None:
    """Return pivot, offset and m2 over the axes."""
    if not is_for_gradients() or not _serves(x):
        return None
    given = [tf.ones([1] * x.shape.rank)] * 2
    if weights is not None:
        shape = [1 if axis in axes else size for axis, size in enumerate(tf.unstack(tf.shape(x)))]
        given = [weights, tf.broadcast_to(tf.cast(count, tf.float32), shape)]
    if any(part.dtype != tf.float32 for part in given):
        return None
    found = _operations().keras_bn_moments(
        x, *given, axes=axes, is_weighted=weights is not None, threads=_threads()
    )
    found.set_shape([3, *_sums(x, axes)])
    return list(tf.unstack(found))


def products(x: Tensor, dy: Tensor, center: Tensor, axes: Axes) -> list[Tensor] | None:
    """Return Σ dy and Σ dy·(x - center)."""
    sums = _sums(x, axes)
    is_whole = center.dtype == tf.float32 and center.shape.as_list() == sums
    if not is_whole or not _serves(x, dy.dtype.name):
        return None
    found = _operations().keras_bn_products(x, dy, center, axes=axes, threads=_threads())
    found.set_shape([2, *sums])
    return list(tf.unstack(found))


def mapped(x: Tensor, affine: Affine, dtype: str) -> Tensor | None:
    """Return (x - center)·scale + shift."""
    parts = _alike(*affine)
    if parts is None or not is_for_gradients() or not _serves(x, dtype):
        return None
    return _operations().keras_bn_map(x, *parts, U=dtype, threads=_threads())


def combined(
    x: Tensor, dy: Tensor, center: Tensor | None, terms: tuple[Any, ...], weights: Tensor | None
) -> Tensor | None:
    """Return dy·a + w·((x - center)·b + c), in the dtype of x, for the terms a, b, c."""
    a, b, c = terms
    parts = _alike(center, b, c, a)
    if parts is None or not _serves(x, dy.dtype.name):
        return None
    weight = tf.ones([1] * x.shape.rank) if weights is None else weights
    if weight.dtype != tf.float32:
        return None
    return _operations().keras_bn_combined(
        x, dy, weight, *parts, is_weighted=weights is not None, threads=_threads()
    )


def _alike(*parts: Tensor | None) -> list[Tensor] | None:
    """Return parts of one shape, 0 in place of what is missing; None where they have several."""
    given = [part for part in parts if part is not None]
    shape = given[0].shape
    if any(part.dtype != tf.float32 or part.shape.as_list() != shape.as_list() for part in given):
        return None
    return [tf.zeros_like(given[0]) if part is None else part for part in parts]


def _threads() -> int:
    threads: int = tf.config.threading.get_intra_op_parallelism_threads()
    return threads or os.cpu_count() or 1


def _sums(x: Tensor, axes: Axes) -> list[int | None]:
    return [1 if axis in axes else size for axis, size in enumerate(x.shape)]


def _filled(learned: Learned, sums: Any, plan: Plan) -> list[Tensor] | None:
    """Return gamma and beta; None where the passes do not take them."""
    if learned.is_nothing:
        return [tf.ones([1] * len(sums))] * 2
    gamma, beta = learned
    gamma = tf.ones_like(beta) if gamma is None else gamma
    beta = tf.zeros_like(gamma) if beta is None else beta
    shape = gamma.shape.as_list()
    is_whole = None not in shape and gamma.dtype == tf.float32
    is_in_turn = varies(learned, plan.pooling.axes) or are_in_turn(shape, sums)
    return [gamma, beta] if is_whole and is_in_turn else None

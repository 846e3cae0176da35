"""The compiled passes in TensorFlow; each gives None for what they do not serve.

They are operations of a graph, and custom calls where XLA compiles it.
"""

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import tensorflow as tf

from keras_bn.core.affine import Affine, Learned
from keras_bn.core.moments import Moments
from keras_bn.kernels.compiled import RANK, are_in_turn, cores, corrected, dtypes, library, place
from keras_bn.kernels.normalization import How, Plan, Whole, how_of, varies
from keras_bn.kernels.tensorflow import calls, replaced
from keras_bn.kernels.tensorflow.tracing import (
    is_for_each_of_many,
    is_for_export,
    is_for_gradients,
    is_for_xla,
    is_plain,
)
from keras_bn.types import Tensor

Axes = tuple[int, ...]
# Dtype and shape.
Type = tuple[str, Any]

# Said, not left out: eager TensorFlow 2.21 takes several times as long to find a default itself.
_DEFAULTS = {
    "U": tf.float32,
    "axes": [],
    "together": 1,
    "epsilon": 0.0,
    "is_centered": True,
    "varies": False,
    "is_corrected": False,
    "merges": False,
}


@cache
def _operations() -> Any:
    """Return the module of the operations; None without a library, or beside a GPU."""
    path = place("tensorflow_ops") if library() is not None else None
    # There a graph would carry each tensor to the CPU and back.
    is_on_cpu = not tf.config.list_logical_devices("GPU")
    if path is None or not is_on_cpu:
        return None
    # Once a file is loaded, TensorFlow gives its operations again by the same name alone.
    return tf.load_op_library(os.path.realpath(path))


def has_passes() -> bool:
    """Say whether the passes will be known where the graph runs."""
    return _operations() is not None and (not is_for_xla() or calls.are_known())


def _serves(x: Tensor, *others: str) -> bool:
    """Say whether the passes take a tensor, beside further dtypes."""
    if is_plain() or is_for_each_of_many():
        return False
    if x.shape.rank is None or x.shape.rank > RANK:
        return False
    return {x.dtype.name, *others} <= dtypes() and has_passes()


def _either(
    plain: Callable[..., Any], passes: Callable[..., Any], how: How, *inputs: Tensor
) -> Any:
    """Return what a pass gives; where the graph may be exported, through a plain function."""
    if is_for_export():
        return replaced.call(plain, passes, how, *inputs)
    return passes(how, *inputs)


def _call(
    name: str, big: list[Tensor], others: list[Tensor], results: list[Type], **options: Any
) -> Any:
    """Return the results of a pass, as the compiled code or the graph has them.

    Args:
        name: Its name.
        big: x, and maybe dy.
        others: What there is for each cell or column.
        results: Dtypes and shapes.
        **options: The operations' attributes.
    """
    if is_for_xla():
        options |= {"is_training": is_for_gradients(), "threads": _threads()}
        return calls.call(name, [*big, *others], results, **options)
    options = _DEFAULTS | options | {"threads": _threads()}
    if len(big) == 1:
        options["U"] = tf.as_dtype(results[0][0])
    else:
        del options["U"]  # that of dy
    found = getattr(_operations(), f"keras_bn_{name}")(*big, others, **options)
    found = [found] if len(results) == 1 else list(found)
    for part, (_, shape) in zip(found, results, strict=True):
        part.set_shape(shape)
    return found


def normalize(
    plain: Callable[..., Any],
    x: Tensor,
    learned: Learned,
    plan: Plan,
    number: Callable[[Tensor, Axes], Tensor],
) -> tuple[Tensor, Moments | None, Whole] | None:
    """Return y, the moments, and the map of each cell, which the gradient needs.

    Args:
        plain: The same as the pass in plain operations.
        x: The input.
        learned: gamma and beta.
        plan: What to do.
        number: Gives the number of elements along some axes.

    Returns:
        All three, without the moments where y is all that is asked for; or None.
    """
    if not _serves(x, plan.dtype):
        return None
    sums = _sums(x, plan.pooling.axes)
    parts, kept = _filled(learned, sums, plan), _kept(plan, sums)
    if parts is None or kept is None:
        return None
    how, given = how_of(learned, plan), [x, *parts, *kept]
    y, affine, rest = _either(plain, _normalized, how, *given)
    if plan.is_alone:
        return y, None, Whole(affine)
    # An index takes eager TensorFlow 2.21 several times as long.
    parts = tf.unstack(rest) if how.merges else [tf.unstack(affine)[0], *tf.unstack(rest)]
    return y, Moments(number(x, how.axes) * plan.cells(x), *parts), Whole(affine)


def _normalized(how: How, x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    results = [(dtype, shape) for shape, dtype in how.results(x)]
    options = {"epsilon": how.epsilon, "merges": how.merges, **_options(how)}
    return tuple(_call("normalize", [x], [*others], results, **options))


def gradients(
    x: Tensor, dy: Tensor, learned: Learned, whole: Whole, plan: Plan
) -> tuple[Tensor, ...] | None:
    """Return the gradients of x and of what is learned, from the maps that `normalize` gave."""
    if is_plain() or is_for_each_of_many():
        return None
    parts = _filled(learned, whole.affine.shape[1:], plan)
    if parts is None:  # of sets whose number is not known
        return None
    columns = parts[0].shape if parts else [1] * x.shape.rank
    dx, found = _call(
        "gradients",
        [x, tf.cast(dy, plan.dtype)],
        [whole.affine, *parts[:1]],
        [(x.dtype.name, x.shape), ("float32", [2, *columns])],
        **_options(how_of(learned, plan)),
    )
    d_beta, d_gamma = tf.unstack(found)
    pairs = zip((d_gamma, d_beta), learned, strict=True)
    return dx, *(gradient for gradient, part in pairs if part is not None)


def _options(how: How) -> dict[str, Any]:
    return {
        "axes": how.axes,
        "together": how.together,
        "is_centered": how.is_centered,
        "varies": how.varies,
        "is_corrected": how.is_corrected,
    }


def moments(
    plain: Callable[..., Any], x: Tensor, weights: Tensor | None, count: Any, axes: Axes
) -> list[Tensor] | None:
    """Return pivot, offset and m2 over the axes; `plain` gives the same in plain operations."""
    if not _serves(x):
        return None
    counted = []
    if weights is not None:
        shape = [1 if axis in axes else size for axis, size in enumerate(tf.unstack(tf.shape(x)))]
        counted = [weights, tf.broadcast_to(tf.cast(count, tf.float32), shape)]
    if any(part.dtype != tf.float32 for part in counted):
        return None
    return list(tf.unstack(_either(plain, _moments, How(axes), x, *counted)))


def _moments(how: How, x: Tensor, *counted: Tensor) -> Tensor:
    results = [("float32", [3, *_sums(x, how.axes)])]
    return _call("moments", [x], [*counted], results, axes=how.axes)[0]


def products(x: Tensor, dy: Tensor, center: Tensor, axes: Axes) -> list[Tensor] | None:
    """Return Σ dy and Σ dy·(x - center)."""
    sums = _sums(x, axes)
    is_whole = center.dtype == tf.float32 and center.shape.as_list() == sums
    if not is_whole or not _serves(x, dy.dtype.name):
        return None
    results = [("float32", [2, *sums])]
    return list(tf.unstack(*_call("products", [x, dy], [center], results, axes=axes)))


def mapped(plain: Callable[..., Any], x: Tensor, affine: Affine, dtype: str) -> Tensor | None:
    """Return (x - center)·scale + shift; `plain` gives the same in plain operations."""
    parts = _alike(x, *affine)
    # XLA joins a map with what is around it.
    is_joined = is_for_xla() and not is_for_gradients()
    if parts is None or is_joined or not _serves(x, dtype):
        return None
    return _either(plain, _mapped, How((), dtype), x, *parts)


def _mapped(how: How, x: Tensor, *affine: Tensor) -> Tensor:
    return _call("map", [x], [*affine], [(how.dtype, x.shape)])[0]


def combined(
    x: Tensor, dy: Tensor, center: Tensor | None, terms: tuple[Any, ...], weights: Tensor | None
) -> Tensor | None:
    """Return dy·a + w·((x - center)·b + c), in the dtype of x, for the terms a, b, c."""
    a, b, c = terms
    parts = _alike(x, center, b, c, a)
    if parts is None or not _serves(x, dy.dtype.name):
        return None
    given = [] if weights is None else [weights]
    if any(part.dtype != tf.float32 for part in given):
        return None
    return _call("combined", [x, dy], [*parts, *given], [(x.dtype.name, x.shape)])[0]


def _alike(x: Tensor, *parts: Tensor | None) -> list[Tensor] | None:
    """Return parts of one shape, 0 in place of what is missing; None where they have several."""
    given = [part for part in parts if part is not None]
    shape = given[0].shape.as_list()
    are_alike = all(part.dtype == tf.float32 and part.shape.as_list() == shape for part in given)
    if not are_alike or len(shape) != x.shape.rank:
        return None
    return [tf.zeros_like(given[0]) if part is None else part for part in parts]


@cache  # TensorFlow lets nobody change it once there are tensors
def _threads() -> int:
    threads: int = tf.config.threading.get_intra_op_parallelism_threads()
    return threads or cores()


def _sums(x: Tensor, axes: Axes) -> list[int | None]:
    return [1 if axis in axes else size for axis, size in enumerate(x.shape)]


def _kept(plan: Plan, sums: Any) -> list[Tensor] | None:
    """Return what sets are corrected towards, and the limits; None if that is not taken."""
    correct: Any = plan.correct
    if correct is None:
        return []
    limits = corrected(correct, sums)
    if limits is None or correct.mean.dtype != tf.float32:
        return None
    return [correct.mean, correct.variance, tf.stack(limits)]


def _filled(learned: Learned, sums: Any, plan: Plan) -> list[Tensor] | None:
    """Return gamma and beta, or neither; None where the passes do not take them."""
    if learned.is_nothing:
        return []
    gamma, beta = learned
    gamma = tf.ones_like(beta) if gamma is None else gamma
    beta = tf.zeros_like(gamma) if beta is None else beta
    shape = gamma.shape.as_list()
    is_whole = None not in shape and gamma.dtype == tf.float32
    is_in_turn = varies(learned, plan.pooling.axes) or are_in_turn(shape, sums)
    return [gamma, beta] if is_whole and is_in_turn else None

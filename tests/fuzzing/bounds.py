"""How far a layer call may be off its float64 result, element by element.

The tolerances follow from the kernel contract (`keras_bn.kernels`) and from nothing else. With u
the unit roundoff of the statistics' dtype, s = √(variance + epsilon), z = (x - mean)/s and
κ = |mean|/s:

- The variance, and so s, is off by v = 8·u·(1 + κ²·u) of itself, the mean by 8·u·(|mean| + s).
- z is off by e = 8·u·(1 + |z| + κ) + v·|z|.
- The correction of renormalization keeps that: |r|·(e + v·|z|), and 8·u·(|d| + (|mean| + s)/s_kept)
  for d. The limits of r and d follow the step in the dtype of the kept statistics: 4 of its u more.
- A sum, and a difference, is off by 8·u of the size of its terms, not of its result. So
  dx = (g - w·(Σg + z·Σ(g·z))/n)/s, with g = gamma·r·dy, is off by 8·u + 2·v of
  (|g| + w·(Σ|g| + |z|·Σ|g·z|)/n)/s, and by what e does to z, at the element and in the sum.
- A result is rounded to its own dtype once. But dx is the sum of two gradients, through the map
  and through the statistics, and a backend rounds both before it adds them: three roundings.
- What is smaller than a dtype's smallest number may become 0.
- Without a mean, as in RMS normalization, it and κ are 0, and dx lacks Σg. Each ghost has sums of
  its own.
- An average that counts what it has seen has its share from the count, rounded; merged with
  another, the square of the distance between the means has the error of both.

What must stay as it is (statistics of an empty batch, or of inference) has the tolerance 0.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import keras_bn
from keras_bn.core.dtypes import statistics_dtype
from keras_bn.kernels import reference
from tests import oracle
from tests.oracle import Arrays, Expected

# Unit roundoff; for float64 8 times that, because the oracle is float64 too, its sums included.
U = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-50}
# What may be lost to 0: the smallest subnormal of float16, which hardware keeps, and the smallest
# normal number of the others.
LOST = {"float16": 2.0**-24, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-1022}


class View(NamedTuple):
    """Arrays as the layer's formula sees them: what it pools, with the channels split in groups."""

    pooled: tuple[int, ...]
    split: Callable[[Any], np.ndarray]
    join: Callable[[np.ndarray], np.ndarray]


class Parts(NamedTuple):
    """What standardizes: y = gamma·(r·(x - mean)/stddev + d) + beta."""

    mean: np.ndarray
    stddev: np.ndarray
    r: Any = 1.0
    d: Any = 0.0
    r_error: Any = 0.0  # relative, beside that of the deviation
    d_error: Any = 0.0
    uses_batch: Any = True  # which channels the batch's own statistics standardize
    is_centered: bool = True  # whether the mean is subtracted, and so follows x


def bounds(
    layer: Any,
    weights: Arrays,
    x: np.ndarray,
    dy: np.ndarray,
    want: Expected,
    *,
    training: bool,
    mask: np.ndarray | None,
    x_dtype: str,
) -> Expected:
    """Return the tolerance of everything that the oracle wants."""
    w = np.broadcast_to(1.0 if mask is None else mask, x.shape)
    y, dx, sums = np.empty(x.shape), np.empty(x.shape), []
    for ghost in oracle.ghosts_of(layer, x, training):
        given = (layer, weights, x[ghost], dy[ghost], w[ghost])
        y[ghost], dx[ghost], found = _results(*given, training, x_dtype)
        sums.append(found)
    state = _parts(layer, weights, x, w, _view(layer, x.shape), training, _u(layer, x_dtype))[1]
    return Expected(
        _rounded(y, want.y, layer.compute_dtype),
        dx,
        {
            name: _rounded(sum(one[name] for one in sums), value, layer.variable_dtype)
            for name, value in want.gradients.items()
        },
        state,
    )


def _u(layer: Any, x_dtype: str) -> float:
    return U[statistics_dtype(x_dtype, layer.compute_dtype)]


def _results(
    layer: Any,
    weights: Arrays,
    x: np.ndarray,
    dy: np.ndarray,
    w: np.ndarray,
    training: bool,
    x_dtype: str,
) -> tuple[np.ndarray, np.ndarray, Arrays]:
    """Return the tolerances of y, dx and the gradients of what is learned, y's before rounding."""
    u = _u(layer, x_dtype)
    view = _view(layer, x.shape)
    parts, _ = _parts(layer, weights, x, w, view, training, u)
    w, z = view.split(w) * parts.uses_batch, np.abs(view.split(x) - parts.mean) / parts.stddev
    factor = "scale" if "scale" in weights else "gamma"
    gamma, beta = (
        view.split(np.abs(_spread(layer, weights.get(name, default), x.shape)))
        for name, default in ((factor, 1.0), ("beta", 0.0))
    )
    kappa, r, size = np.abs(parts.mean) / parts.stddev, np.abs(parts.r), view.split(np.abs(dy))
    v = 8 * u * (1 + kappa**2 * u)
    e = 8 * u * (1 + z + kappa) + v * z
    e_corrected = r * (e + (v + parts.r_error) * z) + parts.d_error
    e_corrected += 8 * u * (r * z + np.abs(parts.d))

    def mean(values: np.ndarray) -> np.ndarray:
        return np.sum(values, view.pooled, keepdims=True) * share

    n = np.sum(w, view.pooled, keepdims=True)
    share = w / np.where(n > 0, n, 1)

    g = gamma * r * size
    terms = g + np.where(w > 0, parts.is_centered * mean(g) + z * mean(g * z), 0)
    moved = np.where(w > 0, z * mean(g * e) + e * mean(g * z), 0)
    dx = (8 * u + 2 * v + parts.r_error + 3 * U[x_dtype]) * terms + moved
    dx = dx / parts.stddev + 3 * LOST[x_dtype]
    sums = {factor: view.join(size * e_corrected), "beta": view.join(8 * u * size)}
    others = pooled_axes(x.ndim, kept_axes(layer, x.ndim))
    y = view.join(gamma * e_corrected + 8 * u * beta)
    return y, view.join(dx), {name: values.sum(others) for name, values in sums.items()}


def _rounded(tolerance: np.ndarray, value: np.ndarray, dtype: str) -> np.ndarray:
    return tolerance + U[dtype] * (np.abs(value) + tolerance) + LOST[dtype]


def kept_axes(layer: Any, rank: int) -> tuple[int, ...]:
    """Return the kept axes, counted from 0."""
    axes = layer.axis if isinstance(layer.axis, tuple) else (layer.axis,)
    return tuple(sorted(axis % rank for axis in axes))


def pooled_axes(rank: int, kept: tuple[int, ...]) -> tuple[int, ...]:
    """Return the other axes."""
    return tuple(axis for axis in range(rank) if axis not in kept)


def _spread(layer: Any, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    kept = kept_axes(layer, len(shape))
    sizes = [n if axis in kept else 1 for axis, n in enumerate(shape)]
    return np.broadcast_to(np.broadcast_to(np.ravel(value), np.prod(sizes)).reshape(sizes), shape)


def _view(layer: Any, shape: tuple[int, ...]) -> View:
    kept = kept_axes(layer, len(shape))
    if hasattr(layer, "moving_mean"):
        return View(pooled_axes(len(shape), kept), np.asarray, np.asarray)
    if isinstance(layer, keras_bn.LayerNormalization | keras_bn.RMSNormalization):
        return View(kept, np.asarray, np.asarray)
    (axis,) = kept
    channels, groups = shape[axis], getattr(layer, "groups", -1)
    groups = channels if groups == -1 else groups

    def split(array: np.ndarray) -> np.ndarray:
        array = np.moveaxis(array, axis, 1)
        return array.reshape(array.shape[0], groups, channels // groups, *array.shape[2:])

    def join(array: np.ndarray) -> np.ndarray:
        return np.moveaxis(array.reshape(array.shape[0], channels, *array.shape[3:]), 1, axis)

    return View(tuple(range(2, len(shape) + 1)), split, join)


def _parts(
    layer: Any, weights: Arrays, x: np.ndarray, w: np.ndarray, view: View, training: bool, u: float
) -> tuple[Parts, Arrays]:
    """Return what standardizes, and the tolerances of the statistics after the call."""
    exact = reference.moments(view.split(x), view.pooled, view.split(w))
    state = {name: np.zeros(value.shape) for name, value in weights.items()}
    if isinstance(layer, keras_bn.RMSNormalization):
        square = np.mean(view.split(x) ** 2, view.pooled, keepdims=True)
        return Parts(0.0, np.sqrt(square + layer.epsilon), is_centered=False), state
    if not hasattr(layer, "moving_mean"):
        return Parts(exact.mean, np.sqrt(exact.variance + layer.epsilon)), state
    kept = {n: _spread(layer, v, exact.mean.shape) for n, v in weights.items() if v.ndim}
    mean, variance = kept["moving_mean"], kept["moving_variance"]
    if not training:
        return Parts(mean, np.sqrt(variance + layer.epsilon), uses_batch=False), state
    filled = exact.count > 0
    known = filled & np.isfinite(exact.mean) & np.isfinite(exact.m2)
    stddev = np.sqrt(np.where(filled, exact.variance, variance) + layer.epsilon)
    mean = np.where(filled, exact.mean, mean)
    r, d, after = oracle._kept_after(layer, weights, kept, exact, known)
    r, d = np.where(filled, r, 1.0), np.where(filled, d, 0.0)
    dtype = statistics_dtype(layer.variable_dtype)
    u_kept = max(u, U[dtype])
    r_error = d_error = 0.0
    if np.any(d) or np.any(r != 1):
        stddev_kept = np.sqrt(kept["moving_variance"] + layer.epsilon)
        if "renorm_stddev" in kept:
            stddev_kept = np.maximum(kept["renorm_stddev"], np.sqrt(layer.epsilon))
        r_error = 4 * u_kept
        d_error = 8 * u * (np.abs(d) + (np.abs(mean) + stddev) / stddev_kept)
        d_error += r_error * np.abs(d)
    for name, error in _state_errors(layer, kept, exact, known, stddev, u, u_kept).items():
        error = np.reshape(np.where(known, error, 0), state[name].shape)
        state[name] = np.where(error > 0, _rounded(error, after[name], dtype), 0)
    return Parts(mean, stddev, r, d, r_error, d_error, filled), state


def _state_errors(
    layer: Any,
    kept: Arrays,
    exact: Any,
    known: np.ndarray,
    stddev: np.ndarray,
    u: float,
    u_kept: float,
) -> Arrays:
    """Return how far the statistics that a training step moves may be off, before rounding."""
    mean, variance = np.abs(exact.mean), exact.variance
    mean_error = 8 * u * (mean + np.sqrt(variance))
    variance_error = 8 * u * (variance + u * mean**2)
    stddev_error = variance_error / stddev + 4 * u * stddev
    counts: Arrays = {}
    share = oracle._share(layer.momentum, "moving_count", kept, exact, known, counts)
    errors = {name: 4 * u_kept * count for name, count in counts.items()}

    def moved(old: np.ndarray, new: np.ndarray, error: np.ndarray, share: Any) -> np.ndarray:
        # A share that follows from a count is rounded itself.
        size = np.abs(old) + new if counts else share * np.abs(old) + (1 - share) * new
        return (1 - share) * error + 4 * u_kept * size + LOST["float64"]

    errors["moving_mean"] = moved(kept["moving_mean"], mean, mean_error, share)
    if not hasattr(layer, "rmax") and not layer.renorm:
        old = kept["moving_variance"]
        error = moved(old, oracle._variance_to_keep(layer, exact), variance_error, share)
        if layer.momentum is None:
            between = _between_error(exact.mean, kept["moving_mean"], mean_error, u_kept)
            error += share * (1 - share) * between
        return errors | {"moving_variance": error}
    old = kept.get("moving_stddev", np.sqrt(kept["moving_variance"] + layer.epsilon))
    error = moved(old, stddev, stddev_error, share)
    size = np.maximum(old, stddev)
    errors["moving_variance"] = 2 * size * error + 4 * u_kept * size**2
    if not hasattr(layer, "rmax"):
        errors["moving_stddev"] = error
        for name, new, own in (
            ("renorm_mean", mean, mean_error),
            ("renorm_stddev", stddev, stddev_error),
        ):
            errors[name] = moved(kept[name], new, own, layer.renorm_momentum)
    return errors


def _between_error(
    mean: np.ndarray, old: np.ndarray, mean_error: np.ndarray, u: float
) -> np.ndarray:
    """Return how far the square of the distance of two means may be off."""
    distance = np.abs(mean - old)
    return (8 * u * distance + 2 * (mean_error + 4 * u * (np.abs(mean) + np.abs(old)))) * distance

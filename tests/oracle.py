"""What a layer must compute: its float64 result, from its options, weights and input.

Built from `keras_bn.kernels.reference` alone; knows nothing of how the layers do it.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from keras_bn.kernels import reference

Arrays = dict[str, np.ndarray]


@dataclass
class Expected:
    """The output, the gradients of sum(dy * y), and the weights after the call, by name."""

    y: np.ndarray
    dx: np.ndarray
    gradients: Arrays
    state: Arrays = field(default_factory=dict)


def weights_by_name(layer: Any) -> Arrays:
    """Return copies of a built layer's weights in float64, by their last name."""
    return {
        variable.name: np.array(value, "float64")
        for variable, value in zip(layer.weights, layer.get_weights(), strict=True)
    }


def expected(
    layer: Any,
    weights: Arrays,
    x: np.ndarray,
    dy: np.ndarray,
    *,
    training: bool,
    mask: np.ndarray | None = None,
) -> Expected:
    """Return what the layer must give for these weights (those before the call).

    `mask` is None or has the rank of `x` (1 where it is broadcast).
    """
    x = np.asarray(x, "float64")
    dy = np.asarray(dy, "float64")
    rule = {
        "BatchNormalization": _batch,
        "BatchRenormalization": _batch,
        "FeatureScaling": _scaling,
        "GroupNormalization": _group,
    }[type(layer).__name__]
    return rule(layer, weights, x, dy, training, mask)


def _kept(layer: Any, rank: int) -> tuple[int, ...]:
    axes = layer.axis if isinstance(layer.axis, tuple) else (layer.axis,)
    return tuple(sorted(axis % rank for axis in axes))


def _spread(array: np.ndarray, shape: tuple[int, ...], kept: tuple[int, ...]) -> np.ndarray:
    return np.reshape(array, [n if axis in kept else 1 for axis, n in enumerate(shape)])


def _group(layer, weights, x, dy, training, mask) -> Expected:
    """Group normalization in the textbook form: split the channels, sum over the rest."""
    (axis,) = _kept(layer, x.ndim)
    channels = x.shape[axis]
    groups = channels if layer.groups == -1 else layer.groups

    def split(array):
        array = np.moveaxis(np.broadcast_to(array, x.shape), axis, 1)
        return array.reshape(array.shape[0], groups, channels // groups, *array.shape[2:])

    def join(array):
        return np.moveaxis(array.reshape(array.shape[0], channels, *array.shape[3:]), 1, axis)

    gamma = _spread(weights.get("gamma", np.ones(channels)), x.shape, (axis,))
    beta = _spread(weights.get("beta", np.zeros(channels)), x.shape, (axis,))
    pooled = tuple(range(2, x.ndim + 1))
    options = {
        "gamma": split(gamma),
        "epsilon": layer.epsilon,
        "weights": None if mask is None else split(mask),
    }
    y = reference.normalize(split(x), pooled, beta=split(beta), **options)
    dx, d_gamma, d_beta = reference.gradients(split(x), split(dy), pooled, **options)
    others = tuple(a for a in range(x.ndim) if a != axis)
    sums = {"gamma": join(d_gamma).sum(others), "beta": join(d_beta).sum(others)}
    return Expected(join(y), join(dx), _present(sums, weights))


def _scaling(layer, weights, x, dy, training, mask) -> Expected:
    names = ("mean", "stddev", "minimum", "maximum", "count")
    kept = () if layer.axis is None else _kept(layer, x.ndim)
    whole = [weights[name] + weights["offsets"][0][row] for row, name in enumerate(names)]
    mean, stddev, minimum, maximum, _ = (_spread(value, x.shape, kept) for value in whole)
    center = minimum if layer.mode == "min_max" else mean
    width = stddev if layer.mode == "standard" else maximum - minimum
    if layer.inverse:
        return Expected(x * width + center, dy * width, {}, weights)
    return Expected((x - center) / width, dy / width, {}, weights)


def _batch(layer, weights, x, dy, training, mask) -> Expected:
    kept = _kept(layer, x.ndim)
    pooled = tuple(axis for axis in range(x.ndim) if axis not in kept)
    w = {name: _spread(value, x.shape, kept) for name, value in weights.items() if value.ndim}
    gamma, beta = w.get("gamma", np.float64(1)), w.get("beta", np.float64(0))
    epsilon = layer.epsilon
    exact = reference.moments(x, pooled, mask)
    known = (exact.count > 0) & np.isfinite(exact.mean) & np.isfinite(exact.m2)
    use_batch = training & (np.broadcast_to(exact.count, exact.mean.shape) > 0)
    if not training or not np.any(use_batch):
        scale = 1 / np.sqrt(w["moving_variance"] + epsilon)
        z = (x - w["moving_mean"]) * scale
        sums = {"gamma": (dy * z).sum(pooled), "beta": dy.sum(pooled)}
        return Expected(gamma * z + beta, dy * gamma * scale, _present(sums, weights), weights)
    r, d, state = _kept_after(layer, weights, w, exact, known)
    options = {"gamma": gamma, "epsilon": epsilon, "weights": mask, "r": r, "d": d}
    y = reference.normalize(x, pooled, beta=beta, **options)
    dx, d_gamma, d_beta = reference.gradients(x, dy, pooled, **options)
    sums = {"gamma": d_gamma.sum(pooled), "beta": d_beta.sum(pooled)}
    return Expected(y, dx, _present(sums, weights), state)


def _kept_after(layer, weights, w, exact, known) -> tuple[Any, Any, Arrays]:
    """Return r, d and the weights after a training step."""
    epsilon, stddev = layer.epsilon, np.sqrt(exact.variance + layer.epsilon)

    def moved(old, new, momentum):
        return np.where(known, old * momentum + new * (1 - momentum), old)

    new = {"moving_mean": moved(w["moving_mean"], exact.mean, layer.momentum)}
    r, d = 1.0, 0.0
    if type(layer).__name__ == "BatchRenormalization":
        kept = np.sqrt(w["moving_variance"] + epsilon)
        r_max = _ramp(weights["step"], 1.0, layer.rmax, layer.rmax_steps)
        d_max = _ramp(weights["step"], 0.0, layer.dmax, layer.dmax_steps)
        r = np.clip(stddev / kept, 1 / r_max, r_max)
        d = np.clip((exact.mean - w["moving_mean"]) / kept, -d_max, d_max)
        variance = np.maximum(moved(kept, stddev, layer.momentum) ** 2 - epsilon, 0)
        new["moving_variance"] = np.where(known, variance, w["moving_variance"])
        new["step"] = weights["step"] + np.any(known)
    elif layer.renorm:
        limits = layer.renorm_clipping or {}
        limit = {key: np.inf if value is None else value for key, value in limits.items()}
        kept = np.maximum(w["renorm_stddev"], np.sqrt(epsilon))
        r = np.clip(stddev / kept, limit.get("rmin", 0), limit.get("rmax", np.inf))
        d_max = limit.get("dmax", np.inf)
        d = np.clip((exact.mean - w["renorm_mean"]) / kept, -d_max, d_max)
        new["renorm_mean"] = moved(w["renorm_mean"], exact.mean, layer.renorm_momentum)
        new["renorm_stddev"] = moved(w["renorm_stddev"], stddev, layer.renorm_momentum)
        new["moving_stddev"] = moved(w["moving_stddev"], stddev, layer.momentum)
        variance = np.maximum(new["moving_stddev"] ** 2 - epsilon, 0)
        new["moving_variance"] = np.where(known, variance, w["moving_variance"])
    else:
        new["moving_variance"] = moved(w["moving_variance"], exact.variance, layer.momentum)
    return r, d, {**weights, **{k: np.reshape(v, weights[k].shape) for k, v in new.items()}}


def _ramp(step, start, end, steps) -> float:
    if steps is None:
        return end
    first, last = steps
    return start + (end - start) * float(np.clip((step - first) / max(last - first, 1), 0, 1))


def _present(sums: Arrays, weights: Arrays) -> Arrays:
    return {name: value for name, value in sums.items() if name in weights}

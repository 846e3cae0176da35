"""What a layer must compute: its float64 result, from its options, weights and input.

Built from `keras_bn.kernels.reference` alone; knows nothing of how the layers do it.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from keras_bn.kernels import reference

Arrays = dict[str, np.ndarray]
UNLIMITED = (("rmax", np.inf), ("dmax", np.inf))


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
        "FixupBias": _scalar,
        "FixupScale": _scalar,
        "GroupNormalization": _group,
        "InstanceNormalization": _group,
        "LayerNormalization": _layer,
        "RMSNormalization": _rms,
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
    groups = getattr(layer, "groups", -1)
    groups = channels if groups == -1 else groups

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


def _layer(layer, weights, x, dy, training, mask) -> Expected:
    axes = _kept(layer, x.ndim)
    others = tuple(axis for axis in range(x.ndim) if axis not in axes)
    w = {name: _spread(value, x.shape, axes) for name, value in weights.items()}
    options = {"gamma": w.get("gamma", np.float64(1)), "epsilon": layer.epsilon}
    y = reference.normalize(x, axes, beta=w.get("beta", np.float64(0)), **options)
    dx, d_gamma, d_beta = reference.gradients(x, dy, axes, **options)
    sums = {"gamma": d_gamma.sum(others), "beta": d_beta.sum(others)}
    return Expected(y, dx, _present(sums, weights))


def _rms(layer, weights, x, dy, training, mask) -> Expected:
    axes = _kept(layer, x.ndim)
    others = tuple(axis for axis in range(x.ndim) if axis not in axes)
    scale = _spread(weights["scale"], x.shape, axes)
    root = np.sqrt(np.mean(x**2, axes, keepdims=True) + layer.epsilon)
    dx = (scale * dy - x * np.mean(scale * dy * x, axes, keepdims=True) / root**2) / root
    return Expected(scale * x / root, dx, {"scale": (dy * x / root).sum(others)})


def _scalar(_layer, weights, x, dy, _training, _mask) -> Expected:
    gamma, beta = weights.get("gamma", np.float64(1)), weights.get("beta", np.float64(0))
    sums = {"gamma": (dy * x).sum(), "beta": dy.sum()}
    return Expected(gamma * x + beta, gamma * dy, _present(sums, weights))


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


def ghosts_of(layer: Any, x: np.ndarray, training: bool) -> list[slice]:
    """Return the samples of each ghost, or all of them in one."""
    size = (training and getattr(layer, "virtual_batch_size", None)) or max(len(x), 1)
    number = max(-(-len(x) // size), 1)
    return [np.s_[i::number] for i in range(number)]


def _batch(layer, weights, x, dy, training, mask) -> Expected:
    """Normalize each ghost by its own moments, and keep what all of them together have."""
    ghosts = ghosts_of(layer, x, training)
    if len(ghosts) == 1:
        return _whole(layer, weights, x, dy, training, mask)
    kept = _kept(layer, x.ndim)
    pooled = tuple(axis for axis in range(x.ndim) if axis not in kept)
    mask = np.broadcast_to(1.0 if mask is None else mask, x.shape)
    y, dx, gradients = np.empty_like(x), np.empty_like(x), []
    for ghost in ghosts:
        found = _whole(layer, weights, x[ghost], dy[ghost], True, mask[ghost])
        y[ghost], dx[ghost] = found.y, found.dx
        gradients.append(found.gradients)
    sums = {name: sum(one[name] for one in gradients) for name in gradients[0]}
    w = {name: _spread(value, x.shape, kept) for name, value in weights.items() if value.ndim}
    whole = reference.moments(x, pooled, mask)
    return Expected(y, dx, sums, _kept_after(layer, weights, w, whole, _known(whole))[2])


def _known(exact) -> np.ndarray:
    return (exact.count > 0) & np.isfinite(exact.mean) & np.isfinite(exact.m2)


def _whole(layer, weights, x, dy, training, mask) -> Expected:
    kept = _kept(layer, x.ndim)
    pooled = tuple(axis for axis in range(x.ndim) if axis not in kept)
    w = {name: _spread(value, x.shape, kept) for name, value in weights.items() if value.ndim}
    gamma, beta = w.get("gamma", np.float64(1)), w.get("beta", np.float64(0))
    epsilon = layer.epsilon
    scale = 1 / np.sqrt(w["moving_variance"] + epsilon)
    z = (x - w["moving_mean"]) * scale
    sums = {"gamma": (dy * z).sum(pooled), "beta": dy.sum(pooled)}
    stored = Expected(gamma * z + beta, dy * gamma * scale, _present(sums, weights), weights)
    if not training:
        return stored
    exact = reference.moments(x, pooled, mask)
    r, d, state = _kept_after(layer, weights, w, exact, _known(exact))
    options = {"gamma": gamma, "epsilon": epsilon, "weights": mask, "r": r, "d": d}
    y = reference.normalize(x, pooled, beta=beta, **options)
    dx, d_gamma, d_beta = reference.gradients(x, dy, pooled, **options)
    sums = {"gamma": d_gamma.sum(pooled), "beta": d_beta.sum(pooled)}
    # A channel that the mask leaves empty is normalized as in inference.
    filled = np.broadcast_to(exact.count, exact.mean.shape) > 0
    return Expected(
        np.where(filled, y, stored.y),
        np.where(filled, dx, stored.dx),
        {
            name: np.where(filled.reshape(value.shape), sums[name], value)
            for name, value in stored.gradients.items()
        },
        state,
    )


def _kept_after(layer, weights, w, exact, known) -> tuple[Any, Any, Arrays]:
    """Return r, d and the weights after a training step."""
    epsilon, new = layer.epsilon, {}
    variance = _variance_to_keep(layer, exact)
    stddev = np.sqrt(variance + epsilon)

    def moved(name, value, share):
        return np.where(known, w[name] * share + value * (1 - share), w[name])

    r, d = _correction(layer, weights, w, exact)
    share = _share(layer.momentum, "moving_count", w, exact, known, new)
    new["moving_mean"] = moved("moving_mean", exact.mean, share)
    if type(layer).__name__ == "BatchRenormalization":
        old = np.sqrt(w["moving_variance"] + epsilon)
        variance = np.maximum((old * share + stddev * (1 - share)) ** 2 - epsilon, 0)
        new["moving_variance"] = np.where(known, variance, w["moving_variance"])
        new["step"] = weights["step"] + np.any(known)
    elif layer.renorm:
        renorm_share = _share(layer.renorm_momentum, "renorm_count", w, exact, known, new)
        new["renorm_mean"] = moved("renorm_mean", exact.mean, renorm_share)
        new["renorm_stddev"] = moved("renorm_stddev", stddev, renorm_share)
        new["moving_stddev"] = moved("moving_stddev", stddev, share)
        variance = np.maximum(new["moving_stddev"] ** 2 - epsilon, 0)
        new["moving_variance"] = np.where(known, variance, w["moving_variance"])
    elif layer.momentum is None:
        new |= _merged(layer, w, exact, known)
    else:
        new["moving_variance"] = moved("moving_variance", variance, share)
    return r, d, {**weights, **{k: np.reshape(v, weights[k].shape) for k, v in new.items()}}


def _correction(layer, weights, w, exact) -> tuple[Any, Any]:
    """Return r and d: 1 and 0 without renormalization, and before anything is counted."""
    stddev = np.sqrt(exact.variance + layer.epsilon)
    if type(layer).__name__ == "BatchRenormalization":
        mean, kept = w["moving_mean"], np.sqrt(w["moving_variance"] + layer.epsilon)
        r_max = _ramp(weights["step"], 1.0, layer.rmax, layer.rmax_steps)
        d_max = _ramp(weights["step"], 0.0, layer.dmax, layer.dmax_steps)
        r_min, count = 1 / r_max, w.get("moving_count", 1)
    elif layer.renorm:
        mean, kept = w["renorm_mean"], np.maximum(w["renorm_stddev"], np.sqrt(layer.epsilon))
        limits = layer.renorm_clipping or {}
        limit = {key: np.inf if value is None else value for key, value in limits.items()}
        r_min, r_max, d_max = (limit.get(k, v) for k, v in (("rmin", 0), *UNLIMITED))
        count = w.get("renorm_count", 1)
    else:
        return 1.0, 0.0
    r = np.clip(stddev / kept, r_min, r_max)
    d = np.clip((exact.mean - mean) / kept, -d_max, d_max)
    nothing = np.equal(count, 0)
    return np.where(nothing, 1.0, r), np.where(nothing, 0.0, d)


def _degrees_of_freedom(count) -> Any:
    """Return count - 1, but at least the count itself or 1, whichever is less."""
    return np.maximum(count - 1, np.minimum(count, 1))


def _variance_to_keep(layer, exact) -> Any:
    if not layer.unbiased:
        return exact.variance
    divisor = _degrees_of_freedom(exact.count)
    return exact.m2 / np.where(divisor > 0, divisor, 1)


def _share(momentum, name, w, exact, known, new) -> Any:
    """Return the share of the old statistics; add the count to `new` where there is one."""
    if name not in w:
        return momentum
    weight = exact.count if momentum is None else 1.0
    total = w[name] * (1.0 if momentum is None else momentum) + weight
    new[name] = np.where(known, total, w[name])
    return 1 - weight / np.where(total > 0, total, 1)


def _merged(layer, w, exact, known) -> Arrays:
    """Return the moments of all samples so far."""
    count, mean, variance = w["moving_count"], w["moving_mean"], w["moving_variance"]
    divisor = _degrees_of_freedom(count) if layer.unbiased else count
    whole = reference.merge([reference.Exact(count, mean, variance * divisor), exact])
    return {
        "moving_mean": np.where(known, whole.mean, mean),
        "moving_variance": np.where(known, _variance_to_keep(layer, whole), variance),
    }


def _ramp(step, start, end, steps) -> float:
    if steps is None:
        return end
    first, last = steps
    return start + (end - start) * float(np.clip((step - first) / max(last - first, 1), 0, 1))


def _present(sums: Arrays, weights: Arrays) -> Arrays:
    return {name: value for name, value in sums.items() if name in weights}

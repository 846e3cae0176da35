"""A seed is a case: a layer, its weights, an input, a mask and a mode, drawn at random.

Three neighbouring seeds share their structure, which is what a compiler compiles, and differ in
data, weights and the values of the mask.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import ml_dtypes
import numpy as np

from keras_bn.core.dtypes import statistics_dtype
from keras_bn.kernels import reference
from tests import oracle
from tests.fuzzing.bounds import bounds
from tests.fuzzing.differentiate import array, tensor
from tests.fuzzing.structures import Structure, pick, structure, wide_numbers
from tests.oracle import Arrays, Expected

SEEDS_PER_STRUCTURE = 3
ROUNDING = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
DATA = {
    "plain": 20,
    "offset": 25,
    "tiny": 10,
    "huge": 10,
    "constant": 12,
    "outlier": 15,
    "not finite": 8,
}


@dataclass
class Case:
    """The arrays of one seed, in float64 but exact in the dtypes of the call."""

    x: np.ndarray
    dy: np.ndarray
    mask: np.ndarray | None
    weights: Arrays
    kind: str


def draw(seed: int) -> Case:
    """Draw the arrays of a seed, and set the layer's weights."""
    made = structure(seed // SEEDS_PER_STRUCTURE)
    rng = np.random.default_rng([seed, 2])
    kind = pick(rng, DATA)
    x = _rounded(_data(rng, kind, made), made.x_dtype)
    dy = _rounded(rng.normal(size=made.shape), made.layer.compute_dtype)
    mask = _mask(rng, made)
    if made.mask == "hides":
        hidden = np.broadcast_to(mask.reshape(made.mask_aligned) == 0, x.shape)
        x = np.where(hidden, rng.choice([np.nan, np.inf, -np.inf], x.shape), x)
        # A loss does not look there either.
        dy = np.where(hidden, 0.0, dy)
    _set_weights(rng, made, x)
    return Case(x, dy, mask, oracle.weights_by_name(made.layer), kind)


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return what a dtype holds of the values, in float64."""
    dtype = ROUNDING.get(dtype, dtype)
    largest = 0.9 * float(ml_dtypes.finfo(dtype).max)
    values = np.where(np.isfinite(values), np.clip(values, -largest, largest), values)
    return values.astype(dtype).astype("float64")


def _data(rng: np.random.Generator, kind: str, made: Structure) -> np.ndarray:
    z, narrow = rng.normal(size=made.shape), made.x_dtype == "float16"
    sizes = [1 if axis in made.pooled else size for axis, size in enumerate(made.shape)]
    # Where channels are pooled, what differs between them must not hide what is in them.
    std = 10 ** rng.uniform(-1, 1, sizes) if hasattr(made.layer, "moving_mean") else 1.0
    mean = rng.normal(size=sizes) * std
    if kind == "offset":
        mean = std * (mean / 10 + 10 ** rng.uniform(0, 5) * rng.choice([-1, 1]))
    if kind == "tiny":
        std, mean = (part * 10 ** rng.uniform(-7 if narrow else -20, -3) for part in (std, mean))
    if kind == "huge":
        std, mean = (part * 10 ** rng.uniform(3, 4 if narrow else 14) for part in (std, mean))
    if kind == "constant":
        std, mean = 0.0, mean * 10 ** rng.uniform(-3, 5)
    x = mean + std * z
    if kind == "outlier":
        x.flat[rng.integers(max(x.size, 1)) :][:1] *= 10 ** rng.uniform(2, 5)
    if kind == "not finite":
        x.flat[rng.integers(max(x.size, 1)) :][:1] = rng.choice([np.nan, np.inf, -np.inf])
    return x


def _mask(rng: np.random.Generator, made: Structure) -> np.ndarray | None:
    if made.mask == "none":
        return None
    if made.mask == "nothing":
        return np.zeros(made.mask_shape)
    kept = (rng.random(made.mask_shape) < rng.choice([0.3, 0.8])).astype("float64")
    weights = rng.uniform(0.1, 3, kept.shape).astype("float32")
    return kept * weights if made.mask == "weights" else kept


def _set_weights(rng: np.random.Generator, made: Structure, x: np.ndarray) -> None:
    """Set weights as after some training: the statistics near those of the data, or far away."""
    exact = reference.moments(np.where(np.isfinite(x), x, 0), made.pooled)
    far = rng.choice([0.0, 0.3, 3.0])
    with wide_numbers(made):
        for variable in made.layer.weights:
            noise = rng.normal(size=variable.shape)
            value = _weight(variable.name.rsplit("_", 1)[-1], noise, far, exact)
            variable.assign(tensor(value, variable.dtype))


def _weight(kind: str, noise: np.ndarray, far: float, exact: reference.Exact) -> Any:
    if kind == "step":
        return np.abs(5 * noise)
    if kind == "count":
        return np.where(noise > 1, 0, 20 * np.abs(noise))
    if kind in ("gamma", "scale", "beta"):
        return noise if kind == "beta" else 1 + 0.5 * noise
    variance = exact.variance.reshape(noise.shape) + 1e-6
    if kind == "mean":
        return exact.mean.reshape(noise.shape) + far * noise * np.sqrt(variance)
    return variance ** {"variance": 1, "stddev": 0.5}[kind] * 2 ** (far * noise)


class Finding(NamedTuple):
    """The largest error of a case in units of its tolerance: above 1 the case has failed."""

    ratio: float
    text: str


def judge(seed: int) -> Finding:
    """Run a case and compare all that the oracle wants."""
    case, made = draw(seed), structure(seed // SEEDS_PER_STRUCTURE)
    found = _found(made, case)
    with np.errstate(all="ignore"):  # of inputs that are not finite
        want, tolerance = _wanted(made, case)
        findings = [
            _compared(what, *(_part(result, what) for result in (found, want, tolerance)), dtype)
            for what, dtype in _judged(made, found)
        ]
    worst = max(findings)
    return Finding(worst.ratio, f"seed {seed}: {worst.text}\n{made}, {case.kind}")


def _judged(made: Structure, found: Expected) -> Iterator[tuple[str, str]]:
    """Name what is compared, with its dtype."""
    layer = made.layer
    yield from (("y", layer.compute_dtype), ("dx", made.x_dtype))
    yield from ((f"gradients {name}", layer.variable_dtype) for name in found.gradients)
    yield from ((f"state {name}", statistics_dtype(layer.variable_dtype)) for name in found.state)


def _part(result: Expected, what: str) -> np.ndarray:
    part, *name = what.split()
    return getattr(result, part)[name[0]] if name else getattr(result, part)


def _compared(
    what: str, found: np.ndarray, want: np.ndarray, tolerance: np.ndarray, dtype: str
) -> Finding:
    if found.shape != want.shape:
        return Finding(np.inf, f"{what} has shape {found.shape}, not {want.shape}")
    if not found.size:
        return Finding(0.0, what)
    largest = float(ml_dtypes.finfo(ROUNDING.get(dtype, dtype)).max)
    limited = (np.clip(values, -largest, largest) for values in (found, want))
    error = np.abs(np.subtract(*limited))
    ratio = np.where(error > 0, error / tolerance, 0.0)
    # A NaN or an infinity must show, as either; and must not come from nowhere.
    ratio = np.where(np.isfinite(want), ratio, np.where(np.isfinite(found), np.inf, 0.0))
    ratio = np.where(np.isnan(ratio), np.inf, ratio)
    at = np.unravel_index(np.argmax(ratio), ratio.shape)
    values = f"{found[at]!r}, not {want[at]!r} to {tolerance[at]:.3g}"
    return Finding(float(ratio[at]), f"{what}{[int(i) for i in at]} is {values}")


def _found(made: Structure, case: Case) -> Expected:
    layer, mask = made.layer, case.mask
    with wide_numbers(made), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* trains on one element per channel")
        x, dy = tensor(case.x, made.x_dtype), tensor(case.dy, layer.compute_dtype)
        mask = None if mask is None else tensor(mask, made.mask_dtype)
        y, dx, gradients = made.differentiated(x, dy, mask)
        for value, dtype in ((y, layer.compute_dtype), (dx, made.x_dtype)):
            assert keras.backend.standardize_dtype(value.dtype) == dtype
        names = [variable.name for variable in layer.trainable_variables]
        found = {name: array(g) for name, g in zip(names, gradients, strict=True)}
        return Expected(array(y), array(dx), found, oracle.weights_by_name(layer))


def _wanted(made: Structure, case: Case) -> tuple[Expected, Expected]:
    """Return what the oracle wants, and how far off it the layer may be."""
    layer, mask, x = made.layer, case.mask, case.x
    if mask is not None:
        mask = np.reshape(mask, made.mask_aligned)
        x = np.where((mask == 0) & ~np.isfinite(x), 0.0, x)
    arguments = layer, case.weights, x, case.dy
    want = oracle.expected(*arguments, training=made.is_trained, mask=mask)
    want.state = case.weights | want.state
    tolerance = bounds(*arguments, want, training=made.is_trained, mask=mask, x_dtype=made.x_dtype)
    return want, tolerance

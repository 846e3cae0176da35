"""Weights are counts: what a mask takes out is not there, whatever it is."""

from typing import Any

import numpy as np
import pytest
from keras import ops

from keras_bn import kernels
from keras_bn.kernels import generic, reference
from tests.kernels import hard, modes

U = hard.unit_roundoff("float32")
SHAPE = (16, 9, 10)

IMPLEMENTATIONS = [
    pytest.param(kernels, id=modes.BACKEND),
    pytest.param(generic, id="generic"),
]

RUNS = [pytest.param(kernels, mode, id=f"{modes.BACKEND}-{mode}") for mode in modes.EXTREMES]
RUNS += [pytest.param(generic, "eager", id="generic-eager")]


def _random(kind: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(1)
    weights = rng.uniform(0, 2, shape) if kind == "fractional" else np.ones(shape)
    return (weights * (rng.uniform(size=shape) < 0.6)).astype("float32")


WEIGHTS = {
    "0 and 1": _random("binary", (16, 9, 1)),
    "fractional": _random("fractional", (16, 9, 1)),
    "one per sample": _random("fractional", (16, 1, 1)),
    "one per position": _random("fractional", (1, 9, 1)),
    "one per element": _random("fractional", SHAPE),
    "large": 1e6 * _random("fractional", (16, 9, 1)),
    "all 1": np.ones((1, 1, 1), "float32"),
}


def moments(kernel: Any, mode: str, x: np.ndarray, weights: np.ndarray, axes=(0, 1)) -> Any:
    def function(x, weights):
        found = kernel.moments(x, axes, weights)
        return found.count, found.mean, found.m2

    return reference.Exact(*modes.call(mode, function, [x, weights]))


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_weighted_variance_is_within_the_bound(kernel, kind):
    x, weights = hard.channels(SHAPE, 2), WEIGHTS[kind]
    exact = reference.moments(x, (0, 1), weights)
    found = moments(kernel, "eager", x, weights)
    assert hard.share(found.variance - exact.variance, hard.variance_bound(exact, U)) <= 1
    assert hard.share(found.count - exact.count, 8 * U * exact.count) <= 1


@pytest.mark.parametrize("mode", modes.FORWARD)
def test_weighted_variance_is_within_the_bound_in_every_mode(mode):
    x, weights = hard.channels(SHAPE, 2), WEIGHTS["fractional"]
    exact = reference.moments(x, (0, 1), weights)
    found = moments(kernels, mode, x, weights)
    assert hard.share(found.variance - exact.variance, hard.variance_bound(exact, U)) <= 1


@pytest.mark.parametrize("mode", modes.EXTREMES)
@pytest.mark.parametrize("size", [17, 1001])
def test_what_a_count_loses_is_not_multiplied(mode, size):
    rng = np.random.default_rng(size)
    weights = rng.uniform(0.1, 3, (size, 64, 1)) * (rng.uniform(size=(size, 64, 1)) < 0.5)
    x, weights = hard.channels((size, 64, 16), 1), weights.astype("float32")
    # Sums may be about the first element, here two to three deviations off.
    weights[0] = 1.3
    x[0] = x.mean(0) + np.linspace(2, 3, 16, dtype="float32") * x.std(0)
    exact = reference.moments(x, (0,), weights)
    found = moments(kernels, mode, x, weights, axes=(0,))
    assert hard.share(found.count - exact.count, 1.1 * U * exact.count) <= 1
    assert hard.share(found.variance - exact.variance, hard.variance_bound(exact, U)) <= 1


@pytest.mark.parametrize("mode", modes.EXTREMES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_weighted_variance_is_within_the_bound_of_the_dtype(mode, dtype):
    x = hard.channels(SHAPE, 2, dtype)
    wide = "float64" if dtype == "float64" else "float32"
    weights = WEIGHTS["fractional"].astype(wide)
    exact = reference.moments(x, (0, 1), weights)
    found = moments(kernels, mode, x, weights)
    bound = hard.variance_bound(exact, hard.unit_roundoff(wide))
    assert hard.share(found.variance - exact.variance, bound) <= 1


@pytest.mark.parametrize(("kernel", "mode"), RUNS)
@pytest.mark.parametrize("rubbish", [np.nan, np.inf, -3e38], ids=str)
def test_what_lies_under_a_0_does_not_matter(kernel, mode, rubbish):
    x, weights = hard.channels(SHAPE, 2), WEIGHTS["fractional"]
    clean = moments(kernel, mode, np.where(weights > 0, x, 0), weights)
    found = moments(kernel, mode, np.where(weights > 0, x, np.float32(rubbish)), weights)
    assert np.array_equal(found, clean)


@pytest.mark.parametrize(("kernel", "mode"), RUNS)
def test_all_zero_weights_make_an_empty_set(kernel, mode):
    x = hard.channels(SHAPE, 2)
    x[3] = np.nan
    found = moments(kernel, mode, x, np.zeros((16, 1, 1), "float32"))
    assert np.array_equal(found, np.zeros((3, 1, 1, 10)))


@pytest.mark.parametrize("mode", modes.EXTREMES)
def test_half_a_million_weights_are_counted_exactly(mode):
    x, weights = hard.channels((524288, 3), 1), np.ones((524288, 1), "float32")
    weights[::3] = 0
    exact = reference.moments(x, (0,), weights)
    found = moments(kernels, mode, x, weights, axes=(0,))
    assert np.array_equal(found.count, exact.count)
    assert hard.share(found.variance - exact.variance, hard.variance_bound(exact, U)) <= 1


@pytest.mark.skipif(not modes.DIFFERENTIABLE, reason="this backend has no gradients")
@pytest.mark.parametrize("mode", modes.EXTREMES)
@pytest.mark.parametrize("rubbish", [0.0, np.nan, np.inf], ids=str)
def test_the_gradient_under_a_0_is_0(mode, rubbish):
    weights = WEIGHTS["fractional"]
    x = np.where(weights > 0, hard.channels(SHAPE, 2), np.float32(rubbish))
    given = modes.tensor(weights)

    def function(x):
        found = kernels.moments(x, (0, 1), given)
        return ops.sum(3.0 * found.mean + found.m2)

    exact = reference.moments(x, (0, 1), weights)
    centered = np.where(weights > 0, x - exact.mean, 0)
    dx = weights * (3 / exact.count + 2 * centered)
    (found,) = modes.gradients(mode, function, [x])
    # The mean is off by u of the deviations that it is a mean of, and they by u of the mean.
    spread = np.sqrt(exact.variance) + U * np.abs(exact.mean)
    assert hard.share(found - dx, 8 * U * (np.abs(dx) + weights * spread)) <= 1


@pytest.mark.skipif(not modes.DIFFERENTIABLE, reason="this backend has no gradients")
def test_weights_carry_no_gradient():
    x, weights = hard.channels(SHAPE, 2, "float64"), WEIGHTS["fractional"].astype("float64")

    def function(x, weights):
        found = kernels.moments(x, (0, 1), weights)
        return ops.sum(found.mean + found.m2) + 0.0 * ops.sum(weights)

    assert not np.any(modes.gradients("eager", function, [x, weights])[1])

"""The kernels' gradients: against the float64 reference, and against finite differences."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from keras import ops

from keras_bn import kernels
from keras_bn.core.affine import Affine, compose, standardize
from keras_bn.kernels import generic, reference
from tests.kernels import hard, modes

pytestmark = pytest.mark.skipif(not modes.DIFFERENTIABLE, reason="this backend has no gradients")

IMPLEMENTATIONS = {modes.BACKEND: kernels, "generic": generic}
U = hard.unit_roundoff("float32")

# The shape, and the axis that is kept.
CASES = {
    "conv": ((4, 14, 14, 10), 3),
    "channels in the middle": ((16, 10, 51), 1),
    "prime sizes": ((31, 37, 3), 2),
}


class Given(NamedTuple):
    """What `loss` takes."""

    x: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    dy: np.ndarray


def given(case: str, dtype: str = "float32", kinds: dict | None = None) -> tuple[Given, int]:
    """Return the arguments of `loss` and the axis that is kept."""
    rng = np.random.default_rng(2)
    shape, kept = CASES[case]
    sizes = [n if axis == kept else 1 for axis, n in enumerate(shape)]
    wide = "float64" if dtype == "float64" else "float32"
    gamma, beta = (rng.normal(1, 0.3, sizes).astype(wide) for _ in "gb")
    dy = rng.normal(0.1, 1, shape).astype(hard.numpy_dtype(dtype))
    return Given(hard.channels(shape, kept, dtype, kinds), gamma, beta, dy), kept


def loss_of(kernel: Any, axes: tuple[int, ...], dtype: str, weights: Any = None) -> Callable:
    """Return the function Σ dy·y of a layer in training."""
    with modes.precision(weights):
        weights = modes.tensor(weights)

    def loss(x: Any, gamma: Any, beta: Any, dy: Any) -> Any:
        moments = kernel.moments(x, axes, weights)
        affine = compose(standardize(moments, hard.EPSILON), gamma, beta)
        y = kernel.apply(x, affine, dtype)
        return ops.sum(ops.cast(y, gamma.dtype) * ops.cast(dy, gamma.dtype))

    return loss


def largest_share(found: Any, arguments: Given, kept: int, weights: Any = None) -> float:
    """Return the largest share of its bound that an error of dx, d_gamma or d_beta uses up."""
    x, gamma, _, dy = (np.asarray(array, "float64") for array in arguments)
    axes = hard.others(x.ndim, kept)
    # Nothing here depends on the mean, and without it the reference is exact in float64, too.
    x = x - np.mean(x, axes, keepdims=True)
    options = {"epsilon": hard.EPSILON, "weights": weights}
    dx, *parts = reference.gradients(x, dy, axes, gamma=gamma, **options)
    d_gamma, d_beta = (np.sum(part, axes, keepdims=True) for part in parts)
    z = reference.normalize(x, axes, **options)
    s = np.sqrt(reference.moments(x, axes, weights).variance + hard.EPSILON)
    bound = hard.gradient_bound(z, s, gamma * dy, axes, arguments.x.dtype.name)
    sums = 8 * hard.unit_roundoff(arguments.gamma.dtype.name) * np.abs(dy)
    return max(
        hard.share(found[0] - dx, bound),
        hard.share(found[1] - d_gamma, np.sum(sums * (1 + np.abs(z)), axes, keepdims=True)),
        hard.share(found[2] - d_beta, np.sum(sums, axes, keepdims=True)),
    )


def _runs() -> Iterator[Any]:
    for name in IMPLEMENTATIONS:
        for mode in modes.MODES if name != "generic" else modes.EXTREMES:
            # torch.compile takes seconds for each shape.
            for case in ("conv",) if mode.startswith("compile") else CASES:
                yield pytest.param(name, mode, case, id=f"{name}-{mode}-{case}")


@pytest.mark.parametrize(("name", "mode", "case"), list(_runs()))
def test_gradients_are_within_the_bound_at_any_kappa(name, mode, case):
    arguments, kept = given(case)
    loss = loss_of(IMPLEMENTATIONS[name], hard.others(arguments.x.ndim, kept), "float32")
    found = modes.gradients(mode, loss, arguments, kept=(kept,))
    assert largest_share(found, arguments, kept) <= 1


@pytest.mark.parametrize("mode", modes.EXTREMES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_gradients_are_as_exact_as_their_dtype(mode, dtype):
    arguments, kept = given("conv", dtype)
    found = modes.gradients(mode, loss_of(kernels, (0, 1, 2), dtype), arguments)
    assert largest_share(found, arguments, kept) <= 1


@pytest.mark.parametrize("mode", modes.EXTREMES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weighted_gradients_are_within_the_bound(mode, dtype):
    arguments, kept = given("conv", dtype)
    rng = np.random.default_rng(3)
    weights = rng.uniform(0, 2, (4, 14, 14, 1)) * (rng.uniform(size=(4, 14, 14, 1)) < 0.7)
    weights = weights.astype(dtype)
    loss = loss_of(kernels, (0, 1, 2), dtype, weights)
    found = modes.gradients(mode, loss, arguments)
    assert largest_share(found, arguments, kept, weights) <= 1


@pytest.mark.parametrize("mode", modes.EXTREMES)
def test_mean_and_m2_have_their_own_gradients(mode):
    (x, a, b, _), _ = given("prime sizes")
    a_tensor, b_tensor = modes.tensor(a), modes.tensor(b)

    def function(x):
        moments = kernels.moments(x, (0, 1))
        return ops.sum(a_tensor * moments.mean + b_tensor * moments.m2)

    exact = reference.moments(x, (0, 1))
    dx = a / exact.count + 2 * b * (x - exact.mean)
    (found,) = modes.gradients(mode, function, [x])
    spread = np.sqrt(exact.variance) + U * np.abs(exact.mean)
    assert hard.share(found - dx, 8 * U * (np.abs(dx) + np.abs(b) * spread)) <= 1


@pytest.mark.parametrize("mode", modes.EXTREMES)
def test_apply_has_gradients_to_x_and_to_each_part_of_the_map(mode):
    (x, scale, shift, dy), _ = given("prime sizes")
    center, dy_tensor = np.mean(x, (0, 1), keepdims=True), modes.tensor(dy)

    def function(x, *parts):
        return ops.sum(dy_tensor * kernels.apply(x, Affine(*parts), "float32"))

    dx, *found = modes.gradients(mode, function, [x, center, scale, shift])
    dy = np.asarray(dy, "float64")
    terms = np.stack([-dy * scale, dy * (x - center), dy])
    assert hard.share(dx - dy * scale, U * np.abs(dy * scale)) <= 1
    bound = 8 * U * np.sum(np.abs(terms), (1, 2), keepdims=True)
    assert hard.share(found - np.sum(terms, (1, 2), keepdims=True), bound) <= 1


def slope(function: Callable, arguments: Any, direction: Any, step: float) -> float:
    """Return the derivative of a function in a direction, by a central difference."""
    pairs = list(zip(arguments, direction, strict=True))
    after, before = (
        modes.call("eager", function, [a + signed * d for a, d in pairs])
        for signed in (step, -step)
    )
    return float(after - before) / (2 * step)


def sample(weighted: bool) -> tuple[list[np.ndarray], list[np.ndarray], Any]:
    """Return float64 arguments of `loss`, a direction, and weights."""
    rng = np.random.default_rng(4)
    sizes = [(5, 7, 3), (1, 1, 3), (1, 1, 3), (5, 7, 3)]
    arguments, direction = ([rng.normal(size=size) for size in sizes] for _ in range(2))
    arguments[0] = 1.7 * arguments[0] + 3
    weights = rng.integers(0, 3, (5, 7, 1)).astype("float64") if weighted else None
    return arguments, direction, weights


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_gradients_agree_with_finite_differences(weighted):
    arguments, direction, weights = sample(weighted)
    loss = loss_of(kernels, (0, 1), "float64", weights)
    found = modes.gradients("eager", loss, arguments)
    along = sum(np.sum(g * d) for g, d in zip(found, direction, strict=True))
    # A central difference is off by step² and by u / step.
    assert along == pytest.approx(slope(loss, arguments, direction, 1e-5), rel=1e-8)


# torch.compile does not differentiate twice (torch 2.13).
TWICE = [mode for mode in modes.MODES if not mode.startswith(("compile", "xla-"))]


@pytest.mark.parametrize(
    ("name", "mode"), [(modes.BACKEND, mode) for mode in TWICE] + [("generic", "eager")]
)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_gradients_of_gradients_agree_with_finite_differences(mode, name, weighted):
    (*arguments, dy), direction, weights = sample(weighted)
    loss = loss_of(IMPLEMENTATIONS[name], (0, 1), "float64", weights)
    with modes.precision(dy):
        dy = modes.tensor(dy)

    def penalty(x, gamma, beta):
        (dx,) = modes.gradient_of(lambda x: loss(x, gamma, beta, dy))(x)
        return ops.sum(ops.square(dx)) + ops.sum(beta)

    found = modes.gradients(mode, penalty, arguments)
    along = sum(np.sum(g * d) for g, d in zip(found, direction[:3], strict=True))
    assert along == pytest.approx(slope(penalty, arguments, direction[:3], 1e-5), rel=1e-7)

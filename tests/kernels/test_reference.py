"""The oracle itself: against rational arithmetic, NumPy and finite differences."""

from fractions import Fraction

import numpy as np
import pytest

from keras_bn.kernels import reference
from tests.kernels import hard

U = hard.unit_roundoff("float64")
AXES = (0, 1)


def sample(seed: int = 0) -> dict[str, np.ndarray]:
    """Return x, dy, weights, and per-channel gamma, beta, r and d."""
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(size=(4, 5, 3)) for name in ("x", "dy")}
    arrays["weights"] = rng.integers(0, 3, (4, 5, 1)) / 2
    return arrays | {name: rng.normal(size=(1, 1, 3)) for name in ("gamma", "beta", "r", "d")}


def exact_column(values: np.ndarray, weights: np.ndarray) -> tuple[Fraction, Fraction, Fraction]:
    """Return count, mean and m2 without any rounding."""
    x, w = ([Fraction(float(v)) for v in array] for array in (values, weights))
    count = sum(w)
    mean = sum(a * b for a, b in zip(w, x, strict=True)) / count
    return count, mean, sum(a * (b - mean) ** 2 for a, b in zip(w, x, strict=True))


@pytest.mark.parametrize("kind", hard.KINDS | hard.OUTLIERS | hard.COARSE)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_moments_agree_with_rational_arithmetic(kind, weighted):
    rng = np.random.default_rng(0)
    x = (hard.KINDS | hard.OUTLIERS | hard.COARSE)[kind](rng, 300)
    weights = rng.integers(0, 5, 300) / 4 if weighted else np.ones(300)
    exact = [float(value) for value in exact_column(x, weights)]
    found = [float(part[0]) for part in reference.moments(x, (0,), weights)]
    n = 2 * len(x)  # roundings, at most: one by one, products and sums
    size = np.mean(np.abs(x))
    assert found[0] == exact[0]
    assert abs(found[1] - exact[1]) <= n * U * size
    assert abs(found[2] - exact[2]) <= n * U * exact[2] + exact[0] * (n * U * size) ** 2


@pytest.mark.parametrize("kind", hard.KINDS | hard.OUTLIERS | hard.COARSE)
def test_exact_moments_agree_with_rational_arithmetic(kind):
    x = (hard.KINDS | hard.OUTLIERS | hard.COARSE)[kind](np.random.default_rng(0), 300)
    exact = [float(value) for value in exact_column(x, np.ones(300))]
    found = [float(part[0]) for part in hard.exact_moments(x, (0,))]
    assert found[:2] == pytest.approx(exact[:2], rel=2 * U, abs=1e-300)
    assert found[2] == pytest.approx(exact[2], rel=4 * U, abs=300 * (U * np.max(np.abs(x))) ** 2)


def test_moments_agree_with_numpy():
    x = sample()["x"]
    found = reference.moments(x, AXES)
    assert np.allclose(found.mean, x.mean(AXES, keepdims=True), rtol=1e-14)
    assert np.allclose(found.variance, x.var(AXES, keepdims=True), rtol=1e-14)


def test_integer_weights_count_as_repetitions():
    arrays = sample()
    weights = (2 * arrays["weights"]).astype(int)
    repeated = np.repeat(arrays["x"].reshape(20, 3), weights.reshape(20), axis=0)
    found = reference.moments(arrays["x"], AXES, weights)
    expected = reference.moments(repeated, (0,))
    pairs = zip(found, expected, strict=True)
    assert all(np.allclose(np.squeeze(a), np.squeeze(b), rtol=1e-13) for a, b in pairs)


def test_an_empty_set_has_count_mean_and_m2_0():
    found = reference.moments(np.full((3, 2), np.nan), (0,), np.zeros((3, 1)))
    assert np.array_equal(np.concatenate(found), np.zeros((3, 2)))


@pytest.mark.parametrize("cut", [0, 1, 7, 20], ids=str)
def test_merged_parts_are_the_whole(cut):
    arrays = sample()
    x, weights = arrays["x"].reshape(20, 3) + 1e3, arrays["weights"].reshape(20, 1)
    parts = [reference.moments(x[s], (0,), weights[s]) for s in (slice(cut), slice(cut, None))]
    pairs = zip(reference.merge(parts), reference.moments(x, (0,), weights), strict=True)
    assert all(np.allclose(a, b, rtol=1e-12) for a, b in pairs)


def test_normalized_values_have_mean_beta_and_the_variance_of_the_formula():
    arrays = sample()
    y = reference.normalize(
        arrays["x"], AXES, gamma=arrays["gamma"], beta=arrays["beta"], epsilon=0.1
    )
    variance = arrays["x"].var(AXES)
    assert np.allclose(y.mean(AXES), arrays["beta"].ravel(), rtol=1e-12)
    assert np.allclose(y.var(AXES), arrays["gamma"].ravel() ** 2 * variance / (variance + 0.1))


def test_r_and_d_correct_the_standardized_values():
    arrays = sample()
    options = {name: arrays[name] for name in ("gamma", "beta")}
    plain = reference.normalize(arrays["x"], AXES)
    corrected = reference.normalize(arrays["x"], AXES, r=arrays["r"], d=arrays["d"], **options)
    by_hand = options["gamma"] * (arrays["r"] * plain + arrays["d"]) + options["beta"]
    assert np.allclose(corrected, by_hand, rtol=1e-12)


OPTIONS = {
    "plain": (),
    "gamma": ("gamma",),
    "weights": ("gamma", "weights"),
    "renorm": ("gamma", "weights", "r", "d"),
}


@pytest.mark.parametrize("names", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("argument", ["x", "gamma", "beta"])
def test_gradients_agree_with_finite_differences(names, argument):
    arrays, direction = sample(), sample(1)[argument]
    options = {"gamma": arrays["gamma"]} | {name: arrays[name] for name in names}

    def loss(step):
        moved = options | {"beta": arrays["beta"], "x": arrays["x"]}
        moved[argument] = moved[argument] + step * direction
        return np.sum(arrays["dy"] * reference.normalize(moved.pop("x"), AXES, **moved))

    gradients = reference.gradients(arrays["x"], arrays["dy"], AXES, **options)
    found = np.sum(gradients[("x", "gamma", "beta").index(argument)] * direction)
    assert found == pytest.approx((loss(1e-5) - loss(-1e-5)) / 2e-5, rel=1e-8)


def test_gradients_of_r_and_d_are_not_taken_up():
    arrays = sample()
    exact = reference.moments(arrays["x"], AXES)
    r = np.sqrt(exact.variance + 1e-3)
    dx = reference.gradients(arrays["x"], arrays["dy"], AXES, r=r, d=exact.mean)[0]
    plain = reference.gradients(arrays["x"], arrays["dy"], AXES)[0]
    assert np.allclose(dx, r * plain, rtol=1e-12)


def test_normalized_kernel_has_length_g_and_the_direction_of_v():
    arrays = sample()
    kernel = reference.weight_normalize(arrays["x"], np.abs(arrays["gamma"]), AXES)
    length = np.sqrt(np.sum(kernel**2, AXES, keepdims=True))
    assert np.allclose(length, np.abs(arrays["gamma"]), rtol=1e-14)
    ratio = kernel / arrays["x"]
    assert np.allclose(ratio, ratio[:1, :1], rtol=1e-13)


@pytest.mark.parametrize("argument", ["x", "gamma"])
def test_gradients_of_a_kernel_agree_with_finite_differences(argument):
    arrays, direction = sample(), sample(1)[argument]

    def loss(step):
        moved = arrays | {argument: arrays[argument] + step * direction}
        kernel = reference.weight_normalize(moved["x"], moved["gamma"], AXES)
        return np.sum(arrays["dy"] * kernel)

    gradients = reference.weight_gradients(arrays["x"], arrays["gamma"], arrays["dy"], AXES)
    found = np.sum(gradients[("x", "gamma").index(argument)] * direction)
    assert found == pytest.approx((loss(1e-5) - loss(-1e-5)) / 2e-5, rel=1e-8)

"""The contract of `moments` and `apply`: values, on data on which a careless kernel fails."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from keras import ops
from keras.backend import standardize_dtype

from keras_bn import kernels
from keras_bn.core.affine import Learned, standardize
from keras_bn.core.pooling import Pooling
from keras_bn.kernels import generic, reference
from tests.kernels import hard, modes

U = hard.unit_roundoff("float32")

IMPLEMENTATIONS = {modes.BACKEND: kernels, "generic": generic}

# The shape, and the axis that is kept.
CASES = {
    "conv": ((8, 28, 28, 32), 3),
    "half a million rows": ((524288, 4), 1),
    "half a million in a sequence": ((8, 65536, 4), 2),
    "half a million, channels first": ((8, 4, 65536), 1),
    "prime sizes": ((127, 131, 3), 2),
    "channels in the middle": ((64, 7, 501), 1),
    "one channel": ((33, 9, 1), 2),
    "one element": ((1, 10), 1),
}
# A compiler takes seconds for each shape.
SELECTED = ("conv", "half a million rows", "channels in the middle")


class Result(NamedTuple):
    count: np.ndarray
    mean: np.ndarray
    m2: np.ndarray
    variance: np.ndarray
    y: np.ndarray


@functools.cache
def statistics(kernel: Any, axes: tuple[int, ...], dtype: str = "float32") -> Callable:
    """Return the function of x that a normalization layer is."""

    def function(x: Any, weights: Any = None) -> Result:
        found = kernel.moments(x, axes, weights)
        y = kernel.apply(x, standardize(found, hard.EPSILON), dtype)
        counts = found.count * ops.ones_like(found.m2)
        return Result(counts, found.mean, found.m2, found.variance, y)

    return function


def run(
    x: np.ndarray, kept: int, weights: Any = None, *, kernel: Any = kernels, mode: str = "eager"
) -> tuple[reference.Exact, Result]:
    """Return the exact moments and what the kernel gives."""
    axes = hard.others(x.ndim, kept)
    function = statistics(kernel, axes, x.dtype.name)
    found = modes.call(mode, function, [x, weights], kept=(kept,))
    return reference.moments(x, axes, weights), Result(*found)


class Run(NamedTuple):
    x: np.ndarray
    kept: int
    exact: reference.Exact
    found: Result


def _runs() -> Iterator[Any]:
    for name in IMPLEMENTATIONS:
        for mode in modes.FORWARD if name != "generic" else modes.EXTREMES:
            for case in SELECTED if mode.startswith(("compile", "xla-")) else CASES:
                yield pytest.param((name, mode, case), id=f"{name}-{mode}-{case}")


@pytest.fixture(params=list(_runs()))
def hard_run(request) -> Run:
    return _hard_run(*request.param)


@functools.lru_cache(maxsize=3)
def _hard_run(name: str, mode: str, case: str) -> Run:
    shape, kept = CASES[case]
    x = hard.channels(shape, kept)
    return Run(x, kept, *run(x, kept, kernel=IMPLEMENTATIONS[name], mode=mode))


# Grouped by run (one call serves all facts), not by fact.
@pytest.mark.parametrize("fact", ["count", "variance", "mean", "output"])
def test_error_is_within_the_bound_at_any_kappa(hard_run, fact):
    x, kept, exact, found = hard_run
    if fact == "count":
        error, bound = found.count - exact.count, np.zeros_like(exact.count)
    elif fact == "variance":
        assert np.all(found.m2 >= 0)
        error, bound = found.variance - exact.variance, hard.variance_bound(exact, U)
    elif fact == "mean":
        # One rounding of a large number, and the offset's error.
        error = found.mean - exact.mean
        bound = U * np.abs(exact.mean) + 8 * U * np.sqrt(exact.variance)
    else:
        y = reference.normalize(x, hard.others(x.ndim, kept), epsilon=hard.EPSILON)
        error, bound = found.y - y, hard.output_bound(y, exact, U)
    assert hard.share(error, bound) <= 1


# The sum grows by the outlier's square at once, and after it by numbers near its last place.
@pytest.mark.parametrize("mode", modes.EXTREMES)
@pytest.mark.parametrize("rows", [4099, 524288])
def test_an_outlier_does_not_hide_the_rest(mode, rows):
    x = hard.channels((rows, 4), 1, kinds=hard.OUTLIERS)
    exact, found = run(x, 1, mode=mode)
    assert hard.share(found.variance - exact.variance, hard.variance_bound(exact, U)) <= 1


# Where all pooled axes are short, a compiler may well add the elements one by one.
@pytest.mark.parametrize("mode", modes.EXTREMES)
@pytest.mark.parametrize(
    ("shape", "kept"),
    [
        ((15, 15, 15, 1), 3),
        ((4, 9, 9, 4), 3),
        ((31, 4, 31), 1),
        ((4099, 4), 1),
        ((4, 250), 0),
        ((4, 1024), 0),
    ],
)
def test_equal_values_do_not_add_up_their_rounding_errors(mode, shape, kept):
    x = hard.channels(shape, kept, kinds=hard.COARSE)
    exact, found = run(x, kept, mode=mode)
    assert hard.share(found.variance - exact.variance, hard.variance_bound(exact, U)) <= 1


WITH_EQUAL_TERMS = [
    ((32, 900), 1),
    ((31, 4100), 1),
    ((64, 4100), 1),
    ((900, 32), 0),
    ((4, 16, 384), 2),
    ((32, 14, 14, 64), 3),
]


# As many terms as a compiler may well add one by one, of which each sum errs the same way.
@pytest.mark.parametrize("mode", modes.EXTREMES)
@pytest.mark.parametrize(("shape", "kept"), WITH_EQUAL_TERMS)
def test_equal_terms_of_one_block_err_within_the_bound(mode, shape, kept):
    x = hard.channels(shape, kept, kinds=hard.EQUAL)
    exact, found = run(x, kept, mode=mode)
    assert hard.share(found.variance - exact.variance, hard.variance_bound(exact, U)) <= 1


@pytest.mark.parametrize("mode", modes.EXTREMES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_has_the_statistics_of_float32(mode, dtype):
    x = hard.channels((8, 28, 28, 6), 3, dtype)
    exact, found = run(x, 3, mode=mode)
    y = reference.normalize(x, (0, 1, 2), epsilon=hard.EPSILON)
    rounding = hard.unit_roundoff(dtype) * np.abs(y)
    assert hard.share(found.variance - exact.variance, hard.variance_bound(exact, U)) <= 1
    assert hard.share(found.y - y, hard.output_bound(y, exact, U) + rounding) <= 1


@pytest.mark.parametrize("mode", modes.EXTREMES)
def test_float64_is_float64_throughout(mode):
    x, u = hard.channels((4, 9, 9, 10), 3, "float64"), hard.unit_roundoff("float64")
    _, found = run(x, 3, mode=mode)
    exact = hard.exact_moments(x, (0, 1, 2))
    y = (x - exact.mean) / np.sqrt(exact.variance + hard.EPSILON)
    # What is judged by is rounded too, the mean above all.
    rounding = u * np.abs(exact.mean) / np.sqrt(exact.variance + hard.EPSILON)
    assert hard.share(found.variance - exact.variance, hard.variance_bound(exact, u)) <= 1
    assert hard.share(found.y - y, hard.output_bound(y, exact, u) + rounding) <= 1


@pytest.mark.parametrize("mode", modes.EXTREMES)
def test_normalize_is_both_kernels_and_the_algebra_between_them(mode):
    x, rng = hard.channels((16, 9, 10), 2), np.random.default_rng(0)
    weights = rng.integers(0, 3, (16, 9, 1)).astype("float32")
    gamma, beta, r, d = rng.normal(size=(4, 1, 1, 10)).astype("float32")
    given = [modes.tensor(part) for part in (gamma, beta, r, d)]

    def function(x, weights):
        pooling, learned = Pooling((0, 1), weights), Learned(*given[:2])
        options = {"correct": lambda moments: given[2:]}
        return kernels.normalize(x, pooling, learned, hard.EPSILON, "float32", **options)[0]

    exact = reference.moments(x, (0, 1), weights)
    parts = {"gamma": gamma, "beta": beta, "r": r, "d": d, "weights": weights}
    y = reference.normalize(x, (0, 1), epsilon=hard.EPSILON, **parts)
    z = reference.normalize(x, (0, 1), epsilon=hard.EPSILON, weights=weights)
    sizes = np.abs(gamma * r) * hard.output_bound(z, exact, U)
    sizes += 4 * U * (np.abs(gamma * d) + np.abs(beta))
    assert hard.share(modes.call(mode, function, [x, weights]) - y, sizes) <= 1


DTYPES = {
    "float32": ("float32", "float32", "float32"),
    "float16": ("float16", "float16", "float32"),
    "bfloat16": ("bfloat16", "bfloat16", "float32"),
    "float16 to float32": ("float16", "float32", "float32"),
    "float32 to bfloat16": ("float32", "bfloat16", "float32"),
    "float64": ("float64", "float64", "float64"),
    "float64 to float32": ("float64", "float32", "float64"),
}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("given", "asked", "summed"), DTYPES.values(), ids=DTYPES)
def test_dtypes_are_those_of_the_contract(name, given, asked, summed):
    kernel, x = IMPLEMENTATIONS[name], np.ones((4, 3), hard.numpy_dtype(given))
    with modes.precision(x):
        found = kernel.moments(modes.tensor(x), (0,))
        y = kernel.apply(modes.tensor(x), standardize(found, hard.EPSILON), asked)
    dtypes = [standardize_dtype(tensor.dtype) for tensor in (*found[1:], y)]
    assert dtypes == [summed, summed, summed, asked]


@pytest.mark.parametrize("mode", modes.FORWARD)
@pytest.mark.parametrize("shape", [(0, 3), (0, 5, 3), (0, 31, 3), (4, 0, 3)], ids=str)
def test_an_empty_batch_has_count_0_and_finite_moments(mode, shape):
    _, found = run(np.zeros(shape, "float32"), len(shape) - 1, mode=mode)
    assert np.array_equal(found.count.ravel(), [0, 0, 0])
    assert np.array_equal([found.mean.ravel(), found.m2.ravel()], np.zeros((2, 3)))
    assert found.y.shape == shape


@pytest.mark.parametrize("mode", modes.EXTREMES)
def test_one_element_has_variance_0_and_itself_as_mean(mode):
    x = np.array([[0.1, -3e30, 65504.0]], "float32")
    _, found = run(x, 1, mode=mode)
    assert np.array_equal(found.mean, x)
    assert np.array_equal([found.m2, found.y], np.zeros((2, 1, 3)))


@pytest.mark.parametrize("mode", modes.EXTREMES)
def test_subnormal_values_are_0_at_most(mode):
    smallest = float(np.finfo("float32").smallest_normal)
    x = np.random.default_rng(0).uniform(-1, 1, (64, 3)).astype("float32") * np.float32(1e-39)
    exact, found = run(x, 1, mode=mode)
    assert hard.share(found.mean - exact.mean, smallest) <= 1
    assert hard.share(found.variance - exact.variance, smallest) <= 1
    assert np.all(found.m2 >= 0)


@pytest.mark.parametrize("mode", modes.EXTREMES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_what_is_not_finite_stays_in_its_channel(mode, value):
    x = hard.channels((64, 5, 3), 2)
    _, clean = run(x, 2, mode=mode)
    x[7, 2, 1] = value
    found = modes.call(mode, statistics(kernels, (0, 1)), [x], kept=(2,))
    assert not np.isfinite(found[2][..., 1])
    assert not np.isfinite(found[4][7, 2, 1])
    assert np.array_equal(found[4][..., ::2], clean.y[..., ::2])

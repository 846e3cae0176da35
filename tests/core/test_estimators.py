"""What is kept between steps: moving averages, ramps, and renormalization's correction."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from keras_bn import kernels
from keras_bn.core.estimators import (
    Average,
    Limits,
    at_least,
    counted_momentum,
    linear_ramp,
    moving_average,
    renorm_correction,
    settled_count,
)
from keras_bn.core.moments import Moments
from tests.kernels import hard, modes

U = hard.unit_roundoff("float32")
NONE = Limits(None, None, None)


def tensors(*values: float, dtype: str = "float32") -> tuple[Any, ...]:
    return tuple(modes.tensor(np.array([value], dtype)) for value in values)


@pytest.mark.parametrize(
    ("momentum", "expected"), [(0.0, 7.0), (1.0, 3.0), (0.75, 4.0)], ids=["new", "old", "between"]
)
def test_momentum_is_the_share_of_the_old_value(momentum, expected):
    assert modes.to_numpy(moving_average(*tensors(3.0, 7.0), momentum)).tolist() == [expected]


def test_a_moving_average_of_a_constant_is_the_constant():
    value = tensors(0.3)[0]
    assert modes.to_numpy(moving_average(value, value, 0.99)) == pytest.approx(0.3, rel=2 * U)


def moved_in_float64(mean, variance, pivot, offset, m2, average, count):
    """Return what the formulas give where the moments are known, else what is kept."""
    kept = [part.astype("float64") for part in (mean, variance)]
    fresh = m2.astype("float64") / (count - 1 if average.unbiased else count)
    new = [pivot.astype("float64") + offset, fresh]
    if average.epsilon is not None:
        kept[1], new[1] = (np.sqrt(part + average.epsilon) for part in (kept[1], new[1]))
    share = average.momentum
    moved = [share * old + (1 - share) * new for old, new in zip(kept, new, strict=True)]
    if average.epsilon is not None:
        moved[1] = np.maximum(moved[1] ** 2 - average.epsilon, 0)
    known = np.isfinite(m2)
    return [np.where(known, *pair) for pair in zip(moved, (mean, variance), strict=True)]


AVERAGES = {
    "of variances": Average(0.9),
    "of their roots": Average(0.9, epsilon=1e-3),
    "unbiased": Average(0.75, unbiased=True),
    "of unbiased roots": Average(0.75, unbiased=True, epsilon=1e-2),
    "the last alone": Average(0.0),
}


# torch.compile takes seconds for each.
MOVED = [
    pytest.param(average, mode, id=f"{mode}-{name}")
    for mode in modes.MODES
    for name, average in AVERAGES.items()
    if not mode.startswith("compile") or name in ("of variances", "of unbiased roots")
]


@pytest.mark.parametrize(("average", "mode"), MOVED)
@pytest.mark.parametrize("count", [7, 7.0], ids=["known", "of each set"])
def test_a_pair_moves_where_the_batch_is_known(average, mode, count):
    rng = np.random.default_rng(0)
    mean, pivot, offset = rng.normal(100, 3, (3, 40)).astype("float32")
    offset = (offset - 100) / 1e4
    variance, m2 = rng.gamma(2, 3, (2, 40)).astype("float32")
    m2[3], m2[5], m2[7], variance[9], m2[9] = np.nan, np.inf, 0.0, 0.0, 0.0
    parts = [part.reshape(1, 8, 1, 5) for part in (pivot, offset, m2)]
    counts = None if isinstance(count, int) else np.full((1, 8, 1, 5), count, "float32")

    def moved(mean, variance, pivot, offset, m2, counts):
        batch = Moments(count if counts is None else counts, pivot, offset, m2)
        return kernels.moved(mean, variance, batch, average)[:2]

    kept = [part.reshape(8, 5) for part in (mean, variance)]
    found = modes.call(mode, moved, [*kept, *parts, counts], (0, 1))
    wanted = moved_in_float64(mean, variance, pivot, offset, m2, average, 7)
    for own, right in zip(found, wanted, strict=True):
        assert own.shape == (8, 5)
        assert np.allclose(own.ravel(), right, rtol=8 * U, atol=8 * U * (average.epsilon or 0))


def averaged(values: list[float], weights: list[float], momentum: float | None) -> float:
    """Return what a counted average of 99, which is nothing, is after these batches."""
    count, average = tensors(0.0, 99.0)
    for value, weight in zip(values, weights, strict=True):
        count, share = counted_momentum(count, *tensors(weight), momentum)
        average = moving_average(average, *tensors(value), share)
    return float(modes.to_numpy(average)[0])


COUNTED = {
    "one": (1, 0.99),
    "two": (2, 0.99),
    "many": (500, 0.99),
    "slow": (500, 0.9999),
    "quick": (20, 0.1),
    "the last alone": (20, 0.0),
    "all alike": (500, 1.0),
}


@pytest.mark.parametrize(("steps", "momentum"), COUNTED.values(), ids=COUNTED)
def test_counted_average_has_the_shares_of_its_momentum_and_no_initial_value(steps, momentum):
    values = np.random.default_rng(0).normal(5, 1, steps)
    shares = momentum ** np.arange(steps)[::-1]
    # A rounding of each step fades as the average does; those that are left add up as a root.
    left = min(steps, 1 / max(1 - momentum, 1e-4)) ** 0.5
    wanted = np.average(values.astype("float32").astype("float64"), weights=shares)
    found = averaged(list(values), [1.0] * steps, momentum)
    assert found == pytest.approx(wanted, rel=4 * U * (1 + left))


def test_cumulative_average_counts_all_weights_the_same():
    values, weights = [2.0, 4.0, 8.0], [1.0, 8.0, 0.5]
    found = averaged(values, weights, None)
    assert found == pytest.approx(np.average(values, weights=weights), rel=4 * U)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99, 0.9999, 1.0])
def test_settled_count_leaves_the_share_that_momentum_gives(momentum):
    _, share = counted_momentum(*tensors(settled_count(momentum), 1.0), momentum)
    assert float(modes.to_numpy(share)[0]) == pytest.approx(momentum, abs=2 * U)


def test_settled_count_of_a_cumulative_average_is_nothing():
    _, share = counted_momentum(*tensors(settled_count(None), 8.0), None)
    assert modes.to_numpy(share).tolist() == [0.0]


def test_batch_of_nothing_leaves_an_average_of_nothing():
    count, share = counted_momentum(*tensors(0.0, 0.0), None)
    assert (modes.to_numpy(count).tolist(), modes.to_numpy(share).tolist()) == ([0.0], [1.0])


# The steps between which the value goes from 1 to 3, the step, and the value there.
RAMPS = {
    "without steps, at 0": (None, 0, 3.0),
    "without steps, later": (None, 99, 3.0),
    "before": ((10, 20), 3, 1.0),
    "at its beginning": ((10, 20), 10, 1.0),
    "between": ((10, 20), 15, 2.0),
    "at its end": ((10, 20), 20, 3.0),
    "after": ((10, 20), 21, 3.0),
    "long after": ((10, 20), 2**31 - 1, 3.0),
    "from 0 on": ((0, 4), 1, 1.5),
    "a jump, before": ((5, 5), 5, 1.0),
    "a jump, after": ((5, 5), 6, 3.0),
    "exact at a large step": ((2**30, 2**30 + 2), 2**30 + 1, 2.0),
}


@pytest.mark.parametrize(("steps", "step", "expected"), RAMPS.values(), ids=RAMPS)
def test_a_ramp_is_linear_between_its_steps(steps, step, expected):
    step = ops.convert_to_tensor(step, dtype="int32")
    found = linear_ramp(step, 1.0, 3.0, steps, "float32")
    assert ops.convert_to_numpy(found).tolist() == expected


@pytest.mark.parametrize("steps", [None, (10, 20)], ids=["constant", "ramp"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_ramp_has_the_dtype_asked_for(steps, dtype):
    with modes.precision(np.zeros(1, dtype)):
        found = linear_ramp(ops.convert_to_tensor(15, dtype="int32"), 1.0, 2.0, steps, dtype)
    assert keras.backend.standardize_dtype(found.dtype) == dtype


def test_a_ramp_may_fall():
    step = ops.convert_to_tensor(15, dtype="int32")
    assert float(linear_ramp(step, 3.0, 1.0, (10, 20), "float32")) == 2.0


@pytest.mark.parametrize("mode", modes.EXTREMES)
def test_a_ramp_moves_in_a_compiled_function(mode):
    def ramp(step):
        return linear_ramp(step, 1.0, 3.0, (10, 20), "float32")

    found = [modes.call(mode, ramp, [np.array(step, "int32")]) for step in (10, 15, 20)]
    assert found == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("x", "expected"), [(1 / 3, 1 / 3), (0.1, 0.25), (np.inf, np.inf), (np.nan, np.nan)]
)
def test_at_least_takes_the_larger_and_keeps_the_dtype(x, expected, dtype):
    with modes.precision(np.zeros(1, dtype)):
        found = at_least(tensors(x, dtype=dtype)[0], 0.25)
    assert keras.backend.standardize_dtype(found.dtype) == dtype
    rounded = np.array([expected], dtype).astype("float64")
    assert np.array_equal(modes.to_numpy(found), rounded, equal_nan=True)


def correction(limits: Limits, *, mean: float = 5.0, stddev: float = 3.0) -> tuple[float, float]:
    """Return r and d of a batch, for a kept mean of 4 and a kept standard deviation of 2."""
    moments = Moments(8, *tensors(mean - 0.25, 0.25, 8 * stddev**2))
    found = renorm_correction(moments, *tensors(stddev, 4.0, 2.0), _tensors_of(limits))
    return tuple(float(part[0]) for part in modes.to_numpy(found))


def _tensors_of(limits: Limits) -> Limits:
    return Limits(*(None if value is None else tensors(value)[0] for value in limits))


# r is 1.5 and d 0.5 without limits.
LIMITS = {
    "none": (NONE, 1.5, 0.5),
    "wide": (Limits(0.1, 9.0, 9.0), 1.5, 0.5),
    "rmax": (Limits(None, 1.25, None), 1.25, 0.5),
    "rmin": (Limits(2.0, None, None), 2.0, 0.5),
    "dmax": (Limits(None, None, 0.25), 1.5, 0.25),
    "plain batch normalization": (Limits(1.0, 1.0, 0.0), 1.0, 0.0),
}


@pytest.mark.parametrize(("limits", "r", "d"), LIMITS.values(), ids=LIMITS)
def test_r_and_d_stay_within_their_limits(limits, r, d):
    assert correction(limits) == (r, d)


def test_d_is_limited_on_both_sides():
    assert correction(Limits(None, None, 0.25), mean=3.0) == (1.5, -0.25)


def test_without_limits_the_corrected_values_are_standardized_by_what_is_kept():
    r, d = correction(NONE, mean=-1.0, stddev=0.5)
    x = 1.7
    assert (x - -1.0) / 0.5 * r + d == pytest.approx((x - 4.0) / 2.0)


def test_d_of_a_mean_far_from_0_keeps_the_offset():
    moments = Moments(8, *tensors(1e7, 0.25, 8.0))
    _, d = renorm_correction(moments, *tensors(1.0, 1e7, 2.0), NONE)
    assert modes.to_numpy(d).tolist() == [0.125]


def test_an_empty_batch_is_not_corrected():
    moments = Moments(tensors(0.0)[0], *tensors(0.0, 0.0, 0.0))
    found = renorm_correction(moments, *tensors(0.03, 4.0, 2.0), NONE)
    assert [float(part[0]) for part in modes.to_numpy(found)] == [1.0, 0.0]


def test_nothing_is_corrected_where_nothing_is_kept():
    moments = Moments(8, *(modes.tensor(np.array(v, "float32")) for v in ([5, 5], [0, 0], [8, 8])))
    count = modes.tensor(np.array([0, 3], "float32"))
    found = renorm_correction(moments, *tensors(3.0, 4.0, 2.0), NONE, count)
    assert [part.tolist() for part in modes.to_numpy(found)] == [[1.0, 1.5], [0.0, 0.5]]


@pytest.mark.parametrize("limits", [NONE, Limits(0.5, 2.0, 3.0)], ids=["none", "limits"])
def test_the_correction_of_float64_is_float64(limits):
    with modes.precision(np.zeros(1)):
        moments = Moments(8, *tensors(1 / 3, 0.0, 8.0, dtype="float64"))
        kept = tensors(1.1, 0.1, 0.9, dtype="float64")
        r, d = renorm_correction(moments, *kept, limits)
        assert modes.to_numpy(r) == pytest.approx(1.1 / 0.9, rel=1e-15)
        assert modes.to_numpy(d) == pytest.approx((1 / 3 - 0.1) / 0.9, rel=1e-15)


@pytest.mark.skipif(not modes.DIFFERENTIABLE, reason="this backend has no gradients")
def test_r_and_d_carry_no_gradient():
    def function(offset, stddev):
        moments = Moments(8, modes.tensor(np.ones(1, "float32")), offset, stddev * stddev * 8)
        r, d = renorm_correction(moments, stddev, *tensors(4.0, 2.0), NONE)
        return ops.sum(offset * r + stddev * d)

    found = modes.gradients("eager", function, [np.ones(1, "float32"), 3 * np.ones(1, "float32")])
    assert [part.tolist() for part in found] == [[1.5], [-1.0]]

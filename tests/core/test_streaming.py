"""Summaries: what NumPy says of the whole, from parts in any order."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from keras_bn.core.streaming import UNKNOWN, Summary, three_parts
from tests.cases import U

RNG = np.random.default_rng(0)
LARGEST = 1.7e38


def holed(x):
    """Return the numbers with holes of each kind."""
    x.flat[::5], x.flat[3], x.flat[7], x.flat[11] = np.nan, np.inf, -np.inf, 1e39
    return x


HARD = {
    "normal": RNG.normal(3, 2, (13, 3)),
    "far": RNG.normal(1e9, 1, (13, 3)),
    "outlier": np.append(RNG.normal(0, 1e-3, (12, 3)), [[1e6, -1e6, 1e6]], axis=0),
    "tiny": RNG.normal(0, 1e-30, (13, 3)),
    "large": RNG.normal(0, 1e37, (13, 3)),
    "holes": holed(RNG.normal(3, 2, (13, 3))),
    "one": RNG.normal(3, 2, (1, 3)),
    "integers": RNG.integers(-9, 2**31, (13, 3)),
    "flags": RNG.random((13, 3)) < 0.5,
    "float16": RNG.normal(6e4, 1, (13, 3)).astype("float16"),
    "bfloat16": RNG.normal(3, 1, (13, 3)).astype(ml_dtypes.bfloat16),
}
hard = pytest.mark.parametrize("x", HARD.values(), ids=HARD)


def assert_summarizes(summary, x, axes=(0,), error_of_mean=0.0):
    """Compare; an error of the mean, relative to its size, is one of κ times that in stddev."""
    x = np.asarray(x, "float64")
    x = np.where(np.abs(x) <= LARGEST, x, np.nan)
    scale = np.nanmax(np.abs(x))
    # Far from 0 the rounding of the mean, squared, would be in the deviation.
    found, stddev = summary.stored(), np.nanstd(x - np.nanmin(x), axes)
    np.testing.assert_array_equal(found.count, np.isfinite(x).sum(axes))
    np.testing.assert_array_equal(found.minimum, np.nanmin(x, axes))
    np.testing.assert_array_equal(found.maximum, np.nanmax(x, axes))
    np.testing.assert_allclose(found.mean, np.nanmean(x, axes), rtol=0, atol=8 * 2**-53 * scale)
    np.testing.assert_allclose(found.stddev, stddev, rtol=1e-12, atol=error_of_mean * scale)


@hard
def test_summary_is_that_of_numpy(x):
    assert_summarizes(Summary.of(x, (1,), LARGEST), x)


KEPT = {"first": (0,), "last": (2,), "two": (0, 2), "none": (), "all": (0, 1, 2)}


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_any_axes_are_kept(kept):
    x = RNG.normal(3, 2, (4, 5, 6))
    axes = tuple(axis for axis in range(3) if axis not in kept)
    assert_summarizes(Summary.of(x, kept, LARGEST), x, axes)


@hard
def test_merged_parts_are_the_whole_in_any_order(x):
    parts = [Summary.of(x[i:j], (1,), LARGEST) for i, j in ((0, 1), (1, 7), (7, 7), (7, 13))]
    for order in itertools.permutations(parts):
        first, *others = order
        for other in others:
            first = first.merge(other)
        assert_summarizes(first, x)


@hard
def test_what_was_stored_goes_on(x):
    before, after = (Summary.of(part, (1,), LARGEST) for part in (x[:6], x[6:]))
    merged = Summary.of_stored(before.stored()).merge(after)
    assert_summarizes(merged, x, error_of_mean=2**-53)


def test_column_of_half_a_million_costs_no_digits():
    x = RNG.normal(1e3, 1, (2**19, 1))
    found = Summary.of(x, (1,), LARGEST).stored()
    # NumPy sums a row in pairs, but adds the rows of a column one by one.
    assert found.mean == pytest.approx(x.ravel().mean(), rel=2**-52)
    assert found.stddev == pytest.approx(x.ravel().std(), rel=1e-12)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e9 + 1 / 3, -7e-30])
def test_constant_has_no_deviation_at_all(value):
    x = np.full((1000, 1), value)
    merged = Summary.of(x, (1,), LARGEST).merge(Summary.of(x[:7], (1,), LARGEST))
    found = merged.stored()
    assert (found.mean, found.stddev, found.count) == (value, 0.0, 1007)


EMPTY = {"no-rows": np.zeros((0, 2)), "all-missing": np.full((3, 2), np.nan)}


@pytest.mark.parametrize("x", EMPTY.values(), ids=EMPTY)
def test_empty_set_is_stored_as_unknown(x):
    found = Summary.of(x, (1,), LARGEST).stored()
    for value, unknown in zip(found, UNKNOWN, strict=True):
        np.testing.assert_array_equal(value, np.full(2, unknown))


@pytest.mark.parametrize("x", EMPTY.values(), ids=EMPTY)
def test_empty_set_changes_nothing(x):
    empty, full = Summary.of(x, (1,), LARGEST), Summary.of(HARD["normal"][:, :2], (1,), LARGEST)
    for merged in (empty.merge(full), full.merge(empty)):
        pairs = zip(merged.stored(), full.stored(), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)


NUMBERS = [1e9 + 1 / 3, -1.7e-9, 0.1, 0.0, 1e38 / 3]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("value", NUMBERS)
def test_three_parts_are_the_number(value, dtype):
    parts = three_parts(np.array(value), dtype)
    assert {part.dtype.name for part in parts} == {dtype}
    assert sum(map(float, parts)) == value


@pytest.mark.parametrize("value", NUMBERS)
def test_two_of_three_parts_hold_48_bits(value):
    high, middle, _ = three_parts(np.array(value), "float32")
    assert float(high) + float(middle) == pytest.approx(value, rel=U["float32"] ** 2, abs=0)

"""The laws of moments: parts that are merged are the whole."""

from typing import Any

import numpy as np
import pytest
from keras import ops

from keras_bn import kernels
from keras_bn.core.affine import Learned
from keras_bn.core.moments import (
    Moments,
    degrees_of_freedom,
    is_known,
    merge,
    merge_equal,
    merge_replicas,
    or_else,
    union,
)
from keras_bn.core.pooling import Pooling
from keras_bn.kernels import generic, reference
from tests.kernels import hard, modes

U = hard.unit_roundoff("float32")
ROWS = 600
KINDS = hard.KINDS | hard.OUTLIERS | hard.COARSE

SPLITS = {
    "halves": (300, 300),
    "uneven": (1, 7, 92, 500),
    "empty parts": (0, 200, 0, 0, 400),
    "single elements": (1,) * 100 + (500,),
    "one part": (600,),
}


def data(weighted: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return one column of hard data per kind, and weights."""
    x = hard.channels((ROWS, len(KINDS)), 1, kinds=KINDS).astype("float64")
    rng = np.random.default_rng(5)
    weights = rng.integers(0, 5, (ROWS, 1)) / 4 if weighted else np.ones((ROWS, 1))
    return x, weights


def parts(x: np.ndarray, weights: np.ndarray, sizes: Any) -> Moments:
    """Return the moments of the parts, each right to the last place, one part per row."""
    cuts = np.cumsum(sizes)[:-1]
    pieces = zip(np.split(x, cuts), np.split(weights, cuts), strict=True)
    exact = [reference.moments(piece, (0,), w) for piece, w in pieces]
    mean = np.concatenate([part.mean for part in exact])
    pivot = mean.astype("float32")
    counts = np.concatenate([np.broadcast_to(part.count, part.mean.shape) for part in exact])
    m2 = np.concatenate([part.m2 for part in exact])
    arrays = (counts, pivot, mean - pivot, m2)
    return Moments(*(modes.tensor(array.astype("float32")) for array in arrays))


def over_rows(array: Any) -> Any:
    return ops.sum(array, axis=0, keepdims=True)


def over_all(parts: Moments) -> Moments:
    """Merge parts of one device."""
    return merge(parts, over_rows)


def replicated(parts: Moments) -> Moments:
    """Merge parts as replicas do that sum: each row has a part, and the result."""

    def total(array: Any) -> Any:
        # The first axis is that of what is summed together, the second one that of replicas.
        return ops.broadcast_to(ops.sum(array, axis=1, keepdims=True), ops.shape(array))

    return merge_replicas(parts, total)


def take(moments: Moments, rows: Any) -> Moments:
    """Return some of the parts, in the order given."""
    rows = modes.tensor(np.array(rows, "int32"))
    return Moments(*(ops.take(part, rows, axis=0) for part in moments))


def share(found: Moments, exact: reference.Exact) -> float:
    """Return the largest share of the bound that count, mean and variance use up."""
    count, mean, variance = modes.to_numpy((found.count, found.mean, found.variance))
    return max(
        hard.share(count - exact.count, U * exact.count),
        hard.share(mean - exact.mean, U * np.abs(exact.mean) + 8 * U * np.sqrt(exact.variance)),
        hard.share(variance - exact.variance, hard.variance_bound(exact, U)),
    )


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
def test_merged_parts_are_the_whole(sizes, weighted):
    x, weights = data(weighted)
    found = merge(parts(x, weights, sizes), over_rows)
    assert share(found, reference.moments(x, (0,), weights)) <= 1


def by_moments_of_means(size: int, x: np.ndarray, mode: str) -> Any:
    """Return the moments of parts that are right to the last place, merged."""

    def merged(*own: Any) -> Moments:
        return merge_equal(Moments(size, *own), kernels.moments)

    return modes.call(mode, merged, parts(x, np.ones((ROWS, 1)), (size,) * (ROWS // size))[1:])


def by_normalizing(size: int, x: np.ndarray, mode: str) -> Any:
    """Return what a kernel gives that normalizes the parts."""

    dtype = x.dtype.name

    def merged(x: Any) -> Moments:
        pooling, learned = Pooling((0,)), Learned(None, None)
        return kernels.normalize(x, pooling, learned, 1e-3, dtype, merges=True)[1]

    count, *together = modes.call(mode, merged, [x.reshape(size, ROWS // size, -1)])
    return count, *(part[0] for part in together)


@pytest.mark.parametrize("merged", [by_moments_of_means, by_normalizing], ids=["core", "kernels"])
@pytest.mark.parametrize(
    ("size", "mode"),
    [
        (size, mode)
        for mode in modes.MODES
        for size in ([4, 300] if mode == "compile" else [1, 4, 8, 60, 300, 600])
        if "unknown" not in mode
    ],
)
def test_merged_parts_of_one_size_are_the_whole(size, mode, merged):
    x = np.tile(data()[0], 200).astype("float32")  # so that threads share the work
    count, *together = merged(size, x, mode)
    assert share(Moments(int(count), *together), reference.moments(x, (0,))) <= 1


@pytest.mark.parametrize("mode", modes.EXTREMES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("size", [4, 8])
def test_merged_parts_of_half_precision_are_the_whole(size, dtype, mode):
    x = hard.channels((ROWS, 2048), 1, dtype)
    count, *together = by_normalizing(size, x, mode)
    assert share(Moments(int(count), *together), reference.moments(x, (0,))) <= 1


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
def test_parts_of_replicas_are_the_whole(sizes, weighted):
    x, weights = data(weighted)
    found = replicated(parts(x, weights, sizes))
    assert share(found, reference.moments(x, (0,), weights)) <= 1


def test_replicas_come_to_the_same_numbers():
    found = modes.to_numpy(tuple(replicated(parts(*data(), SPLITS["uneven"]))))
    assert all(np.array_equal(part, np.broadcast_to(part[:1], part.shape)) for part in found)


def test_empty_replicas_have_empty_moments():
    x, _ = data()
    found = replicated(parts(x, np.zeros((ROWS, 1)), (300, 300)))
    assert not any(part.any() for part in modes.to_numpy((found.count, found.mean, found.m2)))


def test_an_empty_replica_changes_nothing_even_where_its_distance_overflows():
    arrays = ([[3.0], [0.0]], [[1e25], [0.0]], [[0.0], [0.0]], [[5e12], [0.0]])
    found = replicated(Moments(*(modes.tensor(np.array(a, "float32")) for a in arrays)))
    assert modes.to_numpy(found.mean) == pytest.approx(1e25, rel=2 * U)
    assert modes.to_numpy(found.m2) == pytest.approx(5e12, rel=2 * U)


def test_replicas_may_count_by_a_python_number():
    x, weights = data()
    found = replicated(parts(x, weights, (300, 300))._replace(count=300))
    assert share(found, reference.moments(x, (0,))) <= 1


def test_a_nan_on_one_replica_is_seen_by_all():
    x, weights = data()
    x[17, 0] = np.nan
    found = replicated(parts(x, weights, (300, 300)))
    mean, m2 = modes.to_numpy((found.mean, found.m2))
    assert np.isnan([mean[:, 0], m2[:, 0]]).all()
    assert np.isfinite([mean[:, 1:], m2[:, 1:]]).all()


def test_merge_is_commutative():
    x, weights = data(weighted=True)
    found = take(parts(x, weights, (1, 7, 92, 500)), [2, 0, 3, 1])
    assert share(merge(found, over_rows), reference.moments(x, (0,), weights)) <= 1


@pytest.mark.parametrize("first", [[0, 1], [1, 2], [0, 2], [1]], ids=str)
def test_merge_is_associative(first):
    x, weights = data(weighted=True)
    three = parts(x, weights, (40, 60, 500))
    some = merge(take(three, first), over_rows)
    rest = take(three, [row for row in range(3) if row not in first])
    joined = Moments(*(ops.concatenate(pair) for pair in zip(some, rest, strict=True)))
    # Two roundings of m2 where one merge has one.
    assert share(merge(joined, over_rows), reference.moments(x, (0,), weights)) <= 1


def test_merge_of_nothing_but_empty_parts_is_empty():
    x, _ = data()
    found = merge(parts(x, np.zeros((ROWS, 1)), (300, 300)), over_rows)
    zeros = np.zeros((1, len(KINDS)))
    assert np.array_equal(modes.to_numpy((found.count, found.mean, found.m2)), [zeros] * 3)


def test_an_empty_part_changes_nothing_even_where_its_distance_overflows():
    arrays = ([[3.0], [0.0]], [[1e25], [0.0]], [[0.0], [0.0]], [[5e12], [0.0]])
    found = merge(Moments(*(modes.tensor(np.array(a, "float32")) for a in arrays)), over_rows)
    assert modes.to_numpy(found.mean) == pytest.approx(1e25, rel=2 * U)
    assert modes.to_numpy(found.m2) == pytest.approx(5e12, rel=2 * U)


def test_a_count_may_be_a_python_number():
    x, weights = data()
    halves = parts(x, weights, (300, 300))._replace(count=300)
    assert share(merge(halves, over_rows), reference.moments(x, (0,))) <= 1


@pytest.mark.parametrize("number", [1, 2, 3, 100])
def test_equal_parts_are_merged_by_their_number(number):
    x, weights = data()
    size = ROWS // number
    equal = parts(x, weights, (size,) * number)._replace(count=size)
    found = merge(equal, over_rows, number)
    assert found.count == ROWS
    assert (
        share(found._replace(count=modes.tensor(np.float32(ROWS))), reference.moments(x, (0,))) <= 1
    )


def test_a_nan_in_one_part_is_seen_in_the_whole():
    x, weights = data()
    x[17, 0] = np.nan
    found = merge(parts(x, weights, (300, 300)), over_rows)
    mean, m2 = modes.to_numpy((found.mean, found.m2))
    assert np.isnan([mean[0, 0], m2[0, 0]]).all()
    assert np.isfinite([mean[0, 1:], m2[0, 1:]]).all()


@pytest.mark.skipif(not modes.DIFFERENTIABLE, reason="this backend has no gradients")
@pytest.mark.parametrize("mode", modes.EXTREMES)
@pytest.mark.parametrize("merged", [over_all, replicated], ids=["parts", "replicas"])
@pytest.mark.parametrize("find", [kernels.moments, generic.moments], ids=["kernels", "generic"])
def test_the_gradient_goes_through_a_merge(mode, merged, find):
    x = hard.channels((4, 50, 10), 2)
    a, b = (modes.tensor(np.linspace(*ends, 10, dtype="float32")) for ends in ((1, 3), (-1, 1)))

    def function(x):
        found = merged(find(x, (1,)))
        return ops.sum(a * found.mean[0] + b * found.m2[0])

    (found,) = modes.gradients(mode, function, [x])
    exact = reference.moments(x, (0, 1))
    a, b = modes.to_numpy((a, b))
    dx = a / exact.count + 2 * b * (x - exact.mean)
    spread = np.sqrt(exact.variance) + U * np.abs(exact.mean)
    assert hard.share(found - dx, 8 * U * (np.abs(dx) + np.abs(b) * spread)) <= 1


def simple(count: Any, mean: Any, m2: Any) -> Moments:
    """Return moments of given numbers, half of the mean in the offset."""
    mean, m2 = (np.array(array, "float32") for array in (mean, m2))
    count = modes.tensor(np.array(count, "float32")) if isinstance(count, list) else count
    return Moments(count, *(modes.tensor(array) for array in (mean / 2, mean / 2, m2)))


# count, mean, m2, and whether these moments are known.
KNOWN = {
    "a set": (3, 2, 5, True),
    "one element": (1, 2, 0, True),
    "empty": (0, 0, 0, False),
    "NaN": (3, np.nan, np.nan, False),
    "an infinite mean": (3, np.inf, np.nan, False),
    "an overflow": (3, 2, np.inf, False),
    "a fraction": (0.25, 2, 5, True),
}


@pytest.mark.parametrize("static", [False, True], ids=["tensor", "number"])
@pytest.mark.parametrize(("count", "mean", "m2", "known"), KNOWN.values(), ids=KNOWN)
def test_moments_are_known_if_not_empty_and_finite(count, mean, m2, known, static):
    moments = simple(count if static else [count], [mean], [m2])
    assert ops.convert_to_numpy(is_known(moments)).tolist() == [known]


def test_empty_sets_give_way_to_others():
    moments = simple([0, 4], [0, 6], [0, 8])
    found = or_else(moments, simple(1, [3, 3], [7, 7]))
    assert np.array_equal(modes.to_numpy(found.mean), [3, 6])
    assert np.array_equal(modes.to_numpy(found.variance), [7, 2])


@pytest.mark.parametrize(("count", "mean"), [(0, 3), (4, 6)])
def test_a_known_count_decides_before_the_call(count, mean):
    moments, other = simple(count, [6], [8]), simple(1, [3], [7])
    found = or_else(moments, other)
    assert found is (moments if count else other)
    assert np.array_equal(modes.to_numpy(found.mean), [mean])


@pytest.mark.parametrize("count", [0, [0]], ids=["number", "tensor"])
def test_the_variance_of_an_empty_set_is_0(count):
    assert modes.to_numpy(simple(count, [0], [0]).variance).tolist() == [0]


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_unions_one_after_the_other_are_the_whole(split):
    x, weights = data()
    rows = parts(x, weights, split)
    found = take(rows, [0])
    for row in range(1, len(split)):
        found = union(found, take(rows, [row]))
    assert share(found, reference.moments(x, (0,), weights)) <= 1


def test_union_counts_by_a_python_number_too():
    one = Moments(2, *(modes.tensor(np.array([v], "float32")) for v in (1.0, 0.0, 2.0)))
    both = union(one, one._replace(count=6))
    assert modes.to_numpy(both.count).tolist() == [8.0]
    assert modes.to_numpy(both.variance).tolist() == [0.5]


# n - 1; not for a single element, nor for weights that sum to little more.
DEGREES = {0: 0, 0.25: 0.25, 1: 1, 1.5: 1, 2: 1, 2.5: 1.5, 8: 7, 1000: 999}


@pytest.mark.parametrize("count", DEGREES)
def test_degrees_of_freedom_are_the_same_for_numbers_and_tensors(count):
    found = degrees_of_freedom(modes.tensor(np.array([count], "float32")))
    assert modes.to_numpy(found).tolist() == [DEGREES[count]] == [degrees_of_freedom(count)]


@pytest.mark.parametrize("count", [0, 1], ids=["empty", "one element"])
def test_unbiased_variance_is_defined_without_a_second_element(count):
    zero = modes.tensor(np.zeros(1, "float32"))
    for known in (count, zero + count):
        found = Moments(known, zero, zero, zero).unbiased_variance
        assert modes.to_numpy(found).tolist() == [0.0]


def test_unbiased_variance_is_that_of_a_sample():
    x = np.random.default_rng(0).normal(size=(7, 1))
    exact = reference.moments(x, (0,))
    arrays = (exact.mean, 0 * exact.mean, exact.m2)
    moments = Moments(7, *(modes.tensor(a.astype("float32")) for a in arrays))
    assert modes.to_numpy(moments.unbiased_variance) == pytest.approx(
        x.var(0, ddof=1, keepdims=True), rel=4 * U
    )

"""Layouts for the passes in C, and what each result is held to."""

import numpy as np
import pytest

import keras_bn
from keras_bn.core.pooling import Pooling, group_total
from keras_bn.kernels import reference
from tests.kernels import hard

U = hard.unit_roundoff("float32")

# Shape, pooled axes, and the axes along which gamma and beta vary.
CASES = {
    "rows": ((700, 96), (1,), (1,)),
    "short rows": ((5000, 7), (1,), (1,)),
    "one long row": ((1, 40_001), (1,), (1,)),
    "columns": ((700, 96), (0,), (1,)),
    "three columns": ((20_000, 3), (0,), (1,)),
    "one column": ((40_000, 1), (0,), (1,)),
    "many columns": ((9, 8192), (0,), (1,)),
    "a prime number of columns": ((20, 4099), (0,), (1,)),
    "images": ((6, 15, 17, 24), (0, 1, 2), (3,)),
    "images, channels first": ((6, 24, 15, 17), (0, 2, 3), (1,)),
    "channels in the middle": ((5, 9, 24, 31), (0, 1, 3), (2,)),
    "two kept axes": ((6, 15, 4, 30), (0, 2), (1, 3)),
    "instances": ((6, 15, 17, 24), (1, 2), (3,)),
    "instances, channels first": ((6, 24, 15, 17), (2, 3), (1,)),
    "few instances, channels first": ((2, 24, 65, 33), (2, 3), (1,)),
    "eight rows of many columns": ((8, 37, 48), (0,), (2,)),
    "eight rows each": ((37, 8, 48), (1,), (2,)),
    "rows that are not last": ((12, 90, 40), (1,), (1,)),
    "rows of two axes": ((40, 15, 60), (1, 2), (1, 2)),
    "rows apart": ((30, 15, 60), (0, 2), (0, 2)),
    "rows that share nothing": ((1, 20, 48), (2,), (1, 2)),
    "groups of rows": ((9, 20, 48), (2,), (1, 2)),
    "sets of one element": ((300, 120, 1), (2,), (1, 2)),
    "a single element": ((1, 1), (0,), (1,)),
}
every_case = pytest.mark.parametrize(("shape", "axes", "varied"), CASES.values(), ids=CASES)

# For operations that hand tensors to the passes, each layout, far from 0, and each dtype with some:
# the passes by themselves see every dtype with every layout.
SOME = ("images", "images, channels first", "rows")
HANDED = {name: (*case, "float32", 1e4) for name, case in CASES.items()} | {
    f"{name}, {dtype}, {mean}": (*CASES[name], dtype, mean)
    for name in SOME
    for dtype, mean in (("float32", 0.0), ("float16", 0.5), ("bfloat16", 0.5))
}
every_handed = pytest.mark.parametrize(
    ("shape", "axes", "varied", "dtype", "mean"), HANDED.values(), ids=HANDED
)

# The same, of results too large for a cache to hold until they are read: 8 MiB in float32.
LARGE = {
    "columns": ((16_500, 128), (0,), (1,)),
    "any number of columns": ((21_000, 100), (0,), (1,)),
    "rows": ((33_000, 64), (1,), (1,)),
    "rows of any length": ((21_300, 99), (1,), (1,)),
    "short rows of any length": ((47_000, 45), (1,), (1,)),
    "long rows": ((700, 3008), (1,), (1,)),
    "eight rows each": ((2100, 8, 128), (1,), (2,)),
    "instances": ((4, 91, 91, 64), (1, 2), (3,)),
    "instances, channels first": ((4, 64, 91, 91), (2, 3), (1,)),
}
every_large_case = pytest.mark.parametrize(("shape", "axes", "varied"), LARGE.values(), ids=LARGE)

WEIGHTS = {"rows": (700, 1), "columns": (1, 96), "elements": (700, 96)}
every_weight = pytest.mark.parametrize("sizes", WEIGHTS.values(), ids=WEIGHTS)

LIMITS = {"none": (None, None, None), "some": (None, 1.5, 0.1), "all": (0.8, 1.2, 0.3)}
LEARNED = {"learned": True, "as it is": False}
BATCHES = {"one": (700, 24), "ghosts": (8, 90, 24)}
every_limit = pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
every_learned = pytest.mark.parametrize("learned", LEARNED.values(), ids=LEARNED)
every_batch = pytest.mark.parametrize("shape", BATCHES.values(), ids=BATCHES)
# For operations, any two of them together.
CORRECTED = {
    f"{batch}-{learned}-{limits}": (BATCHES[batch], LEARNED[learned], LIMITS[limits])
    for batch, learned, limits in (
        ("one", "learned", "none"),
        ("one", "as it is", "some"),
        ("one", "learned", "all"),
        ("ghosts", "as it is", "none"),
        ("ghosts", "learned", "some"),
        ("ghosts", "as it is", "all"),
    )
}
every_corrected = pytest.mark.parametrize(
    ("shape", "learned", "limits"), CORRECTED.values(), ids=CORRECTED
)


LAYERS = {
    "batch": (keras_bn.BatchNormalization, {}, {"training": True}),
    "renormalization": (keras_bn.BatchRenormalization, {}, {"training": True}),
    "ghosts": (keras_bn.BatchNormalization, {"virtual_batch_size": 2}, {"training": True}),
    "groups": (keras_bn.GroupNormalization, {"groups": 4}, {}),
    "root mean square": (keras_bn.RMSNormalization, {}, {}),
    "nothing learned": (keras_bn.LayerNormalization, {"scale": False, "center": False}, {}),
}
every_layer = pytest.mark.parametrize(("kind", "options", "use"), LAYERS.values(), ids=LAYERS)


def drawn_to_correct(shape):
    """Return x and dy; then mean, deviation, gamma and beta, of a channel each."""
    rng = np.random.default_rng(0)
    scales, means = rng.uniform(0.5, 3, shape[-1]), rng.normal(0, 9, shape[-1])
    big = [rng.normal(means, scales, shape).astype("float32") for _ in range(2)]
    sizes = (1,) * (len(shape) - 1) + shape[-1:]
    return big, list(rng.uniform(0.5, 2, (4, *sizes)).astype("float32"))


def drawn_groups(axis, shape=(6, 130, 24)):
    """Return x, with channels far apart along an axis, and the pooling of four groups of them."""
    rng = np.random.default_rng(0)
    x = rng.normal(rng.normal(0, 30, shape[-1]), 1, shape).astype("float32")
    x = x if axis == 2 else np.moveaxis(x, 2, 1).copy()
    size = shape[-1] // 4
    total = group_total(axis, shape[-1], 4)
    return x, Pooling((3 - axis,), None, total, size, are_neighbours=True)


def compare_groups(y, x, axis):
    """Compare what is normalized by groups with the reference."""
    groups = np.moveaxis(x, axis, 1).reshape(len(x), 4, -1)
    exact = reference.moments(groups, (2,))
    z = reference.normalize(groups, (2,), epsilon=hard.EPSILON)
    found = np.moveaxis(np.asarray(y), axis, 1).reshape(groups.shape)
    assert hard.share(found - z, hard.output_bound(z, exact, U)) <= 1


def drawn(shape, axes, varied, mean=3.0, dtype="float32", outlier=300):
    """Return x, dy, gamma and beta; x begins with an outlier in each set of its first row."""
    rng = np.random.default_rng(0)
    x = rng.normal(mean, 1, shape)
    x[tuple(0 if axis in axes else slice(None) for axis in range(len(shape)))] += outlier
    dy = rng.normal(0.2, 1, shape)
    sizes = [size if axis in varied else 1 for axis, size in enumerate(shape)]
    gamma, beta = rng.uniform(0.5, 2, (2, *sizes)).astype("float32")
    x, dy = (part.astype("float32").astype(hard.numpy_dtype(dtype)) for part in (x, dy))
    return x, dy, gamma, beta


def compare(found, x, dy, gamma, beta, axes, dtype):
    """Compare y, the variance and the gradients of x, gamma and beta with the reference."""
    y, variance, dx, d_gamma, d_beta = found
    x, dy = (np.asarray(part, "float64") for part in (x, dy))
    compare_output(y, x, gamma, beta, axes, dtype)
    exact = reference.moments(x, axes)
    z = reference.normalize(x, axes, epsilon=hard.EPSILON)
    wanted = reference.gradients(x, dy, axes, gamma=gamma, epsilon=hard.EPSILON)
    bound = hard.variance_bound(exact, U)
    assert hard.share(variance - exact.variance, bound) <= 1
    s = np.sqrt(exact.variance + hard.EPSILON)
    bound = hard.gradient_bound(z, s, gamma * dy, axes, dtype)
    assert hard.share(dx - wanted[0], bound) <= 1
    shared = tuple(axis for axis, size in enumerate(gamma.shape) if size == 1)
    sizes = (8 * U * np.abs(dy) * (1 + np.abs(z)), 8 * U * np.abs(dy))
    for found, exactly, size in zip((d_gamma, d_beta), wanted[1:], sizes, strict=True):
        error = found - exactly.sum(shared, keepdims=True)
        assert hard.share(error, size.sum(shared, keepdims=True)) <= 1


def compare_output(y, x, gamma, beta, axes, dtype):
    """Compare y, in a dtype, with the reference."""
    exact = reference.moments(x, axes)
    z = reference.normalize(x, axes, epsilon=hard.EPSILON)
    ulp = 0.51 * 2 * hard.unit_roundoff(dtype) if dtype != "float32" else 0.0
    error, size = y - (gamma * z + beta), np.abs(gamma * z) + np.abs(beta)
    bound = gamma * hard.output_bound(z, exact, U) + 4 * U * np.abs(beta) + ulp * size
    assert hard.share(error, bound) <= 1


def compare_weighted(moments, sizes, axes):
    """Compare pivot, offset and m2 of x, weights and their sums with the reference."""
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 3, sizes).astype("float32") / 2
    x = rng.normal(50, 1, (700, 96)).astype("float32")
    exact = reference.moments(x, axes, weights)
    x[np.broadcast_to(weights == 0, x.shape)] = np.nan
    pivot, offset, m2 = moments(x, weights, np.asarray(exact.count, "float32"))
    assert hard.share(m2 / np.maximum(exact.count, 1) - exact.variance, 8 * U) <= 1
    bound = U * np.abs(exact.mean) + 8 * U
    assert hard.share(pivot + offset - exact.mean, bound) <= 1

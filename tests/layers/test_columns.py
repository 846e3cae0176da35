"""Batch and group statistics of what lies about 0, where a kernel may take them in one pass."""

import keras
import numpy as np
import pytest

import keras_bn
from tests.kernels import hard
from tests.oracle import expected, weights_by_name

U = hard.unit_roundoff("float32")

# The shape, the layer, and the axes of a set.
CASES = {
    "table": ((64, 512), keras_bn.BatchNormalization, (0,)),
    "a few rows": ((32, 512), keras_bn.BatchNormalization, (0,)),
    "eight rows": ((8, 48), keras_bn.BatchNormalization, (0,)),
    "twelve rows": ((12, 512), keras_bn.BatchNormalization, (0,)),
    "sixteen of many columns": ((16, 8192), keras_bn.BatchNormalization, (0,)),
    "few samples of a sequence": ((4, 8, 96), keras_bn.BatchNormalization, (0, 1)),
    "few, neither scaled nor shifted": (
        (20, 48),
        lambda: keras_bn.BatchNormalization(center=False, scale=False),
        (0,),
    ),
    "one column": ((20_000, 1), keras_bn.BatchNormalization, (0,)),
    "many rows": ((20_000, 8), keras_bn.BatchNormalization, (0,)),
    "images": ((16, 12, 12, 32), keras_bn.BatchNormalization, (0, 1, 2)),
    "channels first": ((16, 32, 12, 12), lambda: keras_bn.BatchNormalization(axis=1), (0, 2, 3)),
    "ghosts": ((64, 512), lambda: keras_bn.BatchNormalization(virtual_batch_size=8), (0,)),
    "ghosts of 32": (
        (64, 512),
        lambda: keras_bn.BatchNormalization(virtual_batch_size=32),
        (0,),
    ),
    "ghosts of sequences": (
        (16, 128, 256),
        lambda: keras_bn.BatchNormalization(virtual_batch_size=8),
        (0, 2),
    ),
    "instances": ((4, 32, 32, 24), keras_bn.InstanceNormalization, (1, 2)),
    "instances, channels first": (
        (4, 24, 32, 32),
        lambda: keras_bn.InstanceNormalization(axis=1),
        (2, 3),
    ),
    "a row each, channels first": ((6, 4, 999), lambda: keras_bn.GroupNormalization(-1, 1), (2,)),
}
# Sample i belongs to ghost i mod their number.
GHOSTS = {
    "ghosts": (8, 8, 512),
    "ghosts of 32": (32, 2, 512),
    "ghosts of sequences": (8, 2, 128, 256),
}
# Signs have equal squares: their rounding errors add up.
DRAWS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "signs": lambda rng, shape: np.sign(rng.standard_normal(shape)),
    "multiples": lambda rng, shape: rng.integers(-2, 3, shape) * rng.uniform(1, 2, shape[-1]),
}
# κ: on both sides of where one pass stops to be enough, and one channel far from the others.
MEANS = {"0": 0.0, "1": 1.0, "2": 1.99, "3": 3.0, "10": 10.0, "one": "one"}
if keras.backend.backend() != "torch":
    MEANS = {"2": 1.99, "one": "one"}  # there nothing depends on it


def drawn(draw, mean, shape, axis):
    rng = np.random.default_rng(0)
    x = 0.7 * DRAWS[draw](rng, shape)
    if mean == "one":
        x[(slice(None),) * axis + (0,)] += 1e3
    else:
        x += 0.7 * mean
    dy = rng.standard_normal(shape) + 0.2
    return x.astype("float32"), dy.astype("float32")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("draw", ["normal", "signs"])
def test_one_pass_is_taken_only_where_it_is_right(case, mean, draw, run):
    shape, make, axes = CASES[case]
    axis = 1 if "channels first" in case else len(shape) - 1
    x, dy = drawn(draw, MEANS[mean], shape, axis)
    layer = make()
    layer.build(shape)
    wanted = expected(layer, weights_by_name(layer), x, dy, training=True)
    is_batch = isinstance(layer, keras_bn.BatchNormalization)
    found = run(layer, x, dy, **({"training": True} if is_batch else {}))
    kappa = 1e3 if mean == "one" else 1 + MEANS[mean]
    assert hard.share(found.y - wanted.y, 8 * U * (1 + np.abs(wanted.y) + 8 * kappa * U)) <= 1
    sets = GHOSTS.get(case, shape)
    s = np.sqrt(x.reshape(sets).var(axes, dtype="float64", keepdims=True) + hard.EPSILON)
    z, d, error = (part.reshape(sets) for part in (wanted.y, dy, found.dx - wanted.dx))
    assert hard.share(error, hard.gradient_bound(z, s, d, axes, "float32")) <= 1
    factors = {"gamma": 1 + np.abs(wanted.y), "beta": 1.0}
    for name in wanted.gradients:
        bound = 8 * U * np.abs(dy) * factors[name]
        error = found.gradients[name] - wanted.gradients[name]
        assert hard.share(error, bound.sum(tuple(a for a in range(dy.ndim) if a != axis))) <= 1


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("mean", [m for m in MEANS if m != "one"])
@pytest.mark.parametrize("rows", [8, 16, 32, 64])
def test_variance_about_0_is_within_the_contract(mean, draw, rows, run):
    x, dy = drawn(draw, MEANS[mean], (rows, 900), 1)
    layer = keras_bn.BatchNormalization(momentum=0.0)
    layer.build(x.shape)
    run(layer, x, dy, training=True)
    exact = x.var(0, dtype="float64")
    found = keras.ops.convert_to_numpy(layer.moving_variance).astype("float64")
    assert hard.share(found - exact, 8 * U * exact) <= 1


@pytest.mark.parametrize("columns", [96, 4100])
@pytest.mark.parametrize("rows", [31, 64])
def test_equal_gradients_of_a_column_do_not_add_up_their_rounding_errors(rows, columns, run):
    x, _ = drawn("normal", 0.0, (rows, columns), 1)
    dy = np.tile(np.linspace(1, 2, columns, dtype="float32"), (rows, 1))
    layer = keras_bn.BatchNormalization()
    layer.build(x.shape)
    found = run(layer, x, dy, training=True).gradients["beta"]
    exact = dy.sum(0, dtype="float64")
    assert hard.share(found - exact, 8 * U * exact) <= 1


@pytest.mark.parametrize("given", ["float32", "bfloat16"])
@pytest.mark.parametrize("learns", [True, False], ids=["learns", "learns nothing"])
def test_few_samples_have_the_same_statistics_in_mixed_precision(given, learns):
    x, _ = drawn("normal", 1.0, (32, 96), 1)
    x = keras.ops.cast(keras.ops.convert_to_tensor(x), given)
    layer = keras_bn.BatchNormalization(
        momentum=0.0, center=learns, scale=learns, dtype="mixed_bfloat16"
    )
    y = layer(x, training=True)
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    exact = keras.ops.convert_to_numpy(keras.ops.cast(x, "float32")).var(0, dtype="float64")
    found = keras.ops.convert_to_numpy(layer.moving_variance).astype("float64")
    assert hard.share(found - exact, 8 * U * exact) <= 1


def test_a_nan_in_one_channel_does_not_let_another_far_from_0_pass_for_near():
    x, _ = drawn("normal", "one", (32, 96), 1)
    x[5, 7] = np.nan
    layer = keras_bn.BatchNormalization(momentum=0.0)
    y = keras.ops.convert_to_numpy(layer(x, training=True))
    exact = x.mean(0, dtype="float64"), x.std(0, dtype="float64")
    z = (x[:, 0] - exact[0][0]) / np.sqrt(exact[1][0] ** 2 + layer.epsilon)
    assert hard.share(y[:, 0] - z, 8 * U * (2 + np.abs(z))) <= 1
    assert np.isnan(y[:, 7]).all()

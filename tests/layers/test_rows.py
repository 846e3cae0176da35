"""Layer normalization of many rows and of rows far from 0: what native kernels get wrong."""

import keras
import numpy as np
import pytest

import keras_bn
from tests.kernels import hard
from tests.layers.half import check_rounded_once
from tests.oracle import expected, weights_by_name

U = hard.unit_roundoff("float32")
COMPILED = "traced" if keras.backend.backend() == "torch" else "compiled"
# κ of the rows; "some" are far from 0 among others that are not.
ROWS = {"near 0": 0.5, "far": 1e4, "very far": 1e5, "some": np.array([0.0, 1e4, 3.0, 1e2] * 8)}
every_row = pytest.mark.parametrize("mean", ROWS.values(), ids=ROWS)


def drawn(mean, size=96):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((32, size)) + np.reshape(mean, (-1, 1))
    return x.astype("float32"), rng.standard_normal((32, size)).astype("float32")


def built(size=96, kind=keras_bn.LayerNormalization, **options):
    layer = kind(**options)
    layer.build((None, size))
    draw = np.random.default_rng(1)
    layer.set_weights([draw.uniform(0.5, 2.0, w.shape) for w in layer.get_weights()])
    return layer


# Of short rows, some of which are far from 0, several go together.
@every_row
@pytest.mark.parametrize("size", [40, 48, 96])
@pytest.mark.parametrize("kind", [keras_bn.LayerNormalization, keras_bn.RMSNormalization])
def test_rows_are_right_however_far_from_0(mean, size, kind, run):
    x, dy = drawn(mean, size)
    layer = built(size, kind)
    wanted = expected(layer, weights_by_name(layer), x, dy, training=True)
    found = run(layer, x, dy)
    kappa = 1 + np.abs(np.reshape(mean, (-1, 1)))
    assert hard.share(found.y - wanted.y, 16 * U * (1 + np.abs(wanted.y) + kappa)) <= 1
    assert hard.share(found.dx - wanted.dx, 64 * U * (1 + np.abs(wanted.dx) + kappa)) <= 1


@every_row
def test_rows_are_right_in_predict(mean):
    x, dy = drawn(mean)
    layer = built()
    wanted = expected(layer, weights_by_name(layer), x, dy, training=False)
    # Without gradients, in batches of many rows and of few.
    model = keras.Sequential([keras.Input((x.shape[1],)), layer])
    kappa = 1 + np.abs(np.reshape(mean, (-1, 1)))
    for repeats in (1, 2):
        found = model.predict(np.tile(x, (repeats, 1)), batch_size=32 * repeats, verbose=0)
        error = found - np.tile(wanted.y, (repeats, 1))
        bound = 16 * U * (1 + np.abs(wanted.y) + kappa)
        assert hard.share(error, np.tile(bound, (repeats, 1))) <= 1


@pytest.mark.parametrize("mean", [0.5, 50.0], ids=["near 0", "far"])
@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_of_half_precision_are_rounded_once(mean, dtype, repeats, run):
    x, dy = (np.concatenate([part] * repeats) for part in drawn(mean))
    check_rounded_once(built(dtype=f"mixed_{dtype}"), x, dy, (0,), dtype, run)


@pytest.mark.parametrize("mean", [1e2, 1e4], ids=str)
def test_standard_deviation_of_rows_is_within_the_contract(mean, run):
    x, _ = drawn(mean, 1024)
    layer = keras_bn.LayerNormalization(epsilon=0.0, center=False)
    layer.build(x.shape)
    found = np.asarray(run(layer, x).y, "float64")
    # The output is affine in x: its slope is 1 / standard deviation, whatever the mean is off by.
    slope = np.ptp(found, axis=1) / np.ptp(x.astype("float64"), axis=1)
    kappa = np.abs(x.mean(1, dtype="float64")) / x.std(1, dtype="float64")
    error = slope * x.std(1, dtype="float64") - 1
    assert hard.share(error, 4 * U * (1 + kappa**2 * U) + 2 * U) <= 1


@pytest.mark.parametrize("value", [0.1, 1 / 3], ids=["a tenth", "a third"])
@pytest.mark.parametrize("rows", [32, 1000, 50_000])
def test_equal_gradients_of_many_rows_do_not_add_up_their_rounding_errors(rows, value, run):
    x = np.random.default_rng(0).standard_normal((rows, 8)).astype("float32")
    dy = np.full_like(x, value)
    found = run(built(8), x, dy).gradients["beta"]
    assert hard.share(found - rows * float(dy[0, 0]), 8 * U * rows * value) <= 1


@pytest.mark.parametrize("value", [0.1, 1 / 3], ids=["a tenth", "a third"])
# PyTorch's kernel, which takes rows of up to 4096, adds every eighth element one by one.
@pytest.mark.parametrize(("size", "units"), [(64, 16), (1024, 32), (4096, 128), (20_000, 16)])
def test_equal_gradients_along_a_row_leave_nothing(size, units, value, run):
    x = np.random.default_rng(0).standard_normal((64, size)).astype("float32")
    layer = keras_bn.LayerNormalization()
    layer.build(x.shape)
    found = run(layer, x, np.full_like(x, value))
    assert hard.share(found.dx, units * U * value * (1 + np.abs(x))) <= 1


@pytest.mark.parametrize("options", [{}, {"center": False}, {"scale": False}], ids=str)
def test_rows_without_gamma_or_beta(options, run):
    x, dy = drawn(1e3)
    layer = built(**options)
    wanted = expected(layer, weights_by_name(layer), x, dy, training=True)
    found = run(layer, x, dy)
    for name, gradient in wanted.gradients.items():
        assert hard.share(found.gradients[name] - gradient, 64 * U * 1e3 * (1 + abs(gradient))) <= 1


def test_rows_of_a_view_are_those_of_its_copy(run):
    x, dy = drawn(3.0)
    layer = built(32)
    view = run(layer, keras.ops.transpose(keras.ops.convert_to_tensor(x)), dy.T.copy())
    copy = run(layer, x.T.copy(), dy.T.copy())
    assert np.allclose(view.y, copy.y, atol=1e-6)
    assert np.allclose(view.dx, copy.dx, atol=1e-6)


# What is learned is the same along axes on both sides, of which few elements or many are summed.
@pytest.mark.parametrize("shape", [(6, 5, 3), (40, 5, 60), (3, 7, 2, 5)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", [keras_bn.LayerNormalization, keras_bn.RMSNormalization])
@pytest.mark.parametrize("how", ["eager", COMPILED])
@pytest.mark.usefixtures("x64")
def test_the_normalized_axis_may_stand_between_others(kind, dtype, shape, how, run):
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    layer = kind(axis=1, dtype=dtype)
    layer.build(shape)
    wanted = expected(layer, weights_by_name(layer), x, dy, training=True)
    found = run(layer, x, dy, how)
    u = hard.unit_roundoff(dtype)
    assert hard.share(found.y - wanted.y, 16 * u * (1 + np.abs(wanted.y))) <= 1
    assert hard.share(found.dx - wanted.dx, 64 * u * (1 + np.abs(wanted.dx))) <= 1
    others = tuple(axis for axis in range(len(shape)) if axis != 1)
    for name, gradient in wanted.gradients.items():
        sizes = np.sum(np.abs(dy) * (1 + np.abs(wanted.y)), others)
        assert hard.share(found.gradients[name] - gradient, 8 * u * sizes) <= 1
